"""What a submitted job brings along: this package, the search space, and files of this machine that the space names."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ray_peft.errors import SpecError
from ray_peft.foundation import dotted
from ray_peft.spec import TrialSpec

MOST_MIB = 90
"""A Ray dashboard takes no more than 100 MiB in one piece."""
SECRETS = ".ray_peft_secrets.json"
"""The file of secrets inside the package."""


@contextlib.contextmanager
def package(space: Path, files: Sequence[Path], secrets: Mapping[str, str]) -> Iterator[Path]:
    """A folder to send, which is removed afterwards.

    Args:
        space: a search space; it lies at the top of the folder.
        files: files and folders below the current one, which keep their places.
        secrets: variables for the job's driver.

    Raises:
        SpecError: it is too large.
    """
    size = sum(_bytes(file) for file in files) / 2**20
    if size > MOST_MIB:
        names = ", ".join(str(file) for file in files)
        raise SpecError(
            f"{space}: names files of this machine of {size:.0f} MiB, more than the {MOST_MIB} MiB that a job can "
            f"bring along: {names}; copy them to storage that all nodes share, and give their absolute paths"
        )
    with tempfile.TemporaryDirectory(prefix="ray_peft_job_") as name:  # readable by this user alone
        folder = Path(name)
        source = Path(__file__).resolve().parents[1]
        shutil.copytree(source, folder / "ray_peft", ignore=shutil.ignore_patterns("__pycache__"))
        for file in files:
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.is_dir():
                shutil.copytree(file, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, target)
        shutil.copyfile(space, folder / space.name)
        if secrets:
            descriptor = os.open(folder / SECRETS, os.O_WRONLY | os.O_CREAT, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file_of_secrets:
                json.dump(dict(secrets), file_of_secrets)
        yield folder


def named_files(trials: Sequence[TrialSpec], texts: Sequence[str]) -> list[Path]:
    """The files and folders that trials name by a path from the current folder, if they are there.

    Args:
        trials: their paths are absolute by now.
        texts: where the paths were written; one that stands there as it is now was absolute then, and is no file to
            send.
    """
    here = Path.cwd()
    written = "\n".join(texts)
    leaves = {value for trial in trials for _, value in dotted.leaves(trial.plain()) if isinstance(value, str)}
    below = [leaf for leaf in sorted(leaves) if leaf.startswith(f"{here}{os.sep}") and leaf not in written]
    return [Path(leaf).relative_to(here) for leaf in below if Path(leaf).exists()]


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
