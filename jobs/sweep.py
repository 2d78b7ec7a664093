"""Entrypoint of `ray job submit --working-dir . -- python jobs/sweep.py SPACE.yaml [options of ray-peft sweep]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ray_peft.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
