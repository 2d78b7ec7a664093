"""`ray-peft plan` says what a sweep gives Tune: which GPUs, cores and settings each trial gets, and in which order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from ray_peft import cli

ROOT = Path(__file__).parents[2]

SWEEPS = """
import json, sys
import ray
import ray_peft
from ray_peft.schedule import tune

given = []


def heard(events, callback=tune._callback):
    rows = callback(events)
    begin = rows.on_trial_start

    def on_trial_start(iteration, trials, trial):
        for each in trials:  # all that Tune knows, in its order
            task = events.resolve(each.config)
            for spec, demand in task.trials if task.member is None else []:
                given[-1].setdefault(spec.trial_id, {
                    "bundles": each.placement_group_factory.bundles,
                    "num_workers": demand.num_workers,
                    "cpus_per_worker": demand.cpus_per_worker,
                    "gpu_fraction": demand.gpus_per_worker,
                    "chosen": dict(demand.chosen),
                    "pack": task.hosts * [member.trial_id for member in task.specs],
                })
        begin(iteration=iteration, trials=trials, trial=trial)

    rows.on_trial_start = on_trial_start
    return rows


tune._callback = heard
ray.init(num_cpus=8, num_gpus=2, include_dashboard=False)
for name, memory in json.loads(sys.argv[1]):
    given.append({})
    ray_peft.sweep(f"{name}.yaml", out=name, gpu_memory_gib=memory)
ray.shutdown()
print(json.dumps(given))
"""
"""Sweeps on two GPUs of which Ray is only told: it places trials there, and each ends where torch looks for one."""

RANKS = [{"name": "lora", "rank": rank} for rank in (2, 4, 6, 8, 10)]
METHODS = [{"name": "lora", "rank": 4}, {"name": "full"}, {"name": "lora", "rank": 64}]
SPACES = {
    "shared": ({"resources": {}, "train__micro_batch_size": 8, "method": {"grid": METHODS}}, 2.0),
    "fitted": ({"resources": {}, "train__fit": "auto", "method": {"grid": METHODS}}, 2.0),
    "cramped": ({"resources": {"cpus_per_worker": 3}, "train__micro_batch_size": 256}, 0.9),
    "halves": ({"resources": {"gpus_per_worker": 0.5}, "train__fit": "auto"}, 2.0),
    "packs": (
        {
            "resources": {},
            "train__pack": "auto",
            "train__micro_batch_size": 8,
            "train__batch_size": 8,
            "method": {"grid": [{"name": "full"}, *RANKS]},
        },
        2.0,
    ),
    "cpu": ({"resources": {"gpus_per_worker": 0}, "train__fit": "auto", "train__batch_size": 8}, 2.0),
}
"""Search spaces, and what trials may take of a GPU [GiB]."""


@pytest.mark.long
def test_a_plan_says_what_a_sweep_gives_tune(tiny_model, questions, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    planned = []
    for name, (changes, memory) in SPACES.items():
        changes = {"train__batch_size": 256, "train__steps": 1, **changes}
        plain = {"name": name, **tiny.plain_spec(tiny_model, questions, **changes)}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(plain), encoding="utf-8")
        machine = ["--gpu-memory-gib", str(memory), "--gpus", "2", "--cpus", "8"]
        assert cli.main(["plan", f"{name}.yaml", "--json", *machine]) == 0
        planned.append(sorted(json.loads(capsys.readouterr().out), key=lambda row: row["order"]))
    sweeps = json.dumps([(name, memory) for name, (_, memory) in SPACES.items()])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_PEFT_OUTPUTS": str(tmp_path / "outputs")}
    done = subprocess.run(
        [sys.executable, "-c", SWEEPS, sweeps], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    given = json.loads(done.stdout.splitlines()[-1])
    kinds = ("num_workers", "cpus_per_worker", "gpu_fraction", "chosen", "pack")
    for name, rows, trials in zip(SPACES, planned, given, strict=True):
        assert [row["trial_id"] for row in rows] == list(trials), name
        assert [{kind: row[kind] for kind in kinds} for row in rows] == [
            {kind: trial[kind] for kind in kinds} for trial in trials.values()
        ], name
        for trial in trials.values():
            held = {"CPU": trial["cpus_per_worker"], "GPU": trial["gpu_fraction"]}
            assert trial["bundles"] == [{key: count for key, count in held.items() if count}], name
    shared, fitted, cramped, halves, packs, cpu = planned
    assert sorted(len(row["pack"]) for row in packs) == [0, 2, 2, 3, 3, 3]  # on two GPUs
    assert all(0 < row["gpu_fraction"] < 1 for row in shared)
    assert len({row["gpu_fraction"] for row in shared}) > 1
    assert all("train.micro_batch_size" in row["chosen"] for row in (*fitted, *halves))
    assert [(row["fits"], row["gpu_fraction"], row["cpus_per_worker"]) for row in cramped] == [(False, 1.0, 3)]
    assert [(row["gpu_fraction"], row["cpus_per_worker"], row["chosen"]) for row in cpu] == [(0.0, 8, {})]
