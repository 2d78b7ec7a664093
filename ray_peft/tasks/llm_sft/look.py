"""A first look at a file of rows: its recipe, how many rows can be used, how many repeat others, and how long they are.

A search space names all of this; `ray-peft compare` finds it out.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from ray_peft.errors import DataError
from ray_peft.spec import Recipe
from ray_peft.spec.preference import PAIRED
from ray_peft.tasks.llm_sft import files
from ray_peft.tasks.llm_sft.conversation import Conversation, Unusable, WrongShape
from ray_peft.tasks.llm_sft.encode import IGNORED, Encoder
from ray_peft.tasks.llm_sft.raw import RawRow
from ray_peft.tasks.llm_sft.recipes import RECIPES
from ray_peft.tasks.llm_sft.rendering import as_rendered
from ray_peft.tasks.llm_sft.turns import CannotWrite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS: dict[Recipe, tuple[tuple[str, ...], ...]] = {
    "preference": (("chosen", "rejected"),),
    "messages": (("messages",), ("conversations",), ("conversation",)),
    "alpaca": (("instruction", "output"),),
    "dolly": (("instruction", "response"),),
    "prompt_completion": (("prompt", "completion"),),
}
"""The fields by which a recipe is recognised, each a list of them; the first recipe that has them is taken."""

TRIED = 200
"""Rows that decide on the recipe."""

MEASURED = 400
"""Rows whose tokens are counted."""


@dataclass(frozen=True)
class Look:
    """What a file of rows holds."""

    recipe: Recipe
    rows: int
    usable: int
    unusable: Mapping[str, int]
    """Rows that cannot be used, by reason."""
    repeated: int
    """Usable rows that are equal to one before them."""
    lengths: tuple[int, ...]
    """Tokens of some rows as the model sees them, ascending; of pairs, of the longer side."""
    answer_lengths: tuple[int, ...]
    """Tokens of their answers, ascending; of pairs, of the chosen ones."""

    @property
    def judged(self) -> bool:
        """Whether rows are pairs of a better and a worse answer."""
        return self.recipe == PAIRED

    def length(self, share: float) -> int:
        """The length [tokens] that this share of the rows does not exceed."""
        return _quantile(self.lengths, share)

    def answer_length(self, share: float) -> int:
        """The same of their answers."""
        return _quantile(self.answer_lengths, share)


def _quantile(ordered: Sequence[int], share: float) -> int:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def look(path: str, tokenizer: PreTrainedTokenizerBase, split: str = "train") -> Look:
    """Read all rows of a file, a folder of shards or a hub data set.

    Raises:
        DataError: there is none, no recipe reads its rows, or no row can be used.
    """
    rows = files.read(path, split)
    first = list(islice(rows, TRIED))
    recipe = recognised(path, [row for row in first if row.values is not None])
    read = 0
    unusable: Counter[str] = Counter()
    different: set[bytes] = set()
    usable = 0
    some: list[Conversation] = []
    for raw in chain(first, rows):
        read += 1
        try:
            conversation = _conversation(raw, recipe, tokenizer)
        except Unusable as reason:
            unusable[str(reason)] += 1
            continue
        usable += 1
        text = json.dumps(conversation.plain(), sort_keys=True, ensure_ascii=True)
        different.add(hashlib.blake2b(text.encode(), digest_size=16).digest())
        if len(some) < MEASURED:
            some.append(conversation)
    lengths = _lengths(some, tokenizer)
    if not lengths:
        reasons = ", ".join(f"{count} rows: {why}" for why, count in unusable.most_common(3))
        raise DataError(f"{path}: recipe {recipe} can use none of its {read} rows ({reasons or 'no answer'})")
    return Look(
        recipe=recipe,
        rows=read,
        usable=usable,
        unusable=dict(unusable),
        repeated=usable - len(different),
        lengths=tuple(sorted(whole for whole, _ in lengths)),
        answer_lengths=tuple(sorted(answer for _, answer in lengths)),
    )


def recognised(path: str, rows: Sequence[RawRow]) -> Recipe:
    """The recipe that reads most of these rows, by their fields.

    Raises:
        DataError: none does.
    """
    votes: Counter[Recipe] = Counter()
    for row in rows:
        recipe = _by_fields(row.values or {})
        if recipe is not None:
            votes[recipe] += 1
    if votes:
        return votes.most_common(1)[0][0]
    names = sorted({str(name) for row in rows for name in row.values or {}})
    known = "; ".join(" or ".join(", ".join(fields) for fields in ways) for ways in FIELDS.values())
    has = f"its rows have the fields {', '.join(names[:12])}" if names else "none of its first rows can be read"
    raise DataError(
        f"{path}: {has}, which no recipe for questions and answers reads; known are {known}. Rename the fields, or "
        "write a search space for it (docs/data.md)"
    )


def _by_fields(values: Mapping[str, Any]) -> Recipe | None:
    for recipe, ways in FIELDS.items():
        if any(all(name in values for name in fields) for fields in ways):
            return recipe
    return None


def _conversation(raw: RawRow, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Conversation:
    if raw.values is None:
        raise Unusable(raw.reason)
    try:
        conversation = RECIPES[recipe](raw.values)
        conversation.check_characters()
        return as_rendered(conversation, tokenizer, answers_only=True)
    except WrongShape as error:
        raise Unusable(error.reason) from None
    except RecursionError:
        raise Unusable("nested too deeply") from None


def _lengths(conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Tokens of rows and of their answers; rows that the template cannot write are left out."""
    encoder = Encoder(tokenizer)
    lengths = []
    for conversation in conversations:
        try:
            encoded = encoder.row(conversation)
        except (Unusable, CannotWrite):
            continue
        if not encoded.unlabelled():
            lengths.append((encoded.longest, sum(label != IGNORED for label in encoded.labels)))
    return lengths
