"""Training rows that repeat held-out rows, over all sources: the same row, the same question, or mostly the same words.

A score on a held-out row that was trained on measures memory. Three kinds are found, the first that holds counts:

- `row`: the same normalised text (casefolded, white space collapsed) of the whole conversation.
- `question`: the same normalised text up to a user turn, of at least `ngram` words. Every turn of a conversation is
  compared, as the loss counts every answer. A shorter question, such as a greeting, is asked twice in any instruction
  set and tells little; those are counted, but allowed.
- `near`: at least `threshold` of the held-out row's word n-grams stand in that one training row.

The measure of `near` is the share of a test row's 8-grams seen in training, contaminated from 70 % on, of PaLM
(Chowdhery et al. 2022, arXiv:2204.02311, section 8). As in GPT-3's filter (Brown et al. 2020, arXiv:2005.14165,
appendix C), n-grams that many rows share are boilerplate, such as a system prompt or a task's template, and do not
count. Unlike there, one training row must hold the share alone: rows are what is left out, and pieces from many rows
are common phrases. Words are runs of letters, their marks and digits; in scripts without spaces, such as Chinese,
Japanese and Thai, each character counts as a word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ray_peft.metrics.scripts import loose_words, unspaced
from ray_peft.spec import ContaminationSpec
from ray_peft.tasks.llm_sft.recipes import Conversation
from ray_peft.tasks.llm_sft.rows import Row

Kind = Literal["row", "question", "near"]
Hashes = NDArray[np.uint64]
Places = NDArray[np.intp]

PAIRS_KEPT = 1000
"""Pairs that a report lists; it counts all."""

_NOT_WORD = {code: " " for code in range(128) if not re.match(r"\w", chr(code))}
"""The rule of `loose_words` for ASCII text, several times as fast."""
_EXCERPT = 60
_ODD = np.uint64(0x9E3779B97F4A7C15)
"""2**64 divided by the golden ratio: multiplying by it spreads what differs over all bits."""


@dataclass(frozen=True)
class HeldOutRow:
    """A test or validation row of a source."""

    source: str
    split: str
    row: Row


@dataclass(frozen=True)
class Pair:
    """A training row and the held-out row of a split that it repeats most."""

    kind: Kind
    share: float
    """Of the held-out row's n-grams; 1.0 for `row` and `question`."""
    train_source: str
    train_row: int
    """Counted from 1 in its file."""
    source: str
    split: str
    row: int
    """Counted from 1 in its file."""
    excerpt: str
    """The beginning of the held-out row."""

    def __str__(self) -> str:
        how = f"{self.kind} {self.share:.0%}" if self.kind == "near" else self.kind
        return (
            f"{self.train_source} row {self.train_row} repeats {self.split} row {self.row} of {self.source} "
            f"({how}): {self.excerpt}"
        )


@dataclass
class Overlap:
    """What was found over all sources."""

    action: str
    ngram: int
    threshold: float
    offending: int = 0
    """Training rows that repeat a held-out row."""
    short_questions: int = 0
    """Training rows whose short question is also that of a held-out row; they do not offend."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Per training source, held-out source, split and kind: train_rows and held_out_rows."""
    pairs: list[Pair] = field(default_factory=list)
    """The first of them, one per training row and split."""

    def plain(self) -> dict[str, Any]:
        """JSON-like data; `from_plain` gives an equal value back."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Overlap:
        """The value of `plain`."""
        return cls(**{**plain, "pairs": [Pair(**pair) for pair in plain["pairs"]]})


class Gate:
    """The held-out rows of all sources, with which training rows are compared one by one."""

    def __init__(self, held_out: Sequence[HeldOutRow], train: Iterable[Row], spec: ContaminationSpec) -> None:
        """Index the held-out rows, and learn from all rows which n-grams are boilerplate.

        Args:
            held_out: test and validation rows of every source.
            train: the rows to be trained on, as far as known; others may be asked for later.
            spec: what counts.
        """
        self.spec = spec
        self.held_out = held_out
        self._rows: dict[str, list[int]] = {}
        self._questions: dict[str, list[int]] = {}
        for index, held_out_row in enumerate(held_out):
            text, questions = _normalised(held_out_row.row.conversation)
            self._rows.setdefault(text, []).append(index)
            for question in questions:
                self._questions.setdefault(question, []).append(index)
        self._places_of: dict[tuple[str, int], Places] = {}
        self._index(train)
        self._short: set[tuple[str, int]] = set()
        self._counts: dict[tuple[str, str, str, Kind], tuple[set[tuple[str, int]], set[int]]] = {}
        self._offending: set[tuple[str, int]] = set()
        self._pairs: list[Pair] = []

    def offends(self, source: str, row: Row) -> bool:
        """Whether a training row of `source` repeats a held-out row; if so, it is recorded."""
        repeated = self._near(row)
        text, questions = _normalised(row.conversation)
        for question in questions:
            indices = self._questions.get(question, [])
            if _has_words(question, self.spec.ngram):
                repeated.update(dict.fromkeys(indices, ("question", 1.0)))
            elif indices:
                self._short.add(row.place)
        repeated.update(dict.fromkeys(self._rows.get(text, []), ("row", 1.0)))
        best: dict[str, tuple[Kind, float, int]] = {}
        for index, (kind, share) in sorted(repeated.items()):
            held_out_row = self.held_out[index]
            rows, others = self._counts.setdefault(
                (source, held_out_row.source, held_out_row.split, kind), (set(), set())
            )
            rows.add(row.place)
            others.add(index)
            if held_out_row.split not in best or _rank(kind, share) > _rank(*best[held_out_row.split][:2]):
                best[held_out_row.split] = kind, share, index
        for kind, share, index in best.values():
            self._note(source, row, self.held_out[index], kind, share)
        if repeated:
            self._offending.add(row.place)
        return bool(repeated)

    def overlap(self) -> Overlap:
        """What was recorded."""
        return Overlap(
            action=self.spec.action,
            ngram=self.spec.ngram,
            threshold=self.spec.threshold,
            offending=len(self._offending),
            short_questions=len(self._short - self._offending),
            groups=[
                {
                    "train_source": train_source,
                    "source": source,
                    "split": split,
                    "kind": kind,
                    "train_rows": len(rows),
                    "held_out_rows": len(others),
                }
                for (train_source, source, split, kind), (rows, others) in sorted(self._counts.items())
            ],
            pairs=self._pairs,
        )

    def _note(self, source: str, row: Row, held_out: HeldOutRow, kind: Kind, share: float) -> None:
        if len(self._pairs) < PAIRS_KEPT:
            text = " ".join(_text_of(held_out.row.conversation).split())
            excerpt = text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}..."
            number = held_out.row.number
            self._pairs.append(
                Pair(kind, round(share, 4), source, row.number, held_out.source, held_out.split, number, excerpt)
            )

    def _index(self, train: Iterable[Row]) -> None:
        """Sort the held-out rows' n-grams, with the rows that hold each, and mark those that are boilerplate."""
        row_hashes = [np.unique(self._hashes(held_out_row.row.conversation)) for held_out_row in self.held_out]
        owners = np.repeat(np.arange(len(row_hashes)), [len(hashes) for hashes in row_hashes])
        joined = np.concatenate([np.empty(0, np.uint64), *row_hashes])
        order = np.argsort(joined)
        self._grams, self._starts, self._lengths = np.unique(joined[order], return_index=True, return_counts=True)
        self._owners = owners[order]
        # Most n-grams of most rows are in no held-out row: a table of their first bits spares the search for those.
        bits = min(max(len(self._grams).bit_length() + 3, 10), 27)
        self._shift = np.uint64(64 - bits)
        self._prefixes = np.zeros(1 << bits, np.bool_)
        self._prefixes[self._grams >> self._shift] = True
        rows_with = self._lengths.copy()
        for row in train:
            places = self._places(row)
            self._places_of[row.place] = places
            rows_with[places] += 1
        self._distinctive = rows_with <= self.spec.boilerplate
        distinctive = np.repeat(self._distinctive, self._lengths)
        self._sizes = np.bincount(self._owners[distinctive], minlength=len(row_hashes))

    def _places(self, row: Row) -> Places:
        """Where the row's n-grams stand in the index, of those that do."""
        hashes = self._hashes(row.conversation)
        hashes = np.unique(hashes[self._prefixes[hashes >> self._shift]])
        places = np.searchsorted(self._grams, hashes)
        places, hashes = places[places < len(self._grams)], hashes[places < len(self._grams)]
        known_places: Places = places[self._grams[places] == hashes]
        return known_places

    def _near(self, row: Row) -> dict[int, tuple[Kind, float]]:
        """Held-out rows of which this row holds enough, with the share."""
        places = self._places_of.pop(row.place, None)
        if places is None:
            places = self._places(row)
        places = places[self._distinctive[places]]
        if not len(places):
            return {}
        lengths = self._lengths[places]
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1]) + np.repeat(self._starts[places] - (ends - lengths), lengths)
        rows, shared = np.unique(self._owners[positions], return_counts=True)
        shares = shared / self._sizes[rows]
        return {
            int(index): ("near", float(share))
            for index, share in zip(rows, shares, strict=True)
            if share >= self.spec.threshold
        }

    def _hashes(self, conversation: Conversation) -> Hashes:
        """Hashes of the word n-grams of a whole conversation, in its order; none of a shorter one."""
        words = _words(_text_of(conversation).casefold())
        count = max(len(words) - self.spec.ngram + 1, 0)
        # Python's own hashes of texts differ between processes, but are only compared within this one.
        numbers = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
        hashes = np.zeros(count, np.uint64)
        for offset in range(self.spec.ngram if count else 0):
            hashes = hashes * _ODD + numbers[offset : offset + count]
        return (hashes ^ (hashes >> np.uint64(32))) * _ODD


def summary(overlap: Overlap) -> list[str]:
    """One line per pair of sources, split and kind, such as `alpaca -> test of tulu: 3 rows (question)`."""
    return [
        f"{group['train_source']} -> {group['split']} of {group['source']}: {group['train_rows']} training rows repeat "
        f"{group['held_out_rows']} held-out rows ({group['kind']})"
        for group in overlap.groups
    ]


def refusal(overlap: Overlap, most: int = 10) -> str:
    """The text of the error: how many rows, the first pairs, and the way out."""
    count = overlap.offending
    kinds = Counter(pair.kind for pair in overlap.pairs)
    listed = overlap.pairs[:most]
    more = f"; the first {len(listed)} of {len(overlap.pairs)} pairs" if len(overlap.pairs) > most else ""
    return "\n".join(
        [
            f"data.contamination: {count} training rows repeat held-out rows (found: "
            + ", ".join(f"{kinds[kind]} {kind}" for kind in ("row", "question", "near") if kinds[kind])
            + f"), so scores would measure memory{more}:",
            *(f"  {pair}" for pair in listed),
            "  way out: data.contamination: {action: drop} trains on the next drawn rows in their place; {action: "
            "allow} keeps them and says so in the report; `ray-peft data SPACE --json` lists the pairs",
        ]
    )


def _rank(kind: Kind, share: float) -> tuple[int, float]:
    return ("near", "question", "row").index(kind), share


def _text_of(conversation: Conversation) -> str:
    if conversation.text is not None:
        return conversation.text
    return "\n".join(turn["content"] for turn in conversation.turns)


def _normalised(conversation: Conversation) -> tuple[str, list[str]]:
    """The normalised text of the whole conversation, and that up to each user turn."""
    if conversation.text is not None:
        return _normal(conversation.text), []
    questions, before = [], ""
    for turn in conversation.turns:
        before = f"{before} {_normal(turn['content'])}".lstrip()
        if turn["role"] == "user":
            questions.append(before)
    return before, questions


def _has_words(question: str, words: int) -> bool:
    """Whether a normalised question has so many words: what stands between spaces, or a character without them."""
    between = question.count(" ") + 1
    return between >= words or (not question.isascii() and between - 1 + len(unspaced(question)) >= words)


def _words(text: str) -> list[str]:
    return text.translate(_NOT_WORD).split() if text.isascii() else loose_words(text)


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())
