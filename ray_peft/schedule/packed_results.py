"""Prints a sweep's results as text, for `ray-peft fetch`: runs on the cluster by `python -c`, with Python alone."""

import base64
import io
import sys
import tarfile
from pathlib import Path

BEGIN, END, NOTHING = "ray_peft results begin", "ray_peft results end", "ray_peft results missing"
NAMES = ("sweep.json", "results.jsonl", "report.html", "report.md", "report.csv", "plots")
"""What is brought; trained weights stay where they are."""


def main(folder: Path) -> None:
    """Print a tar file with the results in `folder` between two marks, or that there are none."""
    there = [name for name in NAMES if (folder / name).exists()]
    if not there:
        print(NOTHING)
        return
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as tar:
        for name in there:
            tar.add(folder / name, name)
    print(BEGIN)
    print(base64.encodebytes(packed.getvalue()).decode(), end="")
    print(END)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
