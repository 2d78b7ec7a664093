"""What every benchmark result says about itself: GPU, date, versions, command."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray_peft.trial.provenance import git_commit, versions


def command(arguments: list[str]) -> str:
    """The command; an absolute path, which is one of this machine, is shortened to its name."""
    return " ".join(["python", *(re.sub(r"(^|=)/(.*/)?(?=.)", r"\1", argument) for argument in arguments)])


def write(path: Path, measured: dict[str, Any]) -> None:
    """Write `measured` with its provenance as JSON, and print it."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    result = {
        "command": command(sys.argv),
        "date": datetime.now(UTC).date().isoformat(),
        "gpus": gpus,
        "versions": versions(),
        "git_commit": git_commit(),
        **measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
