"""A trial's outbox: what it holds survives kills and full disks, and is sent once, in order."""

import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest
from tracked import artifact_text, client_of, result_of, spec_of, tracker_of

from ray_peft.errors import TrackingError
from ray_peft.foundation.audience import Silence
from ray_peft.store.outbox import FILE, SENT_FILE, Outbox, Sent
from ray_peft.store.tracking import Store, default_uri, open_store, send, start_sweep
from ray_peft.store.tracking.sending import store_label
from ray_peft.store.unsent import Unsent


@pytest.fixture
def store(empty_database, tmp_path):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return open_store(default_uri(tmp_path), "comparison", tmp_path / "artifacts")


def away(tmp_path: Path) -> Path:
    return (tmp_path / "mlflow.db").rename(tmp_path / "away.db")


def test_half_a_line_of_a_killed_process_is_neither_sent_nor_in_the_way(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.put({"do": "metrics", "step": 1})
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"do": "metrics", "st')
    assert [entry["step"] for entry, _ in Outbox(tmp_path).after(0)] == [1]
    Outbox(tmp_path).put({"do": "metrics", "step": 2})
    assert [entry["step"] for entry, _ in Outbox(tmp_path).after(0)] == [1, 2]


def test_a_full_disk_keeps_entries_in_memory_for_the_next(tmp_path, monkeypatch, caplog):
    outbox = Outbox(tmp_path)
    real = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[:5])
            self.file.flush()
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda path, mode="r", **more: Full(real(path, mode, **more)))
        assert not outbox.put({"do": "metrics", "step": 1})
        assert not outbox.put({"do": "metrics", "step": 2})
    assert caplog.text.count("wait in memory") == 1
    assert outbox.put({"do": "metrics", "step": 3})
    assert [entry["step"] for entry, _ in outbox.after(0)] == [1, 2, 3]


def test_a_damaged_entry_is_passed_over(tmp_path, caplog):
    outbox = Outbox(tmp_path)
    outbox.put({"do": "metrics", "step": 1}, {"do": "metrics", "step": 2}, {"do": "metrics", "step": 3})
    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / FILE).write_bytes(lines[0] + lines[1].replace(b"{", b"\xff") + lines[2])
    assert [entry["step"] for entry, _ in Outbox(tmp_path).after(0)] == [1, 3]
    assert "is damaged" in caplog.text


def test_what_one_store_has_says_nothing_of_another(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.put({"do": "metrics", "step": 1})
    outbox.note(Sent("one", offset=5, run_id="r"))
    assert outbox.sent("one").offset == 5
    assert outbox.sent("two") == Sent("two")
    (tmp_path / SENT_FILE).write_text("{")
    assert outbox.sent("one") == Sent("one")


def test_a_store_that_is_away_from_start_to_end_gets_everything_in_order_and_once(store, tmp_path):
    away(tmp_path)
    spec, tracker = spec_of(), tracker_of(tmp_path, store, None)
    assert tracker.start(spec) is None
    for step in range(5):
        tracker.log({"loss": float(step)}, step)
    weights = tracker._folder / "adapter"
    weights.mkdir()
    (weights / "model.safetensors").write_text("weights")
    tracker.artifact(weights, "adapter", remove=True)
    tracker.table([{"prompt": "a"}], "samples.json")
    row = tracker.record(result_of(spec, train_loss_final=1.5))
    assert (row.status, row.mlflow_run_id) == ("finished", None)
    assert row.untracked.startswith("no tracking store at")
    assert weights.is_dir()
    (tmp_path / "away.db").rename(tmp_path / "mlflow.db")
    for _ in range(3):  # the second and the third have nothing to do
        run_id = send(store, tracker._folder).run_id
    client = client_of(store)
    (run,) = client.search_runs([store.experiment_id])
    assert run.info.run_id == run_id
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train_loss_final"] == 1.5
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == list(range(5))
    assert artifact_text(store, run_id, "adapter/model.safetensors", tmp_path / "1") == "weights"
    assert not weights.exists()
    kept = json.loads(artifact_text(store, run_id, "result.json", tmp_path / "2"))
    assert kept["mlflow_run_id"] == run_id


def test_entries_that_are_sent_twice_are_there_once(store, tmp_path):
    """A sender is killed after the store took something and before it could note that: at every entry in turn."""
    spec, tracker = spec_of(), tracker_of(tmp_path, store, None)
    tracker.start(spec)
    tracker.log({"loss": 0.5}, 1)
    tracker.log({"loss": 0.25}, 2)
    row = tracker.record(result_of(spec))
    outbox = Outbox(tracker._folder)
    run_id = row.mlflow_run_id
    offsets = [offset for _, offset in outbox.after(0)]
    for offset in offsets[:-1]:
        outbox.note(Sent(store_label(store), offset=offset, run_id=run_id, closed=False))
        assert send(store, tracker._folder).run_id == run_id
    client = client_of(store)
    (run,) = client.search_runs([store.experiment_id])
    assert run.info.status == "FINISHED"
    assert [(point.step, point.value) for point in client.get_metric_history(run_id, "loss")] == [(1, 0.5), (2, 0.25)]


def test_a_run_whose_creation_was_not_noted_is_found_again(store, tmp_path):
    spec, tracker = spec_of(), tracker_of(tmp_path, store, None)
    run_id = tracker.start(spec)
    outbox = Outbox(tracker._folder)
    token = next(outbox.after(0))[0]["token"]
    outbox.note(Sent(store_label(store), creating=token))
    assert send(store, tracker._folder).run_id == run_id
    assert len(client_of(store).search_runs([store.experiment_id])) == 1


def test_a_trial_that_starts_again_leaves_one_open_run_and_the_other_killed(store, tmp_path):
    parent = start_sweep(store, "small", tags={}, files={})
    spec, first = spec_of(), tracker_of(tmp_path, store, parent)
    killed = first.start(spec)
    again = type(first)(store, parent, "small", first._folder)
    run_id = again.start(spec)
    assert run_id != killed
    row = again.record(result_of(spec))
    assert (row.mlflow_run_id, row.untracked) == (run_id, None)
    status = {run: client_of(store).get_run(run).info.status for run in (killed, run_id)}
    assert status == {killed: "KILLED", run_id: "FINISHED"}


def test_an_attempt_that_was_replaced_while_the_store_was_away_makes_no_run(store, tmp_path):
    away(tmp_path)
    spec, first = spec_of(), tracker_of(tmp_path, store, None)
    first.start(spec)
    first.log({"loss": 9.0}, 1)
    again = type(first)(store, None, "small", first._folder)
    again.start(spec)
    again.log({"loss": 1.0}, 1)
    again.record(result_of(spec))
    (tmp_path / "away.db").rename(tmp_path / "mlflow.db")
    run_id = send(store, first._folder).run_id
    client = client_of(store)
    (run,) = client.search_runs([store.experiment_id])
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert [point.value for point in client.get_metric_history(run_id, "loss")] == [1.0]


def test_an_artifact_that_is_gone_stops_nothing(store, tmp_path, caplog):
    away(tmp_path)
    spec, tracker = spec_of(), tracker_of(tmp_path, store, None)
    tracker.start(spec)
    file = tracker._folder / "answers.jsonl"
    file.write_text("{}")
    tracker.artifact(file, "evaluation")
    tracker.record(result_of(spec))
    file.unlink()
    (tmp_path / "away.db").rename(tmp_path / "mlflow.db")
    assert send(store, tracker._folder).closed
    assert "is gone before the tracking store got it" in caplog.text


def test_two_senders_do_not_meet(store, tmp_path, monkeypatch):
    monkeypatch.setattr("ray_peft.store.tracking.sending.BUSY_S", 0.1)
    tracker = tracker_of(tmp_path, store, None)
    tracker.start(spec_of())
    tracker.log({"loss": 1.0}, 1)
    with Outbox(tracker._folder).sending(0.0), pytest.raises(TrackingError, match="another process is sending"):
        send(store, tracker._folder)


def test_credentials_stay_out_of_the_outbox(store, tmp_path):
    tracker = tracker_of(tmp_path, store, None)
    tracker.start(spec_of(path="https://me:secret@host/rows.jsonl"))
    for name in os.listdir(tracker._folder):
        assert "secret" not in (tracker._folder / name).read_text()


def test_a_server_that_takes_connections_and_never_answers_holds_up_no_trial(tmp_path, monkeypatch):
    monkeypatch.setattr("ray_peft.store.tracking.trial_run.ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = Store(f"http://127.0.0.1:{silent.getsockname()[1]}", "1", "comparison", "mlflow-artifacts:/1")
        spec, tracker = spec_of(), tracker_of(tmp_path, store, None)
        tracker.start(spec)  # imports mlflow
        began = time.monotonic()
        others = [tracker_of(tmp_path, store, None) for _ in range(2)]
        assert [other.start(spec) for other in others] == [None, None]
        rows = [other.record(result_of(spec)) for other in others]
        assert time.monotonic() - began < 10
    assert [row.untracked for row in rows] == ["it is still being sent"] * 2


def test_a_store_that_is_away_is_asked_once_for_all_trials(store, tmp_path):
    away(tmp_path)
    trackers = {name: tracker_of(tmp_path, store, None) for name in ("first", "second")}
    for tracker in trackers.values():
        tracker.start(spec_of())
        tracker.record(result_of(spec_of()))
    unsent = Unsent(store, lambda name: trackers[name]._folder, "parent", Silence())
    for name in trackers:
        unsent.add(name, "away")
    lacking = unsent.close(0.2)
    assert unsent.away
    assert lacking["first"].startswith("no tracking store at")
    assert lacking["second"] == "away"
