"""What a sweep's folder tells of running trials, and what `ray-peft watch` makes of it."""

from __future__ import annotations

import io
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from tracked import result_of, spec_of
from untracked import Notes

from ray_peft import cli, cli_live
from ray_peft.errors import DataError
from ray_peft.spec import TrialSpec
from ray_peft.store import progress
from ray_peft.store.ledger import Ledger, SweepRecord
from ray_peft.store.progress import Progress, Reader, TrialProgress
from ray_peft.trial import live, trial
from ray_peft.trial.live import LIVE_FILE, Live


@pytest.fixture
def sweep(tmp_path):
    """A sweep of three trials: one has its row, one runs, one waits."""
    specs = [spec_of(seed) for seed in range(3)]
    ledger = Ledger(tmp_path / "sweep")
    ledger.folder.mkdir()
    ledger.write_record(SweepRecord("names \u00fc \u8bd5", "", planned=[spec.trial_id for spec in specs]))
    ledger.add(result_of(specs[0]))
    folder = ledger.trial_folder(specs[1].trial_id)
    folder.mkdir(parents=True)
    return ledger, specs, folder


def told(folder: Path, spec: TrialSpec, monkeypatch: pytest.MonkeyPatch) -> Live:
    """A trial that has logged steps 10 and 20 of 100, 640 tokens and 2 seconds apart."""
    seconds = iter([50.0, 52.0])
    with monkeypatch.context() as patch:
        patch.setattr(live.time, "monotonic", lambda: next(seconds))
        writer = Live(folder, spec, "cpu")
        for step in (10, 20):
            writer.log({"train_loss": 30.0 - step}, step)
            writer.count(step, step * 64)
    writer.steps, writer.phase = 100, lambda: "train"
    return writer


def test_a_running_trial_tells_its_step_loss_speed_and_time_left(sweep, monkeypatch):
    ledger, specs, folder = sweep
    writer = told(folder, specs[1], monkeypatch)
    writer.beat()
    finished, running, waiting = Reader(ledger.folder).read().trials
    assert (finished.state, running.state, waiting.state) == ("finished", "train", "waiting")
    assert (running.step, running.steps, running.loss, running.tokens_per_s) == (20, 100, 10.0, 320.0)
    assert running.left_s == pytest.approx(16.0, abs=1.0)  # 80 steps at 5 a second
    assert running.memory_gib is not None
    assert running.memory_gib > 0.01
    writer.close()
    writer.beat()
    assert not (folder / LIVE_FILE).exists()


def test_trials_are_written_again_after_their_writer_died(sweep, monkeypatch):
    _, specs, folder = sweep
    monkeypatch.setattr(live, "BEAT_S", 0.01)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(live, "_BEATS", live._Beats())

    def written(writer: Live) -> bool:
        until = time.monotonic() + 5
        while not (folder / LIVE_FILE).exists() and live._BEATS._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.005)
        writer.close()
        return live._BEATS._thread.is_alive()

    broken = Live(folder, specs[1], "cpu")
    broken.phase = lambda: 1 / 0
    assert not written(broken)
    assert written(Live(folder, specs[1], "cpu"))


def test_a_trial_or_driver_that_was_killed_is_silent(sweep, monkeypatch):
    ledger, specs, folder = sweep
    told(folder, specs[1], monkeypatch).beat()
    with progress.driving(ledger.folder):
        said = (ledger.folder / progress.DRIVER_FILE).read_text()
        assert Reader(ledger.folder).read().driver == "running"
    assert Reader(ledger.folder).read().driver == "ended"
    (ledger.folder / progress.DRIVER_FILE).write_text(said)  # as kill -9 leaves it
    now = time.time()
    monkeypatch.setattr(progress.time, "time", lambda: now + 2 * progress.SILENT_S)
    seen = Reader(ledger.folder).read()
    assert seen.driver == "silent"
    assert seen.ended
    assert seen.trials[1].state == "silent"


def test_rows_are_read_as_they_come(sweep):
    ledger, specs, _ = sweep
    reader = Reader(ledger.folder)
    assert [trial.state for trial in reader.read().trials] == ["finished", "waiting", "waiting"]
    line = json.dumps(result_of(specs[1], status="failed").row())
    with (ledger.folder / "results.jsonl").open("a") as file:
        file.write(line[:40])
        file.flush()
        assert reader.read().trials[1].state == "waiting"
        file.write(line[40:] + "\n")
    assert reader.read().trials[1].state == "failed"


def test_a_real_trial_writes_its_file_while_it_trains(tiny_model, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "BEAT_S", 0.01)
    spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions))
    seen: list[dict[str, Any]] = []

    def look(metrics: Any, step: int) -> None:
        until = time.monotonic() + 10
        while "train_loss" in metrics and time.monotonic() < until:
            file = tmp_path / "trial" / LIVE_FILE
            said = json.loads(file.read_text()) if file.is_file() else {}
            if said.get("step") == step:
                seen.append(said)
                return
            time.sleep(0.01)

    row = trial.run(spec, trial.Place(tmp_path / "trial", "cpu"), Notes(), look)
    assert row is not None
    assert row.status == "finished", row.error
    assert [(said["step"], said["steps"], said["phase"]) for said in seen] == [(n, 4, "train") for n in range(1, 5)]
    assert seen[-1]["metrics"]["train_loss"] == pytest.approx(row.train_loss_final)
    assert seen[-1]["tokens_per_s"] > 0
    assert not (tmp_path / "trial" / LIVE_FILE).exists()


def test_the_table_is_plain_ascii_and_says_what_waits():
    running = TrialProgress("a1", "lora", "train", 20, 100, 1.23456, 320.4, 10.04, 40.0, 6000.0)
    trials = [running, TrialProgress("b2"), replace(running, trial_id="c3", state="failed", step=100, left_s=None)]
    lines = cli_live.table(Progress("\u8bd5", "running", trials))
    lines[0].encode("ascii")
    assert lines[0].endswith("3 trials: 1 running, 0 finished, 1 not finished, 1 waiting")
    assert " ".join(lines[2].split()) == "a1 lora train 20/100 1.2346 320 10.0 of 40.0 1 h 40 min"
    assert lines[3].split() == ["c3", "lora", "failed", "100", "1.2346", "320", "10.0", "of", "40.0"]
    assert "1 not run; its driver is silent" in cli_live.table(Progress("x", "silent", trials))[0]


def test_rows_that_were_set_aside_are_no_longer_shown(sweep):
    ledger, _, _ = sweep
    reader = Reader(ledger.folder)
    assert [trial.state for trial in reader.read().trials] == ["finished", "waiting", "waiting"]
    (ledger.folder / "results.jsonl").rename(ledger.folder / "results-before.jsonl")
    assert [trial.state for trial in reader.read().trials] == ["waiting"] * 3


def test_watch_ends_with_the_sweep(sweep, monkeypatch, capsys):
    ledger, specs, folder = sweep
    with progress.driving(ledger.folder):
        looks = iter(range(2))

        def later(_: float) -> None:
            next(looks)
            ledger.add(result_of(specs[1]))
            ledger.add(result_of(specs[2]))
            (ledger.folder / progress.DRIVER_FILE).write_text(json.dumps({"state": "ended", "at": 0}))

        monkeypatch.setattr(cli_live, "time", SimpleNamespace(sleep=later))
        assert cli.main(["watch", str(ledger.folder), "--json"]) == 0
    first, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [trial["state"] for trial in first["trials"]] == ["finished", "waiting", "waiting"]
    assert [trial["state"] for trial in last["trials"]] == ["finished"] * 3


def test_a_cancelled_trial_ends_at_its_next_step_as_a_row(tiny_model, questions, tmp_path, capsys):
    spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions))
    ledger = Ledger(tmp_path / "sweep")
    ledger.folder.mkdir()
    ledger.write_record(SweepRecord("small", "", planned=[spec.trial_id, "waits"]))
    folder = ledger.trial_folder(spec.trial_id)
    logged: list[int] = []

    def ask(metrics: Any, step: int) -> None:
        logged.append(step)
        if step == 2:
            assert cli.main(["ctl", str(ledger.folder), "cancel", spec.trial_id]) == 0

    with progress.driving(ledger.folder):
        row = trial.run(spec, trial.Place(folder, "cpu"), Notes(), ask)
        assert row is not None
        assert (row.status, row.error, logged[-1]) == ("cancelled", "cancelled by `ray-peft ctl`", 2)
        again = trial.run(spec, trial.Place(folder, "cpu"), Notes(), ask)
        assert again is not None
        assert (again.status, logged[-1]) == ("cancelled", 2)  # before its first step
        ledger.add(row)
        for wrong, word in ((spec.trial_id, "has ended by itself: cancelled"), ("no-such", "has no trial no-such")):
            assert cli.main(["ctl", str(ledger.folder), "cancel", wrong]) == 2
            assert word in capsys.readouterr().err
    with progress.driving(ledger.folder):  # the sweep, run again
        fresh = trial.run(spec, trial.Place(folder, "cpu"), Notes(), lambda metrics, step: None)
    assert fresh is not None
    assert fresh.status == "finished"
    assert cli.main(["ctl", str(ledger.folder), "cancel", "waits"]) == 2
    assert "the sweep does not run" in capsys.readouterr().err
    assert cli.main(["ctl", str(ledger.folder), "show", "waits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"][0]["state"] == "waiting"


def test_a_folder_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no sweep"):
        Reader(tmp_path)


def test_watch_prints_on_a_console_of_chinese_windows(sweep, monkeypatch):
    ledger, *_ = sweep
    console = io.TextIOWrapper(io.BytesIO(), encoding="gbk", errors="strict")
    monkeypatch.setattr("sys.stdout", console)
    assert cli_live._watch(cli._parser().parse_args(["watch", str(ledger.folder), "--once"])) == 0
