"""Rows of many lengths, and one thread: what tests of the text task share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Passes of a tiny model are faster without waiting for other threads."""
    with tiny.one_thread():
        yield


@pytest.fixture(scope="session")
def talkative(shared: Path) -> Path:
    """The folder of a tiny Llama whose answers depend on the prompt."""
    return tiny.build_model(shared / "talkative-llama", talkative=True)


@pytest.fixture(scope="session")
def uneven(shared: Path) -> Path:
    """Sixty rows of many lengths."""
    rows = [
        {"prompt": f"Say {index}." + " Please." * (index % 5), "completion": "word " * (index % 4 + 1) + str(index)}
        for index in range(60)
    ]
    return tiny.write_rows(shared / "uneven.jsonl", rows)


@pytest.fixture(scope="session")
def one_long_row(shared: Path) -> Path:
    """Rows of many lengths, of which one is by far the longest."""
    rows = [
        {"prompt": "Say it." + " Please." * (index % 5), "completion": "word " * (10 if index == 17 else index % 4 + 1)}
        for index in range(48)
    ]
    return tiny.write_rows(shared / "one_long_row.jsonl", rows)


@pytest.fixture(scope="session")
def half_scored() -> Any:
    """A Dataset of 21 tokenised rows of many lengths, the second half of each with loss."""
    import torch
    from datasets import Dataset

    draw = torch.Generator().manual_seed(0)
    rows = []
    for index in range(21):
        ids = torch.randint(3, 250, (5 + 11 * (index % 8),), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]})
    return Dataset.from_list(rows)
