"""The prepared rows for people to read: counts, JSON lines, and examples as the model sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ray_peft.foundation.whole import write_text
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.base import DataReport, SplitReport
from ray_peft.tasks.llm_sft.counts import SourceCounts, cautions, remarks
from ray_peft.tasks.llm_sft.data import ContaminationError, PreparedData, prepare
from ray_peft.tasks.llm_sft.encode import IGNORED
from ray_peft.tasks.llm_sft.overlap import Overlap, summary
from ray_peft.tasks.llm_sft.preference.rows import side_columns
from ray_peft.tasks.llm_sft.rendering import draw_all
from ray_peft.tasks.llm_sft.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 3
"""Training rows of each source in its example file."""


def report(spec: LlmTrialSpec) -> DataReport:
    """Prepare the rows of a trial and count them; an overlap that is refused is part of the report.

    Raises:
        DataError, ModelError: something is missing or malformed.
    """
    tokenizer = load_tokenizer(spec)
    try:
        prepared = prepare(spec, tokenizer)
    except ContaminationError as refused:
        return _report(spec, refused.counts, refused.overlap, None, str(refused))
    assert prepared.overlap is not None
    return _report(spec, prepared.counts, prepared.overlap, prepared, None)


def write(spec: LlmTrialSpec, folder: Path) -> list[Path]:
    """Write train.jsonl, test.jsonl, validation.jsonl if there is one, and examples/<source>_example.txt."""
    tokenizer = load_tokenizer(spec)
    prepared = prepare(spec, tokenizer)
    drawn = draw_all(spec.data, tokenizer, spec.train.loss == "answers")
    written = []
    for split, rows in _splits(prepared):
        conversations = {
            (source.source, row.number): row.conversation for source in drawn for row in getattr(source, split)
        }
        lines = []
        for row in rows:
            conversation = conversations[row["source_dataset"], row["row"]]
            line = {"source_dataset": row["source_dataset"], "row": row["row"], **conversation.plain()}
            line["rendered"] = _decoded(row["input_ids"], tokenizer)
            if "rejected_ids" in row:
                line["rendered_rejected"] = _decoded(row["rejected_ids"], tokenizer)
            lines.append(json.dumps(line, ensure_ascii=False))
        written.append(folder / f"{split}.jsonl")
        write_text(written[-1], "".join(f"{line}\n" for line in lines))
    examples = folder / "examples"
    examples.mkdir(exist_ok=True)
    for name, source in zip(_file_names([source.source for source in drawn]), drawn, strict=True):
        written.append(examples / f"{name}_example.txt")
        write_text(written[-1], _examples(prepared.train, source.source, tokenizer, spec.train.loss))
    return written


def _report(
    spec: LlmTrialSpec, counts: list[SourceCounts], overlap: Overlap, prepared: PreparedData | None, error: str | None
) -> DataReport:
    tokens = {} if prepared is None else {split: _tokens(rows, spec.train.loss) for split, rows in _splits(prepared)}
    splits = []
    for source in counts:
        for split, rows, cut in (
            ("train", source.train, source.train_cut),
            ("validation", source.validation, source.validation_cut),
            ("test", source.test, source.test_cut),
        ):
            if rows or split != "validation":
                train = split == "train"
                total, longest, trained = tokens.get(split, {}).get(source.source, (None, None, None))
                dropped, overlapping = (source.train_dropped, source.overlap_dropped) if train else (0, 0)
                splits.append(
                    SplitReport(source.source, split, rows, cut, dropped, overlapping, total, longest, trained)
                )
    settings = {
        "tokenizer": spec.model.tokenizer or spec.model.name,
        "seed": spec.data.seed,
        "max_length": spec.data.max_length,
        "too_long": spec.data.too_long,
        "loss": spec.train.loss,
    }
    return DataReport(
        key=None if prepared is None else prepared.key,
        settings=settings,
        read={source.source: source.read for source in counts},
        unusable={source.source: source.unusable for source in counts},
        unusable_rows={source.source: source.unusable_rows for source in counts},
        splits=splits,
        overlap=overlap.plain(),
        overlap_lines=_overlap_lines(overlap),
        error=error,
        remarks=[]
        if prepared is None
        else remarks(counts, spec.data, prepared.facts) + [f"caution: {text}" for text in cautions(prepared.facts)],
    )


def _overlap_lines(overlap: Overlap) -> list[str]:
    rule = f"{overlap.ngram}-grams, threshold {overlap.threshold:g}, action {overlap.action}"
    short = f"; {overlap.short_questions:,} more share a short question" if overlap.short_questions else ""
    return [f"{overlap.offending:,} training rows repeat held-out rows ({rule}){short}", *summary(overlap)]


def _splits(prepared: PreparedData) -> Iterator[tuple[str, Dataset]]:
    yield "train", prepared.train
    if prepared.validation is not None:
        yield "validation", prepared.validation
    yield "test", prepared.test


def _tokens(rows: Dataset, loss: str) -> dict[str, tuple[int, int, int]]:
    """Tokens, longest row and tokens with loss, by source; of pairs, of both sides."""
    by_source: dict[str, tuple[int, int, int]] = {}
    sides = [labels for _, labels in side_columns(rows)]
    for row in rows.select_columns(["source_dataset", *sides]):
        for labels in (row[side] for side in sides):
            total, longest, trained = by_source.get(row["source_dataset"], (0, 0, 0))
            trained += sum(_is_trained(label, loss) for label in labels)
            by_source[row["source_dataset"]] = total + len(labels), max(longest, len(labels)), trained
    return by_source


def _is_trained(label: int, loss: str) -> bool:
    return loss == "all" or label != IGNORED


def _examples(train: Dataset, source: str, tokenizer: PreTrainedTokenizerBase, loss: str) -> str:
    indices = [index for index, name in enumerate(train["source_dataset"]) if name == source][:EXAMPLES]
    parts = []
    for number, row in enumerate(train.select(indices), start=1):
        place = f"row {row['row']} of its file"
        parts.append(f"========== {source}: example {number} of {len(indices)}, {place} ==========")
        for side, (ids, labels) in zip(("", "rejected: "), side_columns(train), strict=False):
            tokens = zip(row[ids], row[labels], strict=True)
            for trained, run in groupby(tokens, key=lambda token: _is_trained(token[1], loss)):
                parts.append(f"---------- {side}{'trained on' if trained else 'not trained on'} ----------")
                parts.append(_decoded([token for token, _ in run], tokenizer))
    return "\n".join(parts) + "\n"


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _file_names(sources: list[str]) -> list[str]:
    """One name per source that any file system takes."""
    names = [re.sub(r"[^A-Za-z0-9._-]", "_", source).lstrip(".") or "source" for source in sources]
    return [f"{name}_{index}" if names.count(name) > 1 else name for index, name in enumerate(names, start=1)]
