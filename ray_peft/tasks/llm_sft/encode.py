"""A row as tokens: all of it with the labels of its answers, and its question alone."""

from __future__ import annotations

import datetime
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ray_peft.errors import first_line
from ray_peft.tasks.llm_sft.conversation import Conversation, Turn, Unusable
from ray_peft.tasks.llm_sft.rendering import reference
from ray_peft.tasks.llm_sft.special import Encoding, NotSpecial, SpecialTokens
from ray_peft.tasks.llm_sft.turns import DATE, CannotWrite, Message, Template, answers, messages, missing_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token without loss."""


@dataclass(frozen=True)
class Encoded:
    """A row as tokens."""

    ids: list[int]
    labels: list[int]
    """The tokens of sound answers with their end marks, else IGNORED; equally long."""
    unsound: Counter[str] = field(default_factory=Counter)
    """Answers that carry no label, by reason."""
    problem: str | None = None
    """Why the last answer, which a held-out row is scored on, carries no label; None if it does."""
    typed: tuple[str, ...] = ()
    """Special tokens in the text of the row, each as often as it is there."""
    rejected: Encoded | None = None
    """Of a pair, the side that is worse than this one."""

    def sides(self) -> list[Encoded]:
        """This one, and the rejected one of a pair."""
        return [self] if self.rejected is None else [self, self.rejected]

    @property
    def longest(self) -> int:
        """Tokens of the row, or of the longer side of a pair."""
        return max(len(side.ids) for side in self.sides())

    def unlabelled(self, limit: int | None = None) -> bool:
        """Whether its first `limit` tokens hold nothing to learn: a side has no label, or both sides are equal."""
        sides = self.sides()
        equal = len(sides) > 1 and sides[0].ids[:limit] == sides[1].ids[:limit]
        return equal or any(set(side.labels[:limit]) <= {IGNORED} for side in sides)


@dataclass(frozen=True)
class _Chat:
    """Turns and tools as the template gets them."""

    turns: list[Message]
    tools: Sequence[Mapping[str, Any]]
    typed: tuple[str, ...]
    """Special tokens in their texts."""
    original: _Chat | None = None
    """As the row has them; None if they are the same, since no special token is hidden in them."""

    @property
    def hidden(self) -> bool:
        """Whether private characters stand for special tokens."""
        return self.original is not None


class Encoder:
    """Turns rows into tokens, by one tokenizer and its chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        date: datetime.date = DATE,
        typed_as: Literal["text", "control"] = "text",
    ) -> None:
        self.template = Template(tokenizer, date)
        self._tokenizer = tokenizer
        self._special = SpecialTokens(tokenizer)
        self._typed_as = typed_as

    def row(self, conversation: Conversation) -> Encoded:
        """The tokens of a whole conversation or of both sides of a pair, or of a text with its end.

        The answers are found in the rendered text, so any template serves that only appends as turns are added. Special
        tokens typed in the row become ordinary tokens.

        Raises:
            CannotWrite: the template or the tokenizer fails on the row.
            Unusable: the template leaves out a turn, or the row cannot be told from the template.
        """
        if conversation.text is not None:
            return self._plain(conversation.text)
        if conversation.rejected:
            chosen, rejected = map(self.row, conversation.sides())
            problem = chosen.problem or rejected.problem
            unsound, typed = chosen.unsound + rejected.unsound, chosen.typed + rejected.typed
            return Encoded(chosen.ids, chosen.labels, unsound, problem, typed, rejected)
        chat = self._chat(messages(conversation), conversation.tools)
        text = self._written(chat)
        absent = missing_turn(chat.turns, text)
        if absent is not None:
            raise Unusable(f"the chat template leaves out the text of the {absent}")
        located = answers(text, chat.turns, self.template, chat.tools)
        located = [answer for answer in located if answer.turn not in conversation.untrained]
        cuts = [place for answer in located if answer.problem is None for place in (answer.begin, answer.end)]
        encoding, cuts = self._tokens(text, cuts, hidden=chat.hidden)
        unsound = Counter(answer.problem for answer in located if answer.problem is not None)
        problem = located[-1].problem if located else None
        return Encoded(encoding.ids, _labels(encoding, cuts), unsound, problem, chat.typed)

    def question(self, conversation: Conversation) -> dict[str, Any]:
        """The prompt of the last answer, and that answer: prompt_ids, prompt and reference.

        Raises:
            CannotWrite, Unusable: as `row`.
        """
        if conversation.text is not None:
            return {"prompt_ids": [], "prompt": "", "reference": ""}
        before = conversation.turns[:-1]
        chat = self._chat(messages(conversation)[:-1], conversation.tools)
        encoding, _ = self._tokens(self._written(chat, ask=True), [], hidden=chat.hidden)
        return {
            "prompt_ids": encoding.ids,
            "prompt": before[-1]["content"] if len(before) == 1 else _transcript(before),
            "reference": reference(conversation, self._tokenizer),
        }

    def _plain(self, text: str) -> Encoded:
        typed = tuple(self._special.typed(text))
        as_text = bool(typed) and self._typed_as == "text"
        try:
            if as_text and self._tokenizer.is_fast:
                ids = self._special.encode(self._special.hidden(text), [], add_special_tokens=True)[0].ids
            else:
                ids = self._tokenizer(text, split_special_tokens=as_text)["input_ids"]
        except NotSpecial as error:
            raise Unusable(str(error)) from None
        except Exception as error:  # as in _tokens
            raise CannotWrite(f"the tokenizer refuses it: {first_line(error)}", "mend the row") from None
        ids = [*ids, self._tokenizer.eos_token_id]
        return Encoded(ids, list(ids), typed=typed)

    def _chat(self, turns: list[Message], tools: Sequence[Mapping[str, Any]]) -> _Chat:
        """Turns and tools as the template gets them."""
        typed = tuple(self._special.typed([turns, tools]))
        original = _Chat(turns, tools, typed)
        if not typed or self._typed_as == "control":
            return original
        try:
            return _Chat(self._special.hidden(turns), self._special.hidden(list(tools)), typed, original)
        except NotSpecial as error:
            raise Unusable(str(error)) from None

    def _written(self, chat: _Chat, *, ask: bool = False) -> str:
        """The text of the template; it must be the same for hidden special tokens as for typed ones."""
        text = self.template.write(chat.turns, tools=chat.tools, ask=ask)
        if chat.original is not None:
            plain = self.template.write(chat.original.turns, tools=chat.original.tools, ask=ask)
            if self._special.restored(text) != plain:
                raise Unusable("the chat template reacts to special tokens typed in the row")
        return text

    def _tokens(self, text: str, cuts: list[int], *, hidden: bool) -> tuple[Encoding, list[int]]:
        try:
            if hidden:
                return self._special.encode(text, cuts)
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except NotSpecial as error:
            raise Unusable(str(error)) from None
        except Exception as error:  # lone surrogates and what else a tokenizer takes for no text
            raise CannotWrite(f"the tokenizer refuses it: {first_line(error)}", "mend the row") from None
        return Encoding(encoded["input_ids"], encoded["offset_mapping"]), cuts


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row, with the settings that a trial has by default.

    Raises:
        CannotWrite: as `Encoder.row`.
        Unusable: the same, or no answer can be trained on.
    """
    encoded = Encoder(tokenizer).row(conversation)
    if encoded.problem is not None and set(encoded.labels) == {IGNORED}:
        raise Unusable(encoded.problem)
    return encoded.ids, encoded.labels


def tokens_with_loss(labels: Sequence[int]) -> int:
    """How many tokens of a row carry loss; nothing predicts its first."""
    return sum(label != IGNORED for label in labels[1:])


def _labels(encoding: Encoding, cuts: Sequence[int]) -> list[int]:
    """The tokens that reach into a span between the first and second cut, the third and fourth and so on."""
    begins, ends = cuts[::2], cuts[1::2]
    labels = []
    for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
        span = bisect_left(begins, stop) - 1  # the last one that begins before the token's end
        inside = span >= 0 and start < ends[span] and stop > start
        labels.append(token if inside else IGNORED)
    return labels


def _transcript(turns: Sequence[Turn]) -> str:
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
