"""Trials of one worker, and of two that hold a part of the model each: run as a script, it is one of these."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cramped import holds
from untracked import Notes

from ray_peft.spec import TrialSpec
from ray_peft.trial import trial
from ray_peft.trial.result import RESULT_FILE, TrialResult


class Keeping(Notes):
    """A tracker that leaves what was trained where it is."""

    def artifact(self, path, folder, *, remove=False):
        super().artifact(path, folder)


def attempt(spec: TrialSpec, folder: Path, stop_at: int | None = None, **place: int) -> TrialResult | None:
    """One attempt, stopped where the loss of step `stop_at` is logged; its row."""

    def progress(metrics, step):
        if "train_loss" in metrics and step == stop_at:
            raise KeyboardInterrupt

    return trial.run(spec, trial.Place(folder, "cpu", **place), Keeping(), progress)


def by_two_workers(
    specs: dict[str, TrialSpec], folder: Path, stopped: dict[str, int], cramped: dict[str, int]
) -> dict[str, TrialResult]:
    """The rows of trials that two processes run, by name; their folders lie in `folder`.

    Args:
        specs: the trials.
        folder: it is made.
        stopped: by name, the step at which a trial is stopped once, to go on from its checkpoint.
        cramped: by name, the rows of a training pass that the second process has memory for.
    """
    folder.mkdir(parents=True)
    plain = {name: [spec.plain(), stopped.get(name), cramped.get(name)] for name, spec in specs.items()}
    (folder / "specs.json").write_text(json.dumps(plain), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-6000:]
    rows = {name: (folder / name / RESULT_FILE).read_text(encoding="utf-8") for name in specs}
    return {name: TrialResult.model_validate_json(row) for name, row in rows.items()}


def _work(folder: Path) -> None:
    """What each of the two workers does."""
    import torch

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for name, (plain, stop_at, most) in json.loads((folder / "specs.json").read_text(encoding="utf-8")).items():
        for step in (None,) if stop_at is None else (stop_at, None):
            with contextlib.suppress(KeyboardInterrupt), _holds(most if rank == 1 else None):
                attempt(TrialSpec.from_plain(plain), folder / name, step, rank=rank, num_workers=2)
            torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _holds(rows: int | None) -> Iterator[None]:
    """Inside, training passes of more than so many rows run out of memory."""
    from ray_peft.tasks.llm_sft.bench import LlmBench

    train = LlmBench.train
    if rows is not None:

        def cramped_train(bench, *arguments):
            with holds(bench.model, rows):
                return train(bench, *arguments)

        LlmBench.train = cramped_train
    try:
        yield
    finally:
        LlmBench.train = train


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
