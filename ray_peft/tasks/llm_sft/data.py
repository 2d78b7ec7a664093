"""Rows -> token ids with answer labels, prepared once per content and kept on disk in Arrow."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ray_peft.errors import DataError
from ray_peft.foundation.cache import made_whole
from ray_peft.spec import DataSpec, LlmTrialSpec
from ray_peft.tasks.llm_sft import counts as counting
from ray_peft.tasks.llm_sft.content import data_key, prepared_folder
from ray_peft.tasks.llm_sft.conversation import Conversation, Unusable
from ray_peft.tasks.llm_sft.counts import SourceCounts, TokenFacts, numbered
from ray_peft.tasks.llm_sft.encode import IGNORED as IGNORED  # read by all that reads prepared rows
from ray_peft.tasks.llm_sft.encode import Encoded, Encoder
from ray_peft.tasks.llm_sft.overlap import Gate, HeldOutRow, Overlap, refusal
from ray_peft.tasks.llm_sft.preference.rows import trained_rows
from ray_peft.tasks.llm_sft.rendering import draw_all
from ray_peft.tasks.llm_sft.rows import DrawnRows, Row
from ray_peft.tasks.llm_sft.turns import CannotWrite, frame, messages, prints_the_date

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

FORMAT = 8
"""Raised when the preparation changes its result, so that older prepared data is not used again."""


class ContaminationError(DataError):
    """Training rows repeat held-out rows; carries the counts and the overlap, for a report."""

    def __init__(self, text: str, counts: list[SourceCounts], overlap: Overlap) -> None:
        super().__init__(text)
        self.counts = counts
        self.overlap = overlap


@dataclass(frozen=True)
class PreparedData:
    """Tokenised rows of the splits; the same for every trial with the same `data` and tokenizer."""

    train: Dataset
    """Columns input_ids and labels (both lists of int, equally long), source_dataset, row (from 1, in its file). Of
    pairs these are the chosen side, and rejected_ids and rejected_labels the other; labelled rows have `desirable`."""
    test: Dataset
    """The same, with prompt_ids (list of int), prompt and reference (text) in addition."""
    counts: list[SourceCounts]
    key: str
    """The content hash under which the rows are kept."""
    facts: TokenFacts
    """What must fit the model, and what the chat template does."""
    validation: Dataset | None = None
    """Columns as `test`: rows for choices made after training; None if no source has any."""
    overlap: Overlap | None = None
    """Training rows that repeat held-out rows, found when the rows were prepared."""

    def held_out(self, split: Literal["test", "validation"]) -> Dataset:
        """The rows that a trial is scored on; LlmTrialSpec.problems() asks for validation rows where they are."""
        rows = self.test if split == "test" else self.validation
        assert rows is not None
        return rows


@dataclass
class _Rows:
    """Columns under construction."""

    columns: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, **values: Any) -> None:
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)


def prepare(spec: LlmTrialSpec, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Tokenised rows from the cache, or made now and put there.

    Raises:
        DataError: a source is missing, malformed or too small.
        ContaminationError: training rows repeat held-out rows, and `data.contamination` says to fail.
    """
    answers_only = spec.train.loss == "answers"
    key = _content_key(spec.data, tokenizer, answers_only)
    folder = prepared_folder(spec.data, key)
    if not (folder / "counts.json").is_file():
        _build(spec.data, tokenizer, answers_only, folder)
    from datasets import load_from_disk

    counts = [SourceCounts(**plain) for plain in json.loads((folder / "counts.json").read_text(encoding="utf-8"))]
    train, test = trained_rows(spec, load_from_disk(folder / "train")), load_from_disk(folder / "test")
    validation = load_from_disk(folder / "validation") if any(source.validation for source in counts) else None
    overlap = Overlap.from_plain(json.loads((folder / "overlap.json").read_text(encoding="utf-8")))
    facts = TokenFacts(**json.loads((folder / "facts.json").read_text(encoding="utf-8")))
    return PreparedData(train, test, counts, key, facts, validation, overlap)


def notes(prepared: PreparedData, data: DataSpec) -> list[str]:
    """How many rows of each source are used, how they became tokens, and which of them repeat held-out ones."""
    sentences = [*counting.notes(prepared.counts, data), *counting.remarks(prepared.counts, data, prepared.facts)]
    if prepared.overlap is not None and prepared.overlap.action == "allow" and prepared.overlap.offending:
        sentences.append(
            f"{prepared.overlap.offending} training rows repeat held-out rows and are trained on "
            "(data.contamination: allow): scores measure memory in part"
        )
    return sentences


def _content_key(data: DataSpec, tokenizer: PreTrainedTokenizerBase, answers_only: bool) -> str:
    return data_key(FORMAT, data, tokenizer, answers_only)


def _build(data: DataSpec, tokenizer: PreTrainedTokenizerBase, answers_only: bool, folder: Path) -> None:
    """Write the prepared rows into `folder`."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    drawn = draw_all(data, tokenizer, answers_only)
    drawn = [_without_test_repeats(source, drawn, data) for source in drawn]
    gate = _gate(drawn, data)
    building = _Building(data, Encoder(tokenizer, data.template_date, data.special_tokens), answers_only, gate)
    counts = [building.add(source) for source in drawn]
    overlap = gate.overlap()
    if overlap.offending and data.contamination.action == "fail":
        raise ContaminationError(refusal(overlap), counts, overlap)
    splits = building.splits
    if not any(source.validation for source in data.sources):
        del splits["validation"]
    for name, rows in splits.items():
        if not rows.columns:
            raise DataError(_empty_split(name, data, counts, drawn))
    facts = _facts(tokenizer, building, drawn)
    with made_whole(folder, "counts.json") as partial:
        for name, rows in splits.items():
            # The second shuffle: each source's rows were drawn in a seeded order, and here the sources are mixed.
            shuffled = Dataset.from_dict(rows.columns).shuffle(seed=data.seed).flatten_indices()
            shuffled.save_to_disk(partial / name)
        (partial / "overlap.json").write_text(json.dumps(overlap.plain()), encoding="utf-8")
        (partial / "facts.json").write_text(json.dumps(asdict(facts)), encoding="utf-8")
        (partial / "counts.json").write_text(json.dumps([asdict(source) for source in counts]), encoding="utf-8")


def _empty_split(split: str, data: DataSpec, counts: Sequence[SourceCounts], drawn: Sequence[DrawnRows]) -> str:
    """Why a split is empty."""
    unscored = [
        f"; the answer begins after that: {source.source}, {numbered(source.unscored[split])}"
        for source in counts
        if split in source.unscored
    ]
    unusable = [source.left_out.clause() for source in drawn]
    return (
        f"data: no {split} row has an answer within max_length ({data.max_length}) tokens{''.join(unscored)}; give "
        f"other rows, or raise data.max_length{''.join(unusable)}"
    )


def _facts(tokenizer: PreTrainedTokenizerBase, building: _Building, drawn: Sequence[DrawnRows]) -> TokenFacts:
    """Facts about all rows together; there must be at least one row."""
    template = building.encoder.template
    chats = [row.conversation for source in drawn for row in source.train[:1] if row.conversation.text is None]
    around = frame(template) if chats else None
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    return TokenFacts(
        vocabulary=len(tokenizer),
        largest=building.largest,
        largest_name=str(tokenizer.convert_ids_to_tokens(building.largest)),
        pad=pad,
        pad_name=str(tokenizer.pad_token),
        longest=building.longest,
        end=None if around is None else around.end,
        lead="" if around is None else around.lead,
        dated=bool(chats) and prints_the_date(messages(chats[0]), template, chats[0].tools),
    )


def _without_test_repeats(source: DrawnRows, drawn: Sequence[DrawnRows], data: DataSpec) -> DrawnRows:
    """The source without validation rows that repeat a test row: choices made on them would be made on the test."""
    if not source.validation or data.contamination.action == "allow":
        return source
    tested = [HeldOutRow(other.source, "test", row) for other in drawn for row in other.test]
    gate = Gate(tested, source.validation, data.contamination)
    rows = [row for row in source.validation if not gate.offends(source.source, row)]
    if not rows:
        raise DataError(
            f"data: every validation row of source {source.source} repeats a test row; give other rows, or set "
            f"data.contamination: {{action: allow}} knowingly{source.left_out.clause()}"
        )
    return replace(source, validation=rows, validation_dropped=len(source.validation) - len(rows))


def _gate(drawn: Sequence[DrawnRows], data: DataSpec) -> Gate:
    """The held-out rows of all sources, with which training rows are compared."""
    held_out = [
        HeldOutRow(source.source, split, row)
        for source in drawn
        for split, rows in (("test", source.test), ("validation", source.validation))
        for row in rows
    ]
    likely = chain.from_iterable(source.train[: source.train_count] for source in drawn)
    return Gate(held_out, likely, data.contamination)


@dataclass
class _Building:
    """The splits while rows are added to them, source after source."""

    data: DataSpec
    encoder: Encoder
    answers_only: bool
    gate: Gate
    splits: dict[str, _Rows] = field(
        default_factory=lambda: {"train": _Rows(), "test": _Rows(), "validation": _Rows()},
    )
    largest: int = 0
    """The largest token number so far."""
    longest: int = 0
    """Tokens of the longest row or prompt so far."""
    unscored: dict[str, list[int]] = field(default_factory=dict)
    """Counts of the source that is being added, as in SourceCounts; so are the next three."""
    unsound: Counter[str] = field(default_factory=Counter)
    typed: Counter[str] = field(default_factory=Counter)
    typed_rows: int = 0

    def add(self, drawn: DrawnRows) -> SourceCounts:
        """Add the rows of a source.

        Raises:
            DataError: it has too few, or a row that the chat template or tokenizer fails on.
        """
        self.unscored, self.unsound, self.typed, self.typed_rows = {}, Counter(), Counter(), 0
        train, train_cut, train_dropped, overlap_dropped = self._add_train(drawn)
        test, test_cut = self._add_held_out(drawn, "test", drawn.test)
        validation, validation_cut = self._add_held_out(drawn, "validation", drawn.validation)
        return SourceCounts(
            drawn.source,
            drawn.read,
            dict(drawn.unusable),
            train=train,
            test=test,
            train_cut=train_cut,
            train_dropped=train_dropped,
            test_cut=test_cut,
            validation=validation,
            validation_cut=validation_cut,
            validation_dropped=drawn.validation_dropped,
            overlap_dropped=overlap_dropped,
            unscored=self.unscored,
            unsound=dict(self.unsound),
            typed=dict(self.typed),
            typed_rows=self.typed_rows,
            unusable_rows=drawn.left_out.named(),
        )

    def _add_train(self, drawn: DrawnRows) -> tuple[int, int, int, int]:
        """Training rows added, cut, left out for their length, and for repeating held-out rows."""
        data = self.data
        added = cut = dropped = repeating = 0
        for row in drawn.train:
            if added == drawn.train_count:
                break
            encoded = self._encode_or_leave_out(self.encoder.row, row, drawn)
            if encoded is None:
                continue
            paired, cut_off = encoded.rejected is not None, encoded.longest > data.max_length
            if (self.answers_only or paired) and encoded.problem is not None and encoded.unlabelled():
                _leave_out(drawn, encoded.problem, row)
                continue
            unanswered = (self.answers_only or paired) and encoded.unlabelled(data.max_length)
            if unanswered or (cut_off and data.too_long == "drop"):
                dropped += 1
                continue
            if self.gate.offends(drawn.source, row) and data.contamination.action == "drop":
                repeating += 1
                continue
            cut += cut_off
            added += 1
            self.unsound.update(encoded.unsound if self.answers_only else {})
            self._append("train", drawn.source, row, encoded)
        if drawn.train_count is not None and added < drawn.train_count:
            raise DataError(self._too_few(drawn, added, repeating))
        return added, cut, dropped, repeating

    def _too_few(self, drawn: DrawnRows, added: int, repeating: int) -> str:
        but = f" that repeat no held-out row ({repeating} do)" if repeating else ""
        return (
            f"data: source {drawn.source} has {added} training rows within max_length ({self.data.max_length}) tokens"
            f"{but}, but train: {drawn.train_count} are asked for; {(drawn.train_count or 0) - added} short: lower "
            f"`train`, or raise data.max_length{drawn.left_out.clause()}"
        )

    def _add_held_out(self, drawn: DrawnRows, split: str, rows: Sequence[Row]) -> tuple[int, int]:
        """Test or validation rows added, and how many of them are longer than the limit."""
        added = cut = 0
        for row in rows:
            encoded = self._encode_or_leave_out(self.encoder.row, row, drawn)
            if encoded is None:
                continue
            if encoded.problem is not None:
                _leave_out(drawn, encoded.problem, row)
                continue
            if encoded.unlabelled(self.data.max_length):
                self.unscored.setdefault(split, []).append(row.number)
                continue
            question = self._encode_or_leave_out(self.encoder.question, row, drawn)
            if question is None:
                continue
            added += 1
            cut += encoded.longest > self.data.max_length
            self._measure(question["prompt_ids"])
            self._append(split, drawn.source, row, encoded, **question)
        return added, cut

    def _encode_or_leave_out(self, encode: Callable[[Conversation], T], row: Row, drawn: DrawnRows) -> T | None:
        """The result of `encode` for a row; None if the row is unusable, which is counted.

        Raises:
            DataError: the chat template or the tokenizer fails on it, and such rows are not skipped.
        """
        try:
            return encode(row.conversation)
        except Unusable as reason:
            _leave_out(drawn, str(reason), row)
        except CannotWrite as error:
            if self.data.unusable == "fail":
                raise DataError(
                    f"{row.file}: row {row.number}: {error}; or leave such rows out with data.unusable: skip"
                ) from None
            _leave_out(drawn, error.reason, row)
        return None

    def _measure(self, ids: Sequence[int]) -> None:
        self.largest, self.longest = max(self.largest, *ids, 0), max(self.longest, len(ids))

    def _append(self, split: str, source: str, row: Row, encoded: Encoded, **question: Any) -> None:
        limit = self.data.max_length
        ids, labels = encoded.ids[:limit], encoded.labels[:limit]
        self._measure(ids)
        self.typed.update(encoded.typed)
        self.typed_rows += bool(encoded.typed)
        judged: dict[str, Any] = {}
        if encoded.rejected is not None:
            judged = {"rejected_ids": encoded.rejected.ids[:limit], "rejected_labels": encoded.rejected.labels[:limit]}
            self._measure(judged["rejected_ids"])
        if row.conversation.desirable is not None:
            judged = {"desirable": row.conversation.desirable}
        self.splits[split].add(
            input_ids=ids, labels=labels, source_dataset=source, row=row.number, **judged, **question
        )


def _leave_out(drawn: DrawnRows, reason: str, row: Row) -> None:
    """Count a row that cannot be used among those of its source."""
    drawn.left_out.add(reason, "" if any(row.file == first.file for first in drawn.train[:1]) else row.file, row.number)
