"""Rows of many lengths, and one thread: what tests of the training of text share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Passes of a tiny model are faster without waiting for each other."""
    with tiny.one_thread():
        yield


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
