"""A real MLflow server that is killed in mid-sweep: nothing is lost, and nothing is trained twice."""

from __future__ import annotations

import json
import threading
import time

import pytest
import tiny
import yaml
from served import Server
from tracked import client_of, wait_for

import ray_peft
from ray_peft import cli
from ray_peft.store.outbox import FILE
from ray_peft.store.results_file import read_results
from ray_peft.store.tracking import open_store


@pytest.fixture
def server(empty_database, tmp_path):
    """A real MLflow server over a SQLite file, which can be killed and started again."""
    server = Server(tmp_path / "served", empty_database)
    server.start()
    yield server
    server.kill()


def write_space(folder, model, data, **changes):
    methods = {"grid": [{"name": "none"}, {"name": "full", "lr": 1.0e-3, "weights": "float32"}]}
    plain = tiny.plain_spec(model, data, methods, evaluation__generate=False, **changes)
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"name": "space", **plain}), encoding="utf-8")
    return path


def runs_of(uri):
    store = open_store(uri, "space", None)
    return client_of(store), client_of(store).search_runs([store.experiment_id])


@pytest.mark.slow
def test_a_server_that_is_killed_for_good_costs_no_trial_and_sync_brings_everything(
    ray_cluster, tiny_model, questions, tmp_path, server, capsys
):
    space, out = write_space(tmp_path, tiny_model, questions), tmp_path / "out"

    def kill() -> None:
        while not list(out.glob("trials/*/metrics.jsonl")):
            time.sleep(0.02)
        server.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    began = time.monotonic()
    assert cli.main(["sweep", str(space), "--out", str(out), "--tracking-uri", server.uri]) == cli.UNSENT
    assert time.monotonic() - began < 120
    said = capsys.readouterr().out
    assert "Trials go on" in said
    assert f"ray-peft sync {out}" in said
    rows = read_results(out)
    assert [row.status for row in rows] == ["finished", "finished"]
    lacking = [row for row in rows if row.untracked is not None]
    assert lacking
    full = next(row for row in rows if row.spec.method.name == "full")
    assert (out / "trials" / full.trial_id / "adapter").is_dir()  # its weights are nowhere else
    assert cli.main(["sync", str(out)]) == 2
    assert "no MLflow server answers" in capsys.readouterr().err

    server.start()
    assert cli.main(["sync", str(out)]) == 0
    assert not (out / "trials" / full.trial_id / "adapter").exists()
    client, runs = runs_of(server.uri)
    assert sorted(run.info.status for run in runs) == ["FINISHED"] * 3
    after = read_results(out)
    assert [row.untracked for row in after] == [None, None]
    for row in after:
        run = client.get_run(row.mlflow_run_id)
        assert run.data.metrics["scores.eval_loss"] == row.scores.eval_loss
    losses = client.get_metric_history(
        next(r.mlflow_run_id for r in after if r.trial_id == full.trial_id), "train_loss"
    )
    lines = (out / "trials" / full.trial_id / "metrics.jsonl").read_text().splitlines()
    assert [point.value for point in losses] == [
        line["train_loss"] for line in map(json.loads, lines) if "train_loss" in line
    ]
    # Once more: there is nothing to do, and the same command trains nothing.
    assert cli.main(["sync", str(out)]) == 0
    assert ray_peft.sweep(space, out=out, tracking_uri=server.uri).complete
    assert len(runs_of(server.uri)[1]) == 3
    assert [row.provenance.started_at for row in read_results(out)] == [row.provenance.started_at for row in rows]


@pytest.mark.slow
def test_a_driver_that_was_killed_before_it_listed_a_result_trains_nothing_again(
    ray_cluster, tiny_model, questions, tmp_path, server
):
    """As kill -9 between the worker's record and the driver's ledger leaves it; and a sweep's run that is gone."""
    space, out = write_space(tmp_path, tiny_model, questions), tmp_path / "out"
    first = ray_peft.sweep(space, out=out, tracking_uri=server.uri)
    assert first.complete
    ledger = out / "results.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:1]))
    client, runs = runs_of(server.uri)
    assert len(runs) == 3
    parent = json.loads((out / "sweep.json").read_text())["parent_run_id"]
    open_run = client.create_run(
        runs[0].info.experiment_id, tags={"mlflow.parentRunId": parent, "ray_peft.trial_id": "lora-12345678"}
    )
    again = ray_peft.sweep(space, out=out, tracking_uri=server.uri)
    assert again.complete
    assert again.results == first.results
    assert client.get_run(open_run.info.run_id).info.status == "KILLED"
    assert len(runs_of(server.uri)[1]) == 4

    client.delete_run(parent)
    third = ray_peft.sweep(space, out=out, tracking_uri=server.uri)
    assert third.results == first.results
    anew = json.loads((out / "sweep.json").read_text())["parent_run_id"]
    assert anew != parent
    for row in third.results:
        assert client.get_run(row.mlflow_run_id).data.tags["mlflow.parentRunId"] == anew
    wait_for(lambda: client.get_run(anew).info.status == "FINISHED")
    for trial in out.glob("trials/*"):
        assert (trial / FILE).read_text().count('"do": "start"') == 1
