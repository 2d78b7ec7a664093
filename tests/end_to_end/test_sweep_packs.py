"""Trials of a sweep that train together: each has the row, the MLflow run and the files of one that trains alone."""

from __future__ import annotations

import contextlib
import json
import threading
import time

import psutil
import pytest
import tiny
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file

import ray_peft
from ray_peft.console import Console
from ray_peft.engine.checkpoint import last_step
from ray_peft.schedule import packs

LORA = [
    {"name": "lora", "rank": 4, "lr": 0.01},
    {"name": "lora", "rank": 8, "lr": 0.02, "alpha": 8},
    {"name": "lora", "rank": 2, "lr": 1.0e30},  # diverges
]


FLOAT32 = {"train__eval_every": 2, "train__save_dtype": "float32"}


def write_space(path, model, data, methods, **changes):
    plain = tiny.plain_spec(model, data, {"grid": methods}, **changes)
    path.write_text(yaml.safe_dump({"name": path.stem, **plain}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def swept(ray_cluster, shared, tiny_model, questions, tmp_path_factory):
    """The same trials, packed and by themselves."""
    folder = tmp_path_factory.mktemp("packed_sweep")
    outcomes = {}
    for name, pack in (("packed", True), ("apart", False)):
        space = write_space(folder / f"{name}.yaml", tiny_model, questions, [{"name": "none"}, *LORA], **FLOAT32)
        outcomes[name] = ray_peft.sweep(
            space, out=folder / name, console=Console(), overrides=[f"train.pack={str(pack).lower()}"]
        )
    return outcomes


def rows_of(outcome):
    return {row.trial_id: row for row in outcome.results}


def test_rows_and_adapters_are_those_of_trials_alone(swept):
    packed, apart = rows_of(swept["packed"]), rows_of(swept["apart"])
    assert packed.keys() == apart.keys()
    assert sorted(row.status for row in packed.values()) == ["failed", "finished", "finished", "finished"]
    for trial_id, theirs in apart.items():
        ours = packed[trial_id]
        assert (ours.pack_size, theirs.pack_size) == (1 if "none" in trial_id else 3, 1)
        assert ours.status == theirs.status
        assert ours.steps == theirs.steps
        if theirs.status == "failed":
            assert "is nan at step" in ours.error
            continue
        assert ours.scores.eval_loss == pytest.approx(theirs.scores.eval_loss, rel=1e-5)
        assert ours.scores.rouge_l == theirs.scores.rouge_l
        if not theirs.trainable_parameters:
            continue
        assert ours.train_loss_final == pytest.approx(theirs.train_loss_final, rel=1e-5)
        files = [
            outcome.folder / "trials" / trial_id / "adapter" / "adapter_model.safetensors" for outcome in swept.values()
        ]
        weights = [load_file(file) for file in files]
        assert weights[0].keys() == weights[1].keys()
        for name, value in weights[0].items():
            # AdamW divides the first gradient by itself, so one that is all rounding goes either way.
            far = ~torch.isclose(value, weights[1][name], rtol=1e-4, atol=1e-5)
            assert far.float().mean() < 0.005, name


def test_every_run_in_mlflow_looks_like_that_of_a_trial_alone(swept):
    runs = {}
    for name, outcome in swept.items():
        client = MlflowClient(tracking_uri=outcome.tracking_uri)
        for row in outcome.results:
            run = client.get_run(row.mlflow_run_id)
            history = client.get_metric_history(run.info.run_id, "train_loss") if row.trainable_parameters else []
            files = {file.path for file in client.list_artifacts(run.info.run_id)}
            runs[name, row.trial_id] = (
                run.info.status,
                {key: value for key, value in run.data.params.items() if key != "train.pack"},
                {key for key in run.data.tags if key != "ray_peft.pack_size"},
                {name for name in run.data.metrics if not name.startswith("predicted")},  # by what ran before
                files,
                [(point.step, pytest.approx(point.value, rel=1e-5)) for point in history],
            )
    trials = {trial_id for _, trial_id in runs}
    for trial_id in trials:
        assert runs["packed", trial_id] == runs["apart", trial_id], trial_id


@pytest.mark.long
def test_a_search_proposes_packs_and_learns_from_each(ray_cluster, shared, tiny_model, questions, tmp_path, capsys):
    method = {"name": "lora", "rank": {"choice": [2, 4, 8]}, "lr": {"loguniform": [1.0e-3, 1.0e-1]}}
    plain = tiny.plain_spec(tiny_model, questions, method, train__pack=True, train__steps=2)
    plain |= {"name": "search", "search": {"samples": 5, "algorithm": "optuna"}}
    space = tmp_path / "search.yaml"
    space.write_text(yaml.safe_dump(plain), encoding="utf-8")
    outcome = ray_peft.sweep(space, out=tmp_path / "out", console=Console())
    assert outcome.complete
    assert sorted(row.pack_size for row in outcome.results) == [1, 2, 2, 2, 2]
    assert len({row.spec.method.lr for row in outcome.results}) == 5
    assert capsys.readouterr().out.count("2 trials together on one base") == 2
    by_time = sorted(outcome.results, key=lambda row: row.provenance.started_at)
    assert [row.pack_size for row in by_time] == [2, 2, 2, 2, 1]


@pytest.mark.long
def test_a_search_with_early_stopping_fills_places_with_proposals(
    ray_cluster, shared, tiny_model, questions, tmp_path, capsys
):
    """Ten samples, two at a time: the shorter of two trials makes room for a proposal, while the other one trains."""
    method = {"name": "lora", "rank": 4, "lr": {"loguniform": [1.0e-3, 1.0e-1]}}
    changes = {"train__pack": True, "train__eval_every": 2, "evaluation__generate": False}
    plain = tiny.plain_spec(tiny_model, questions, method, **changes)
    plain["train"]["steps"] = {"choice": [4, 16]}
    plain |= {"name": "filled", "search": {"samples": 10, "algorithm": "optuna", "scheduler": "asha", "reduction": 2}}
    space = tmp_path / "filled.yaml"
    space.write_text(yaml.safe_dump(plain), encoding="utf-8")
    outcome = ray_peft.sweep(space, out=tmp_path / "out", console=Console())
    assert outcome.complete
    assert len({row.trial_id for row in outcome.results}) == len(outcome.results) == 10
    assert {row.status for row in outcome.results} == {"finished", "stopped_early"}
    assert capsys.readouterr().out.count("2 trials together on one base") < 5  # the others have joined them
    rows = {row.trial_id: row.status for row in outcome.results}
    again = ray_peft.sweep(space, out=tmp_path / "out", console=Console())
    assert {row.trial_id: row.status for row in again.results} == rows


@pytest.mark.long
def test_a_trial_of_a_pack_that_waits_takes_the_place_of_one_that_ends(
    ray_cluster, shared, tiny_model, questions, tmp_path, monkeypatch
):
    """Two packs of two, one after the other; those of the second join the first, whose longest trial is still there."""
    monkeypatch.setattr(packs, "MOST_MEMBERS", 2)
    steps = {"train__steps": {"grid": [24, 2]}}
    methods = [{"name": "lora", "rank": rank, "lr": 0.01} for rank in (4, 2)]
    space = write_space(tmp_path / "waiting.yaml", tiny_model, questions, methods, train__pack=True, **steps)
    outcome = ray_peft.sweep(space, out=tmp_path / "out", console=Console())
    assert outcome.complete
    assert [row.pack_size for row in outcome.results] == [2, 2, 2, 2]


def kill_at(folder, steps, done, left):
    """kill -9 of the process that trains, once it has logged each of some steps; `left` gets the checkpoints it left.

    These are the last steps by trial, and by kill.
    """
    for step in steps:
        while not done.is_set() and not _killed(folder, step):
            time.sleep(0.02)
        left.append({path.name: last_step(path / "stage1") for path in folder.glob("trials/lora-*")})


def _killed(folder, step):
    for log in folder.glob("trials/lora-*/metrics.jsonl"):
        if f'"step": {step},' not in log.read_text():
            continue
        text = str(log.with_name("log.txt"))
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if text in {file.path for file in process.open_files()}:
                    process.kill()
                    process.wait(10)
                    return True
    return False


@pytest.mark.long
def test_trials_of_a_pack_that_is_killed_twice_go_on_together_and_then_by_themselves(
    ray_cluster, tiny_model, questions, tmp_path
):
    changes = {"train__checkpoint_every": 2, "train__steps": 30, "train__pack": True, "evaluation__generate": False}
    changes |= {"resources": {"gpus_per_worker": 0, "cpus_per_worker": 2, "max_failures": 1}}
    space = write_space(tmp_path / "killed.yaml", tiny_model, questions, LORA, **changes)
    done = threading.Event()
    left = []
    killer = threading.Thread(target=kill_at, args=(tmp_path / "out", (6, 16), done, left))
    killer.start()
    try:
        outcome = ray_peft.sweep(space, out=tmp_path / "out", console=Console())
    finally:
        done.set()
        killer.join()
    rows = [row for row in outcome.results if row.status == "finished"]
    assert (len(outcome.results), len(rows)) == (3, 2)
    for row in rows:
        folder = outcome.folder / "trials" / row.trial_id
        # One that was killed between two members' checkpoints goes on with one of them two steps behind the other.
        first, second = (steps[row.trial_id] for steps in left)
        assert first >= 4
        assert row.resumed_from_step == second >= 12
        assert ["died" in reason for reason in row.restarts] == [True, True]
        assert row.pack_size == 1
        log = (folder / "log.txt").read_text()
        assert "of 3" in log
        assert "of 2" in log  # the third has diverged
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines if "train_loss" in line] == list(range(1, 31))


def grid_of(name, rates, rank, **more):
    return [{"name": name, "rank": rank + place, "lr": lr, **more} for place, lr in enumerate(rates)]


@pytest.mark.long
def test_a_mixed_sweep_with_asha_ends_trials_of_packs_and_trials_alone(
    ray_cluster, shared, tiny_model, questions, tmp_path, monkeypatch
):
    """Packs of two, one after the other: what learns nothing comes after what learns, and ends at the first rung."""
    monkeypatch.setattr(packs, "MOST_MEMBERS", 2)
    methods = [
        *grid_of("lora", [0.02, 0.03, 1.0e-9, 1.1e-9], 4),
        *grid_of("qlora", [0.02, 1.0e-9], 4, compute_dtype="float32"),
        *grid_of("galore", [0.02, 1.0e-9], 8, weights="float32"),
    ]
    changes = {"train__steps": 6, "train__eval_every": 2, "train__pack": True}
    space = write_space(tmp_path / "mixed.yaml", tiny_model, questions, methods, **changes)
    search = ["search={scheduler: asha, reduction: 2}"]
    outcome = ray_peft.sweep(space, out=tmp_path / "out", console=Console(), overrides=search)
    assert outcome.complete
    ended = {}
    for row in outcome.results:
        ended.setdefault(row.spec.method.name, []).append((row.spec.method.lr, row.status))
    assert ended["galore"] == [(0.02, "finished"), (1.0e-9, "stopped_early")]
    for of_method in ended.values():  # of two that are evaluated at once, the worse may be told before the better
        assert "finished" in {status for _, status in of_method}
    assert [status for lr, status in ended["lora"] if lr < 1e-6] == ["stopped_early"] * 2
    assert {row.pack_size for row in outcome.results if row.spec.method.name == "qlora"} == {2}
    client = MlflowClient(tracking_uri=outcome.tracking_uri)
    names = set()
    for row in outcome.results:
        run = client.get_run(row.mlflow_run_id)
        assert run.data.params["method.lr"] == str(row.spec.method.lr)
        history = {
            name: [point.step for point in client.get_metric_history(run.info.run_id, name)]
            for name in ("train_loss", "eval_loss")
        }
        assert history["train_loss"] == list(range(1, row.steps + 1))
        assert history["eval_loss"] == list(range(2, row.steps + 1, 2))
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        finished = row.status == "finished"
        assert (run.info.status, "adapter" in files) == (("FINISHED", True) if finished else ("KILLED", False))
        assert run.data.tags["ray_peft.status"] == row.status
        if not finished:
            assert row.error.startswith(f"stopped after step {row.steps}: its held-out loss")
            assert row.eval_loss_best is not None
        names.add((finished, frozenset(run.data.params)))
    assert len({name for _, name in names if name}) <= 3  # one set of settings a method
    again = ray_peft.sweep(space, out=tmp_path / "out", console=Console(), overrides=search)
    assert [row.provenance.ended_at for row in again.results] == [row.provenance.ended_at for row in outcome.results]
