"""Values of the command line that several commands take."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ray_peft.foundation.masking import mask_address


def steps(text: str) -> tuple[int, ...]:
    """Steps from a comma-separated list."""
    return tuple(count(part.strip()) for part in text.split(","))


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0 (found {text!r})")
    return number


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0 (found {text!r})")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    """Names from a comma-separated list."""
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise argparse.ArgumentTypeError(f"must be names with a comma between two of them (found {text!r})")
    return parts


def sweep_folder(text: str) -> Path:
    """The folder of a sweep; of one whose results go to a URL, the folder of this machine that stands for it.

    Raises:
        SpecError: this machine has none for the URL.
    """
    from ray_peft.store.places import folder_of, is_remote
    from ray_peft.store.remote import is_url

    if not is_url(text):
        return Path(text)
    from ray_peft.errors import SpecError
    from ray_peft.schedule.experiment import outputs_folder

    folder = folder_of(text, outputs_folder())
    if is_remote(text) and not folder.is_dir():
        shown = mask_address(text)
        raise SpecError(f"{shown}: this machine has no copy of it; `ray-peft report {shown}` makes one in {folder}")
    return folder


def add_settings(command: argparse.ArgumentParser) -> None:
    """Add --profile and --set to a command that reads a search space."""
    command.add_argument("--profile", metavar="NAME", help="a profile of the file, such as 12gib")
    command.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="replace a setting of the file, such as --set train.steps=20; may be repeated",
    )  # fmt: skip


def add_fresh(command: argparse.ArgumentParser) -> None:
    """Add --fresh to a command that runs a sweep."""
    command.add_argument("--fresh", action="store_true", help="run finished trials again")


def add_gpu_memory(command: argparse.ArgumentParser) -> None:
    """Add --gpu-memory-gib to a command that runs trials."""
    command.add_argument(
        "--gpu-memory-gib", type=positive, metavar="GIB",
        help="treat every GPU as if it had this much memory: trials are placed for it and cannot take more",
    )  # fmt: skip


def add_tracking(command: argparse.ArgumentParser) -> None:
    """Add --tracking-uri to a command that reads or writes MLflow runs."""
    command.add_argument("--tracking-uri", help="MLflow store; default: MLFLOW_TRACKING_URI, else outputs/mlflow.db")


def add_trust(command: argparse.ArgumentParser) -> None:
    """Add --trust-remote-code to a command that loads the model of an MLflow run."""
    command.add_argument(
        "--trust-remote-code", action="store_true",
        help="run Python code that the MLflow run's model or benchmarks bring; such a run is refused without it",
    )  # fmt: skip
