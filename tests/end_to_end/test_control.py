"""`ray-peft ctl` on a running sweep: trials that are cancelled, run again, cloned and added, and a pause."""

from __future__ import annotations

import json
import os
import stat
import threading

import pytest
import tiny
import yaml
from tracked import wait_for

import ray_peft
from ray_peft import cli
from ray_peft.store.progress import Reader
from ray_peft.store.results_file import read_results

LONG = {"name": "lora", "rank": 4, "lr": 0.01}
STEPS = 100
SHORT = {"name": "lora", "rank": 2, "lr": 0.01}


@pytest.fixture
def files(tiny_model, questions, tmp_path):
    """A sweep of one long trial, and a file with a further one beside the same."""

    def write(name, *methods):
        plain = tiny.plain_spec(tiny_model, questions, {"grid": list(methods)}, train__steps=STEPS)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, **plain}), encoding="utf-8")
        return path

    return write("main", LONG), write("more", LONG, SHORT)


def test_a_running_sweep_is_changed_and_remembers_it(ray_cluster, shared, files, tmp_path, capsys):
    space, more = files
    folder = tmp_path / "out"
    outcomes = []
    sweep = threading.Thread(target=lambda: outcomes.append(ray_peft.sweep(space, out=folder)))
    sweep.start()

    def progress():
        return Reader(folder).read() if (folder / "sweep.json").is_file() else None

    def trial(trial_id):
        return next(trial for trial in progress().trials if trial.trial_id == trial_id)

    def ctl(*arguments):
        capsys.readouterr()
        code = cli.main(["ctl", str(folder), *arguments, "--json"])
        told = capsys.readouterr()
        return json.loads(told.out) if code == 0 else (code, told.err)

    wait_for(lambda: progress() and progress().trials and (progress().trials[0].step or 0) >= 2, 200)
    (long,) = [trial.trial_id for trial in progress().trials]
    if os.name != "nt":
        assert stat.S_IMODE((folder / "control").stat().st_mode) == 0o700

    assert ctl("pause")["action"] == "pause"  # what follows has time
    assert "paused already" in ctl("pause")[1]
    wait_for(lambda: progress().driver == "paused" and trial(long).state == "waiting", 200)
    assert ctl("list")["driver"] == "paused"
    before = json.loads((folder / "trials" / long / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert 2 <= before < STEPS

    (clone,) = ctl("clone", long, "--set", "train.steps=3")["trials"]
    assert "has these settings already" in ctl("clone", long, "--set", "train.steps=3")[1]
    assert "unknown key, did you mean rank?" in ctl("clone", long, "--set", "method.rnak=3")[1]
    (warm,) = ctl("clone", long, "--warm", "--set", "train.steps=2")["trials"]
    assert "method.rank is 4" in ctl("clone", long, "--warm", "--set", "method.rank=8")[1]
    (added,) = ctl("add", str(more), "--set", "train.steps=2", "--set", f"method.grid=[{json.dumps(SHORT)}]")["trials"]
    assert "waits or runs" in ctl("requeue", long)[1]
    assert "has no trial nobody" in ctl("requeue", "nobody")[1]
    assert len({long, clone, warm, added}) == 4

    assert ctl("resume")["text"] == "the sweep goes on"
    wait_for(lambda: (trial(long).step or 0) > before, 200)
    assert ctl("cancel", long)["trials"] == [long]
    wait_for(lambda: trial(long).state == "cancelled", 200)
    assert ctl("requeue", long)["text"] == f"{long}: was cancelled, runs again"
    sweep.join(400)
    (outcome,) = outcomes
    assert outcome.finished
    rows = {row.trial_id: row for row in outcome.results}
    assert {name: row.steps for name, row in rows.items()} == {long: STEPS, clone: 3, warm: 2, added: 2}
    assert rows[long].resumed_from_step is not None
    assert {row.status for row in read_results(folder)} == {"finished"}
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert f"a clone of {long} with train.steps=3, from the same start" in report
    assert f"a clone of {long} with train.steps=2, warm: from its weights after step {before}" in report
    assert "started warm" in report
    assert rows[warm].spec.train.warm_start.plain() == {"trial": long, "step": before}
    first, first_warm = (
        json.loads((folder / "trials" / name / "metrics.jsonl").read_text().splitlines()[0])["train_loss"]
        for name in (clone, warm)
    )
    assert first_warm < first  # of the same rows
    code, told = ctl("pause")
    assert (code, "the sweep does not run" in told) == (2, True)

    again = ray_peft.sweep(space, out=folder)  # the same file, which does not name the others
    assert {row.trial_id for row in again.results} == {long, clone, warm, added}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["clone", "a"], "clone needs --set KEY=VALUE"),
        (["requeue"], "requeue takes a trial's id"),
        (["pause", "a"], "pause takes neither a trial nor a file"),
        (["cancel", "a", "--set", "x=1"], "cancel takes no --set"),
        (["clone", "a", "--set", "x=1", "--profile", "p"], "clone takes no --profile"),
        (["requeue", "a", "--warm"], "requeue takes no --warm"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, capsys, arguments, words):
    assert cli.main(["ctl", str(tmp_path), *arguments]) == 2
    assert words in capsys.readouterr().err
