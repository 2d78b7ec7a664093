"""Tracking writes what it is given and reads it back, also when a database breaks. Real stores only."""

import json
import logging
import math
import pickle
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from tracked import artifact_text, client_of, free_port, loaded_table, result_of, settle, spec_of, tracker_of, wait_for

from ray_peft.errors import TrackingError
from ray_peft.foundation.masking import mask
from ray_peft.metrics.scores import Scores
from ray_peft.store.tracking import (
    Store,
    close_open,
    default_uri,
    finish_sweep,
    load_spec,
    open_store,
    send,
    start_sweep,
)
from ray_peft.store.tracking.trial_run import flatten
from ray_peft.trial.result import Provenance, TrialResult, Usage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(empty_database: Path, tmp_path: Path) -> Store:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return open_store(default_uri(tmp_path), "comparison", tmp_path / "artifacts")


def test_importing_the_package_does_not_import_mlflow():
    code = "import sys, ray_peft.store.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:5000/x", "http://***@host:5000/x"),
        ("no answer from https://token@host.", "no answer from https://***@host."),
        ("postgresql://me:pa/ss@w@host/db", "postgresql://***@host/db"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("http://host/?x=1&access_token=abc&y=2", "http://host/?x=1&access_token=***&y=2"),
        ("http://host/?api-key=abc#top", "http://host/?api-key=***#top"),
        ("token hf_abcdefghijklmnopqrstuvwxyz012345 is invalid", "token hf_*** is invalid"),
        ('{"a": "http://u:p@h", "b": "x@y"}', '{"a": "http://***@h", "b": "x@y"}'),
    ],
)
def test_mask_hides_credentials_and_nothing_else(text, shown):
    assert mask(text) == shown


def test_flatten_names_every_leaf():
    plain = {"a": {"b": [1, {"c": None}]}, "d": "text", "e": [], "f": True, "g": 1e-4, "h": ""}
    assert flatten(plain) == {
        "a.b.0": "1",
        "a.b.1.c": "null",
        "d": "text",
        "e": "[]",
        "f": "true",
        "g": "0.0001",
        "h": '""',
    }


def test_a_store_travels_and_hides_its_credentials():
    store = Store("http://me:secret@host:5000", "1", "comparison", "mlflow-artifacts:/1")
    assert pickle.loads(pickle.dumps(store)) == store
    assert "secret" not in f"{store} {store!r}"


def test_opening_again_finds_the_same_experiment(store, tmp_path):
    assert open_store(store.uri, "comparison", tmp_path / "elsewhere") == store
    assert store.artifact_location == (tmp_path / "artifacts").as_uri()


def test_a_deleted_experiment_is_named_with_the_way_out(store, tmp_path):
    client_of(store).delete_experiment(store.experiment_id)
    with pytest.raises(TrackingError, match=f"'comparison' in .* is deleted; .*--experiment-id {store.experiment_id}"):
        open_store(store.uri, "comparison", tmp_path)


@pytest.mark.parametrize("uri", ["postgresql://me:secret@host/db", "sqlite://", "sqlite:///:memory:", "outputs/mlruns"])
def test_other_kinds_of_store_are_refused(uri, tmp_path):
    with pytest.raises(TrackingError, match="neither sqlite:///FILE nor") as caught:
        open_store(uri, "comparison", tmp_path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["50%20", "what?"])
def test_a_path_that_mlflow_cannot_open_is_refused(name, tmp_path):
    with pytest.raises(TrackingError, match="choose a path without % and"):
        open_store(default_uri(tmp_path / name), "comparison", tmp_path)


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path):
    (tmp_path / "mlflow.db").write_text("my notes " * 100)
    with pytest.raises(TrackingError, match="file is not a database"):
        open_store(default_uri(tmp_path), "comparison", tmp_path)
    assert (tmp_path / "mlflow.db").read_text().startswith("my notes")


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrackingError, match="choose another folder"):
        open_store(default_uri(tmp_path / "file" / "outputs"), "comparison", tmp_path)


def test_a_server_that_is_down_is_an_error_within_seconds():
    start = time.monotonic()
    with pytest.raises(TrackingError, match="no MLflow server answers at http://.*Connection refused") as caught:
        open_store(f"http://me:secret@127.0.0.1:{free_port()}", "comparison", None)
    assert time.monotonic() - start < 10
    assert "secret" not in str(caught.value)


def test_a_server_that_never_answers_is_an_error_within_seconds():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(TrackingError, match="Read timed out"):
            open_store(f"http://127.0.0.1:{silent.getsockname()[1]}", "comparison", None)
        assert time.monotonic() - start < 10


def test_a_worker_that_does_not_see_the_file_says_so(store, tmp_path):
    (tmp_path / "mlflow.db").unlink()
    tracker = tracker_of(tmp_path, store, None)
    assert tracker.start(spec_of()) is None  # the driver sends it
    with pytest.raises(TrackingError, match="no tracking store at .* all machines share"):
        send(store, tracker._folder)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_sweep_holds_its_trials(store, tmp_path):
    client, spec = client_of(store), spec_of()
    parent = start_sweep(store, "small", tags={"question": "which?"}, files={"space.yaml": "seed: 1\n"})
    tracker = tracker_of(tmp_path, store, parent)
    child = tracker.start(spec)
    tracker.record(result_of(spec))
    (tmp_path / "table.md").write_text("| a |")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.svg").write_text("<svg/>")
    files = {"report/report.md": tmp_path / "table.md", "report/plots": tmp_path / "plots"}
    finish_sweep(store, parent, "FINISHED", metrics={"trials": 1}, files=files)

    run = client.get_run(parent)
    assert (run.info.run_name, run.info.status, run.data.metrics) == ("small", "FINISHED", {"trials": 1.0})
    assert run.data.tags["question"] == "which?"
    assert artifact_text(store, parent, "space.yaml", tmp_path / "1") == "seed: 1\n"
    assert artifact_text(store, parent, "report/report.md", tmp_path / "2") == "| a |"
    assert artifact_text(store, parent, "report/plots/a.svg", tmp_path / "3") == "<svg/>"
    (found,) = client.search_runs([store.experiment_id], f"tags.mlflow.parentRunId = '{parent}'")
    assert (found.info.run_id, found.info.run_name, found.info.status) == (child, spec.trial_id, "FINISHED")
    assert found.data.tags["ray_peft.method"] == "lora"
    assert found.data.tags["ray_peft.trial_id"] == spec.trial_id
    assert found.data.tags["ray_peft.sweep"] == "small"


def test_a_missing_file_is_an_error(store, tmp_path):
    parent = start_sweep(store, "small", tags={}, files={})
    with pytest.raises(TrackingError, match="no such file or folder"):
        finish_sweep(store, parent, "FINISHED", metrics={}, files={"a": tmp_path / "absent"})


def test_every_leaf_of_the_spec_is_a_parameter(store, tmp_path):
    spec = spec_of()
    run_id = tracker_of(tmp_path, store, None).start(spec)
    params = client_of(store).get_run(run_id).data.params
    assert params == flatten(spec.plain())
    assert params["method.rank"] == "4"
    assert params["data.sources.0.path"] == "dolly.jsonl"


def test_a_long_parameter_becomes_an_artifact(store, tmp_path):
    path = "x" * 7000
    run_id = tracker_of(tmp_path, store, None).start(spec_of(path=path))
    name = "params/data.sources.0.path.txt"
    assert client_of(store).get_run(run_id).data.params["data.sources.0.path"] == (
        f"7000 characters: see the artifact {name}"
    )
    assert artifact_text(store, run_id, name, tmp_path / "1") == path
    assert load_spec(store.uri, run_id) == spec_of(path=path)


def test_credentials_in_a_spec_reach_neither_parameters_nor_artifacts(store, tmp_path):
    run_id = tracker_of(tmp_path, store, None).start(spec_of(path="https://me:secret@host/rows.jsonl"))
    assert "secret" not in str(client_of(store).get_run(run_id).data.to_dictionary())
    assert "secret" not in artifact_text(store, run_id, "spec.json", tmp_path / "1")


def test_a_trial_is_read_back_from_its_run(store, tmp_path):
    run_id = tracker_of(tmp_path, store, None).start(spec_of(seed=7))
    assert load_spec(store.uri, run_id) == spec_of(seed=7)


def test_a_run_that_is_no_trial_gives_a_clear_error(store):
    parent = start_sweep(store, "small", tags={}, files={"space.yaml": ""})
    with pytest.raises(TrackingError, match=r"no spec.json \(found: space.yaml\)"):
        load_spec(store.uri, parent)
    with pytest.raises(TrackingError, match="cannot read run 0123456789abcdef0123456789abcdef"):
        load_spec(store.uri, "0123456789abcdef0123456789abcdef")


def test_live_metrics_arrive_by_themselves(store, tmp_path):
    tracker = tracker_of(tmp_path, store, None)
    run_id = tracker.start(spec_of())
    tracker.log({"train/loss": 1.5, "odd name (%)": 2.0, "../up": 3.0}, step=4)
    client = client_of(store)
    wait_for(lambda: "train/loss" in client.get_run(run_id).data.metrics)
    assert client.get_run(run_id).data.metrics == {"train/loss": 1.5, "odd name ___": 2.0, "_.._up": 3.0}
    assert client.get_metric_history(run_id, "train/loss")[0].step == 4


def test_metrics_that_are_not_finite_are_kept(store, tmp_path):
    tracker, spec = tracker_of(tmp_path, store, None), spec_of()
    run_id = tracker.start(spec)
    for step, value in enumerate([1.0, math.nan, math.inf, -math.inf]):
        tracker.log({"loss": value}, step)
    tracker.record(result_of(spec))
    values = [point.value for point in client_of(store).get_metric_history(run_id, "loss")]
    assert values[0] == 1.0
    assert math.isnan(values[1])
    assert values[2:] == [sys.float_info.max, -sys.float_info.max]


def test_a_table_can_be_loaded_and_replaced(store, tmp_path):
    tracker = tracker_of(tmp_path, store, None)
    run_id = tracker.start(spec_of())
    tracker.table([{"old": 1}], "samples.json")
    tracker.table([{"prompt": "a", "score": 0.5}, {"prompt": "b", "loss": math.nan}], "samples.json")
    settle(tracker)
    frame = loaded_table(store, run_id, "samples.json", tmp_path)
    assert list(frame.columns) == ["prompt", "score", "loss"]
    assert frame["prompt"].tolist() == ["a", "b"]
    logged = json.loads(client_of(store).get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert logged == [{"path": "samples.json", "type": "table"}]


def test_artifacts_are_files_or_whole_folders(store, tmp_path):
    tracker = tracker_of(tmp_path, store, None)
    run_id = tracker.start(spec_of())
    (tmp_path / "adapter" / "deep").mkdir(parents=True)
    (tmp_path / "adapter" / "config.json").write_text("{}")
    (tmp_path / "adapter" / "deep" / "weights").write_text("w")
    tracker.artifact(tmp_path / "adapter", "adapter")
    tracker.artifact(tmp_path / "adapter" / "config.json", "")
    settle(tracker)
    assert artifact_text(store, run_id, "adapter/deep/weights", tmp_path / "1") == "w"
    assert artifact_text(store, run_id, "config.json", tmp_path / "2") == "{}"
    with pytest.raises(TrackingError, match="no such file or folder"):
        tracker.artifact(tmp_path / "absent", "adapter")


def test_a_result_is_recorded_whole(store, tmp_path):
    tracker, spec = tracker_of(tmp_path, store, None), spec_of()
    run_id = tracker.start(spec)
    result = result_of(
        spec,
        scores=Scores(
            bleu4=0.25,
            chrf=0.5,
            bleu_tokenizer="zh",
            rouge_tokenizer="unicode",
            eval_rows=2,
            benchmarks={"humaneval/pass@1": 0.125},
            benchmark_stderr={"humaneval/pass@1": 0.5},
        ),
        usage=Usage(wall_time_s=12.5),
        train_loss_final=1.25,
        trainable_parameters=32768,
        provenance=Provenance(versions={"torch": "2.11", "numpy": "2.0"}, device="a GPU", git_commit="abc+dirty"),
    )
    tracker.record(result)
    run = client_of(store).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["scores.bleu4"] == 0.25
    assert "scores.rouge_l" not in run.data.metrics
    assert run.data.metrics["scores.chrf"] == 0.5
    assert run.data.tags["ray_peft.bleu_tokenizer"] == "zh"
    assert run.data.tags["ray_peft.rouge_tokenizer"] == "unicode"
    assert run.data.metrics["scores.benchmarks.humaneval/pass_1"] == 0.125  # MLflow refuses "@" in a name
    assert run.data.metrics["scores.benchmark_stderr.humaneval/pass_1"] == 0.5
    assert run.data.metrics["usage.wall_time_s"] == 12.5
    assert run.data.metrics["train_loss_final"] == 1.25
    assert run.data.metrics["trainable_parameters"] == 32768
    assert run.data.tags["ray_peft.status"] == "finished"
    assert run.data.tags["ray_peft.version.torch"] == "2.11"
    assert run.data.tags["ray_peft.git_commit"] == "abc+dirty"
    assert json.loads(artifact_text(store, run_id, "versions.json", tmp_path / "1")) == result.provenance.versions
    stored = TrialResult.model_validate_json(artifact_text(store, run_id, "result.json", tmp_path / "2"))
    assert stored == result.model_copy(update={"mlflow_run_id": run_id})


@pytest.mark.parametrize(
    ("status", "run_status"), [("failed", "FAILED"), ("out_of_memory", "FAILED"), ("cancelled", "KILLED")]
)
def test_a_trial_that_did_not_finish_keeps_its_reason(store, tmp_path, status, run_status):
    tracker, spec = tracker_of(tmp_path, store, None), spec_of()
    run_id = tracker.start(spec)
    tracker.record(result_of(spec, status=status, error="no luck at http://me:secret@host\ndetails"))
    run = client_of(store).get_run(run_id)
    assert run.info.status == run_status
    assert run.data.tags["ray_peft.status"] == status
    assert run.data.tags["ray_peft.error"] == "no luck at http://***@host"
    assert artifact_text(store, run_id, "error.txt", tmp_path / "1") == "no luck at http://***@host\ndetails"
    assert "secret" not in artifact_text(store, run_id, "result.json", tmp_path / "2")


def test_a_run_left_by_a_killed_process_is_closed_on_the_next_start(store, tmp_path):
    client, spec = client_of(store), spec_of()
    parent, other = (start_sweep(store, "small", tags={}, files={}) for _ in range(2))
    left = tracker_of(tmp_path, store, parent).start(spec)
    elsewhere = [
        tracker_of(tmp_path, store, other).start(spec),
        tracker_of(tmp_path, store, parent).start(spec_of(seed=1)),
        tracker_of(tmp_path, store, None).start(spec),
    ]
    again = tracker_of(tmp_path, store, parent).start(spec)
    assert client.get_run(left).info.status == "KILLED"
    assert client.get_run(left).data.tags["ray_peft.error"].startswith("interrupted")
    assert {client.get_run(run_id).info.status for run_id in [again, *elsewhere]} == {"RUNNING"}


def test_open_runs_of_a_sweep_are_closed_and_others_are_not(store, tmp_path):
    client = client_of(store)
    parent, other = (start_sweep(store, "small", tags={}, files={}) for _ in range(2))
    left, waits, done = (tracker_of(tmp_path, store, parent) for _ in range(3))
    runs = [tracker.start(spec_of(seed=seed)) for seed, tracker in enumerate((left, waits, done))]
    done.record(result_of(spec_of(seed=2)))
    elsewhere = tracker_of(tmp_path, store, other).start(spec_of())
    assert close_open(store, parent, "killed at http://me:secret@host", {runs[1]}) == 1
    status = [client.get_run(run).info.status for run in (*runs, elsewhere)]
    assert status == ["KILLED", "RUNNING", "FINISHED", "RUNNING"]
    assert client.get_run(runs[0]).data.tags["ray_peft.error"] == "killed at http://***@host"


def sql(store: Store, statement: str) -> None:
    with closing(sqlite3.connect(store.uri.removeprefix("sqlite:///"), timeout=20)) as connection, connection:
        connection.execute(statement)


def test_metrics_wait_out_a_broken_database(store, caplog, tmp_path):
    tracker, spec = tracker_of(tmp_path, store, None), spec_of()
    run_id = tracker.start(spec)
    tracker.log({"loss": 0.0}, 0)
    sql(store, "ALTER TABLE metrics RENAME TO metrics_away")
    with caplog.at_level(logging.WARNING, logger="ray_peft"):
        for step in range(1, 300):
            tracker.log({"loss": float(step)}, step)
        wait_for(lambda: "keeping them" in caplog.text)
    sql(store, "ALTER TABLE metrics_away RENAME TO metrics")
    tracker.record(result_of(spec))
    history = client_of(store).get_metric_history(run_id, "loss")
    assert sorted(point.step for point in history) == list(range(300))
    assert caplog.text.count("keeping them") == 1


def test_a_result_that_cannot_be_stored_waits_beside_its_trial(store, tmp_path):
    tracker, spec = tracker_of(tmp_path, store, None), spec_of()
    run_id = tracker.start(spec)
    sql(store, "ALTER TABLE metrics RENAME TO metrics_away")
    row = tracker.record(result_of(spec, train_loss_final=1.5))
    assert row.status == "finished"
    assert "no such table" in row.untracked
    assert client_of(store).get_run(run_id).info.status == "RUNNING"
    sql(store, "ALTER TABLE metrics_away RENAME TO metrics")
    assert send(store, tracker._folder).run_id == run_id
    run = client_of(store).get_run(run_id)
    assert (run.info.status, run.data.metrics["train_loss_final"]) == ("FINISHED", 1.5)
