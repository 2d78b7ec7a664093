"""Train a text trial's stages in this process, or in two data-parallel ones: run as a script, it is one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny

STEPS = 30


def plain_spec(engine: str, model: Path, rows: Path, method: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A trial of 30 steps: 8 rows each, the fifth of an epoch of five; 2 rows a pass."""
    sizes = {"train__steps": STEPS, "train__batch_size": 8, "train__micro_batch_size": 2, "train__engine": engine}
    plain = tiny.plain_spec(model, rows, method, **sizes | changes)
    plain["data"]["sources"][0]["train"] = 37  # five steps an epoch, the last of five rows
    return plain


def trained(plain: dict[str, Any], folder: Path) -> tuple[list[tuple[int, dict[str, float]]], list[Any], list[int]]:
    """The logged values by step, the trained weights at the end, and the tokens of each stage."""
    from ray_peft.spec import TrialSpec
    from ray_peft.tasks.llm_sft.task import LlmSft

    spec = TrialSpec.from_plain(plain)
    bench = LlmSft().load(spec, "cpu")
    log: list[tuple[int, dict[str, float]]] = []
    tokens, done = [], 0
    stages = spec.method.stages(bench.total_steps())
    for index, (stage, steps) in enumerate(stages):
        bench.attach(stage)
        outcome = bench.train(
            stage, steps, done, folder / str(index), lambda metrics, step: log.append((step, dict(metrics)))
        )
        tokens.append(outcome.tokens)
        done += steps
        if index < len(stages) - 1:
            bench.merge(stage)
    return log, [weight.detach().clone() for weight in bench.model.parameters() if weight.requires_grad], tokens


def trained_by_two(cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What `trained` gives for each named trial in the first of two data-parallel processes."""
    import torch

    (folder / "cases.json").write_text(json.dumps(cases, default=str), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    values: dict[str, Any] = torch.load(folder / "values.pt", weights_only=True)
    return values


def main() -> None:
    """Train the trials of `cases.json`, data-parallel; the first process writes `values.pt`."""
    import torch

    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    rank = torch.distributed.get_rank()
    values = {name: trained(plain, folder / f"{index}-{rank}") for index, (name, plain) in enumerate(cases.items())}
    if rank == 0:
        torch.save(values, folder / "values.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
