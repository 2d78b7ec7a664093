"""What a comparison has decided and spent so far, in its folder: the same command goes on from there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ray_peft.compare.budget import Plan
from ray_peft.errors import SpecError, StorageError
from ray_peft.foundation.storage import error_line
from ray_peft.foundation.whole import write_text

FILE = "compare.json"


@dataclass
class Journal:
    """The content of `compare.json`."""

    folder: Path
    request: dict[str, Any]
    """What the user asked for; another question needs another folder."""
    plan: Plan | None = None
    """None before the speeds were measured."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a method is not compared, by its name."""
    metric: str | None = None
    """What decides the answer; None before the rows were looked at."""
    on_gpu: bool = False
    """Whether its trials run on a GPU."""
    steps_of_an_epoch: int = 0
    """Of all rows that may be trained on."""
    spent_s: dict[str, float] = field(default_factory=dict)
    """Wall seconds by rung, over all calls."""

    def write(self) -> None:
        """Keep it.

        Raises:
            StorageError: the system refuses.
        """
        plain = {name: value for name, value in asdict(self).items() if name != "folder"}
        path = self.folder / FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise StorageError(f"--out {self.folder}: {error_line(error, path)}") from None

    @contextmanager
    def timed(self, rung: str) -> Iterator[None]:
        """Add the seconds spent inside to those of a rung."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.spent_s[rung] = self.spent_s.get(rung, 0.0) + time.monotonic() - begin
            if self.folder.is_dir():  # a wrong argument leaves none
                self.write()

    @property
    def whole_s(self) -> float:
        """Seconds spent by now."""
        return sum(self.spent_s.values())


def opened(folder: Path, request: dict[str, Any]) -> Journal:
    """The journal of a folder, or a new one.

    Raises:
        SpecError: the folder holds another comparison, or the file is none of ours.
    """
    path = folder / FILE
    if not path.is_file():
        return Journal(folder, request)
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        plan = Plan(**plain.pop("plan")) if plain["plan"] is not None else plain.pop("plan")
        journal = Journal(folder, plan=plan, **plain)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise SpecError(f"{path}: is no record of a comparison ({error}); give another --out, or remove it") from None
    if journal.plan is None:  # the time was too short, or the measuring was interrupted
        return Journal(folder, request)
    for name, value in request.items():
        if journal.request.get(name) != value:
            raise SpecError(
                f"--out {folder}: holds a comparison with {name} {journal.request.get(name)!r} (now {value!r}); give "
                "another --out, or ask as before"
            )
    return journal
