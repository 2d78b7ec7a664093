"""The command line as a person meets it: exit codes, one clear error, any console."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml

from ray_peft import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def space(tiny_model, questions, tmp_path, monkeypatch):
    """A function that writes a search space into the current, empty folder."""
    monkeypatch.chdir(tmp_path)

    def write(name="space.yaml", **changes):
        plain = tiny.plain_spec(tiny_model, questions, **changes)
        (tmp_path / name).write_text(yaml.safe_dump(plain), encoding="utf-8")
        return name

    return write


def refused(capsys, *arguments) -> str:
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


def source(path, **changes):
    return [{"recipe": "prompt_completion", "path": str(path), "train": 4, "test": 2, **changes}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__stesp": 3}, "train.stesp: unknown key, did you mean steps? (found 3), in 1 of 1 trials"),
        ({"train__steps": "ten"}, "train.steps: Input should be a valid integer (found 'ten')"),
        ({"data__sources": source("gone.jsonl")}, "gone.jsonl: no such file"),
        ({"data__sources": source("broken.jsonl")}, "broken.jsonl: line 2: not valid JSON"),
        ({"data__sources": source("empty.jsonl")}, "empty.jsonl: the file holds no rows"),
        ({"data__sources": source("shape.jsonl")}, "row 1 does not fit recipe prompt_completion"),
        ({"model__name": "./gone"}, "gone: no such folder"),
        ({"model__name": "./bare"}, "has no chat template"),
    ],
)
def test_bad_input_is_one_clear_error_before_anything_starts(space, tmp_path, tiny_model, capsys, changes, words):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"pro\n', encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "shape.jsonl").write_text('{"question": "a"}\n', encoding="utf-8")
    (tmp_path / "bare").mkdir()
    for file in Path(tiny_model).iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    for command in ("sweep", "plan"):
        assert words in refused(capsys, command, space(**changes))
    assert not (tmp_path / "outputs").exists()


def test_plan_prints_trials_and_json(space, capsys):
    name = space(method={"grid": [{"name": "none"}, {"name": "lora", "rank": {"grid": [4, 8]}}]})
    assert cli.main(["plan", name]) == 0
    text = capsys.readouterr().out
    assert "lora rank=4" in text
    assert "3 trials, checked" in text
    assert cli.main(["plan", name, "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)
    assert [trial["spec"]["method"]["name"] for trial in trials] == ["none", "lora", "lora"]
    assert len({trial["trial_id"] for trial in trials}) == 3


def test_run_takes_one_trial(space, capsys):
    name = space(seed={"grid": [1, 2]})
    assert "holds 2 trials, but a run takes one" in refused(capsys, "run", name)
    assert "give a YAML file, or --mlflow-run" in refused(capsys, "run")


def test_a_report_needs_a_sweep(tmp_path, capsys):
    assert "holds no results.jsonl" in refused(capsys, "report", str(tmp_path))


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(space, tmp_path, shared):
    """In mid-sweep, on a GBK console, as a process of its own with a Ray of its own."""
    name = space(method={"grid": [{"name": "none"}, {"name": "lora", "rank": 4}]}, train__steps=4000)
    command = [sys.executable, "-m", "ray_peft", "sweep", name, "--out", "out"]
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "gbk",
        "PYTHONPATH": str(ROOT),
        "RAY_PEFT_OUTPUTS": str(tmp_path / "outputs"),
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    log = tmp_path / "out" / "results.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (any((tmp_path / "out" / "trials").glob("lora*/metrics.jsonl"))) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=90)[0].decode("gbk")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, output
    assert "the same command runs the missing trials" in output
    assert "Traceback" not in output
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(row["spec"]["method"]["name"], row["status"]) for row in rows] == [
        ("none", "finished"),
        ("lora", "cancelled"),
    ]
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert sorted(run.info.status for run in runs) == ["FINISHED", "KILLED", "KILLED"]


def test_doctor_prints_on_any_console(capsys):
    assert cli.main(["doctor"]) in (0, 1)
    capsys.readouterr().out.encode("gbk")
