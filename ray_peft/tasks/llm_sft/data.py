"""Rows -> token ids with answer labels, prepared once per content and kept on disk in Arrow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.errors import DataError, ModelError, first_line
from ray_peft.spec import DataSpec, LlmTrialSpec, is_local
from ray_peft.tasks.cache import cache_folder, made_whole
from ray_peft.tasks.llm_sft.content import data_key
from ray_peft.tasks.llm_sft.overlap import Gate, HeldOutRow, Overlap, refusal
from ray_peft.tasks.llm_sft.recipes import Conversation, Turn
from ray_peft.tasks.llm_sft.rows import DrawnRows, Row, draw

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FORMAT = 7
"""Raised when the preparation changes its result, so that older prepared data is not used again."""

IGNORED = -100
"""The label of a token without loss."""


@dataclass(frozen=True)
class SourceCounts:
    """What became of the rows of one source."""

    source: str
    read: int
    unusable: dict[str, int]
    train: int
    test: int
    train_cut: int
    """Training rows longer than the limit, of which the first tokens are kept."""
    train_dropped: int
    """Rows left out and replaced by the next ones drawn: over the limit, or with an answer that begins behind it."""
    test_cut: int
    """Test rows whose loss is measured on their first tokens only."""
    validation: int = 0
    validation_cut: int = 0
    """The same of validation rows."""
    validation_dropped: int = 0
    """Validation rows left out, without replacement: they repeat a test row of some source."""
    overlap_dropped: int = 0
    """Training rows left out and replaced by the next ones drawn: they repeat a held-out row of some source."""


class ContaminationError(DataError):
    """Training rows repeat held-out rows; carries what was found, for a report."""

    def __init__(self, text: str, counts: list[SourceCounts], overlap: Overlap) -> None:
        super().__init__(text)
        self.counts = counts
        self.overlap = overlap


@dataclass(frozen=True)
class PreparedData:
    """Tokenised rows of the splits; the same for every trial with the same `data` and tokenizer."""

    train: Dataset
    """Columns input_ids and labels (both lists of int, equally long), source_dataset, row (from 1, in its file)."""
    test: Dataset
    """The same, with prompt_ids (list of int), prompt and reference (text) in addition."""
    counts: list[SourceCounts]
    key: str
    """The content hash under which the rows are kept."""
    validation: Dataset | None = None
    """Columns as `test`: rows for choices made after training; null if no source sets any apart."""
    overlap: Overlap | None = None
    """Training rows that repeat held-out rows, found when the rows were prepared."""


@dataclass
class _Rows:
    """Columns under construction."""

    columns: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, **values: Any) -> None:
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)


def load_tokenizer(spec: LlmTrialSpec) -> PreTrainedTokenizerBase:
    """The tokenizer, with the chat template of the spec and padding on the left.

    Raises:
        ModelError: it cannot be loaded, or has no chat template.
    """
    from transformers import AutoTokenizer

    name = spec.model.tokenizer or spec.model.name
    if is_local(name) and not Path(name).is_dir():
        raise ModelError(f"model.{'tokenizer' if spec.model.tokenizer else 'name'}: {name}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=spec.model.revision, trust_remote_code=spec.model.trust_remote_code, padding_side="left"
        )
    except Exception as error:  # the hub client and tokenizers raise a dozen unrelated types
        raise ModelError(f"{name}: the tokenizer cannot be loaded: {first_line(error)}") from None
    if spec.data.chat_template is not None:
        template = Path(spec.data.chat_template)
        if not template.is_file():
            raise DataError(f"data.chat_template: {template}: no such file")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if not tokenizer.chat_template and any(source.recipe != "text" for source in spec.data.sources):
        raise ModelError(
            f"{name}: the tokenizer has no chat template, so conversations cannot be written for this model; "
            "use an instruction-tuned model, or name a .jinja file in data.chat_template"
        )
    # Longer rows are cut and counted here; the tokenizer's own warning about them would come before that.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def prepare(spec: LlmTrialSpec, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Tokenised rows from the cache, or made now and put there.

    Raises:
        DataError: a source is missing, malformed or too small.
        ContaminationError: training rows repeat held-out rows, and `data.contamination` says to fail.
    """
    answers_only = spec.train.loss == "answers"
    key = _content_key(spec.data, tokenizer, answers_only)
    folder = cache_folder() / "prepared" / key
    if not (folder / "counts.json").is_file():
        _build(spec.data, tokenizer, answers_only, folder)
    from datasets import load_from_disk

    counts = [SourceCounts(**each) for each in json.loads((folder / "counts.json").read_text(encoding="utf-8"))]
    train, test = load_from_disk(folder / "train"), load_from_disk(folder / "test")
    validation = load_from_disk(folder / "validation") if any(each.validation for each in counts) else None
    overlap = Overlap.from_plain(json.loads((folder / "overlap.json").read_text(encoding="utf-8")))
    return PreparedData(train, test, counts, key, validation, overlap)


def notes(prepared: PreparedData, data: DataSpec) -> list[str]:
    """One sentence per source: rows kept, cut, dropped and unusable; and one on rows that repeat held-out ones."""
    found = []
    for each in prepared.counts:
        limit = f"{data.max_length} tokens"
        counted = (
            (each.validation, "{} validation rows"),
            (each.train_cut, f"{{}} training rows longer than {limit} cut"),
            (each.train_dropped, f"{{}} rows longer than {limit} left out"),
            (each.test_cut, f"the loss of {{}} longer held-out rows is that of their first {limit}"),
            (each.validation_dropped, "{} validation rows left out that repeat test rows"),
            (each.validation_cut, f"{{}} validation rows longer than {limit} cut"),
            (each.overlap_dropped, "{} training rows left out that repeat held-out rows"),
        )
        text = f"{each.source}: {each.train} training and {each.test} held-out rows of {each.read} read"
        text += "".join(f"; {words.format(count)}" for count, words in counted if count)
        for reason, count in sorted(each.unusable.items()):
            text += f"; {count} unusable rows ({reason})"
        found.append(text)
    if prepared.overlap is not None and prepared.overlap.action == "allow" and prepared.overlap.offending:
        found.append(
            f"{prepared.overlap.offending} training rows repeat held-out rows and are trained on "
            "(data.contamination: allow): scores measure memory in part"
        )
    return found


def _content_key(data: DataSpec, tokenizer: PreTrainedTokenizerBase, answers_only: bool) -> str:
    return data_key(FORMAT, data, tokenizer, answers_only)


def _build(data: DataSpec, tokenizer: PreTrainedTokenizerBase, answers_only: bool, folder: Path) -> None:
    """Write the prepared rows into `folder`."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    splits = {"train": _Rows(), "test": _Rows(), "validation": _Rows()}
    drawn = [draw(source, data.seed) for source in data.sources]
    drawn = [_apart_from_test(each, drawn, data) for each in drawn]
    gate = _gate(drawn, data)
    counts = [_add_source(each, data, tokenizer, answers_only, splits, gate) for each in drawn]
    overlap = gate.overlap()
    if overlap.offending and data.contamination.action == "fail":
        raise ContaminationError(refusal(overlap), counts, overlap)
    if not any(source.validation for source in data.sources):
        del splits["validation"]
    with made_whole(folder, "counts.json") as partial:
        for name, rows in splits.items():
            if not rows.columns:
                raise DataError(f"data: no {name} row has an answer within max_length ({data.max_length}) tokens")
            # The second shuffle: each source's rows were drawn in a seeded order, and here the sources are mixed.
            shuffled = Dataset.from_dict(rows.columns).shuffle(seed=data.seed).flatten_indices()
            shuffled.save_to_disk(partial / name)
        (partial / "overlap.json").write_text(json.dumps(overlap.plain()), encoding="utf-8")
        (partial / "counts.json").write_text(json.dumps([asdict(each) for each in counts]), encoding="utf-8")


def _apart_from_test(source: DrawnRows, drawn: Sequence[DrawnRows], data: DataSpec) -> DrawnRows:
    """The source without validation rows that repeat a test row, which would tune on what is scored."""
    if not source.validation or data.contamination.action == "allow":
        return source
    tested = [HeldOutRow(each.source, "test", row) for each in drawn for row in each.test]
    gate = Gate(tested, source.validation, data.contamination)
    kept = [row for row in source.validation if not gate.offends(source.source, row)]
    if not kept:
        raise DataError(
            f"data: every validation row of source {source.source} repeats a test row; give other rows, or set "
            "data.contamination: {action: allow} knowingly"
        )
    return replace(source, validation=kept, validation_dropped=len(source.validation) - len(kept))


def _gate(drawn: Sequence[DrawnRows], data: DataSpec) -> Gate:
    """What training rows of all sources are held against."""
    held_out = [
        HeldOutRow(each.source, split, row)
        for each in drawn
        for split, rows in (("test", each.test), ("validation", each.validation))
        for row in rows
    ]
    likely = chain.from_iterable(each.train[: each.train_count] for each in drawn)
    return Gate(held_out, likely, data.contamination)


def _add_source(
    drawn: DrawnRows,
    data: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    answers_only: bool,
    splits: Mapping[str, _Rows],
    gate: Gate,
) -> SourceCounts:
    train_cut = train_dropped = overlap_dropped = kept = 0
    for row in drawn.train:
        if kept == drawn.train_count:
            break
        ids, labels = encode(row.conversation, tokenizer)
        short = labels[: data.max_length]
        unanswered = answers_only and all(label == IGNORED for label in short)
        if unanswered or (len(ids) > data.max_length and data.too_long == "drop"):
            train_dropped += 1
            continue
        if gate.offends(drawn.source, row) and data.contamination.action == "drop":
            overlap_dropped += 1
            continue
        train_cut += len(ids) > data.max_length
        kept += 1
        splits["train"].add(input_ids=ids[: data.max_length], labels=short, source_dataset=drawn.source, row=row.number)
    if drawn.train_count is not None and kept < drawn.train_count:
        repeating = f" that repeat no held-out row ({overlap_dropped} do)" if overlap_dropped else ""
        raise DataError(
            f"data: source {drawn.source} has {kept} training rows within max_length ({data.max_length}) tokens"
            f"{repeating}, but train: {drawn.train_count} are asked for; {drawn.train_count - kept} short: lower "
            "`train`, or raise data.max_length"
        )
    test_cut = _add_held_out(drawn.test, drawn.source, data, tokenizer, splits["test"])
    validation_cut = _add_held_out(drawn.validation, drawn.source, data, tokenizer, splits["validation"])
    return SourceCounts(
        drawn.source,
        drawn.read,
        dict(drawn.unusable),
        train=kept,
        test=len(drawn.test),
        train_cut=train_cut,
        train_dropped=train_dropped,
        test_cut=test_cut,
        validation=len(drawn.validation),
        validation_cut=validation_cut,
        validation_dropped=drawn.validation_dropped,
        overlap_dropped=overlap_dropped,
    )


def _add_held_out(
    drawn: Sequence[Row], source: str, data: DataSpec, tokenizer: PreTrainedTokenizerBase, rows: _Rows
) -> int:
    """Add test or validation rows; returns how many are longer than the limit."""
    cut = 0
    for row in drawn:
        ids, labels = encode(row.conversation, tokenizer)
        cut += len(ids) > data.max_length
        rows.add(
            input_ids=ids[: data.max_length],
            labels=labels[: data.max_length],
            source_dataset=source,
            row=row.number,
            **_question(row.conversation, tokenizer),
        )
    return cut


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation, and its labels: the answers' tokens with their end-of-turn, else IGNORED.

    The answers are found in the rendered text, so any template serves that only appends as turns are added.

    Raises:
        ModelError: the chat template rewrites earlier turns.
    """
    if conversation.text is not None:
        ids = tokenizer(conversation.text)["input_ids"] + [tokenizer.eos_token_id]
        return ids, list(ids)
    turns = list(conversation.turns)
    text = _render(turns, tokenizer)
    spans = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        begin = _render(turns[:index], tokenizer, generation_prompt=True)
        end = _render(turns[: index + 1], tokenizer)
        if not (text.startswith(end) and end.startswith(begin)):
            raise ModelError(
                f"{tokenizer.name_or_path}: the chat template rewrites earlier turns, so the answers' tokens cannot be "
                "told apart; use train rows with one answer, or another template in data.chat_template"
            )
        spans.append((len(begin), len(end.rstrip())))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(begin < stop and start < end for begin, end in spans) and stop > start else IGNORED
        for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return encoded["input_ids"], labels


def _question(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if conversation.text is not None:
        return {"prompt_ids": [], "prompt": "", "reference": ""}
    *before, answer = conversation.turns
    text = _render(before, tokenizer, generation_prompt=True)
    return {
        "prompt_ids": tokenizer(text, add_special_tokens=False)["input_ids"],
        "prompt": before[-1]["content"] if len(before) == 1 else _transcript(before),
        "reference": answer["content"],
    }


def _transcript(turns: Sequence[Turn]) -> str:
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _render(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, generation_prompt: bool = False) -> str:
    text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=generation_prompt)
    return str(text)
