"""The command line as a person meets it: exit codes, one clear error, any console."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny
import yaml

from ray_peft import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def space(tiny_model, questions, tmp_path, monkeypatch):
    """A function that writes a search space into the current, empty folder, where outputs would go."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_PEFT_OUTPUTS")

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
        ({"method": {"name": "qlora_galore"}, "train__steps": 1}, "leaves GaLore without a step"),
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "nonsense"], "--set nonsense: must be key.path=value"),
        (["--tracking-uri", "file:./runs"], "is neither sqlite:///FILE nor http(s)://HOST:PORT"),
        (["--tracking-uri", "http://me:secret@127.0.0.1:9"], "no MLflow server answers at http://***@127.0.0.1:9"),
        (["--address", "127.0.0.1:9", "--tracking-uri", "sqlite:///s.db"], "the Ray cluster at 127.0.0.1:9 cannot be"),
        (["--out", "space.yaml", "--tracking-uri", "sqlite:///s.db"], "space.yaml: cannot be written: File exists"),
    ],
)
def test_a_wrong_option_is_one_clear_error_before_anything_starts(space, tmp_path, capsys, options, words):
    name = space()
    for command in ("sweep", "run"):
        assert words in refused(capsys, command, name, *options)
    assert not list(tmp_path.glob("outputs/*/*.json*"))
    assert not (tmp_path / "outputs" / "mlflow.db").exists()


def test_the_ui_needs_a_store_and_a_free_port(space, tmp_path, capsys, empty_database):
    assert "no tracking store at" in refused(capsys, "ui")
    assert not list(tmp_path.iterdir())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = refused(capsys, "ui", "--tracking-uri", f"sqlite:///{empty_database}", "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}" in said


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


def stopped(name: str, with_signal: signal.Signals, *options: str) -> str:
    """What a sweep prints, as a process on a GBK console, that gets a signal as soon as LoRA trains."""
    out = Path("out \u2603")  # GBK has no snowman
    environment = {**os.environ, "PYTHONIOENCODING": "gbk", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ray_peft", "sweep", name, "--out", str(out), *options]
    before = sum(log.stat().st_size for log in out.glob("trials/lora*/metrics.jsonl"))
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 150
        while process.poll() is None and time.monotonic() < deadline:
            trained = sum(log.stat().st_size for log in out.glob("trials/lora*/metrics.jsonl")) > before
            if trained and (out / "results.jsonl").exists():
                break
            time.sleep(0.1)
        if with_signal == signal.SIGINT:
            os.killpg(process.pid, with_signal)  # a terminal sends it to Ray's processes too
        else:
            process.send_signal(with_signal)
        output = process.communicate(timeout=90)[0].decode("gbk")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "out \\u2603" in output
    assert output.strip().endswith("interrupted; the same command runs the missing trials")
    return output


def outcome() -> tuple[list[tuple[str, str]], Counter[str]]:
    """Method and status of every row, and how many MLflow runs have which status."""
    from mlflow import MlflowClient

    rows = [json.loads(line) for line in Path("out \u2603/results.jsonl").read_text().splitlines()]
    client = MlflowClient(tracking_uri=f"sqlite:///{Path('outputs/mlflow.db').absolute()}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    status = Counter(f"{run.data.tags.get('ray_peft.method', 'sweep')} {run.info.status}" for run in runs)
    return [(row["spec"]["method"]["name"], row["status"]) for row in rows], status


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(space, ray_cluster):
    """First Ctrl-C with a Ray of its own; then SIGTERM, as of `ray job stop`, on a cluster that it joins."""
    import ray

    name = space(method={"grid": [{"name": "none"}, {"name": "lora", "rank": 4}]}, train__steps=20000)
    assert "[1/2] none" in stopped(name, signal.SIGINT)
    kept = [("none", "finished"), ("lora", "cancelled")]
    assert outcome() == (kept, Counter({"sweep KILLED": 1, "none FINISHED": 1, "lora KILLED": 1}))

    address = ray.get_runtime_context().gcs_address
    assert "2 trials, 1 finished before" in stopped(name, signal.SIGTERM, "--address", address)
    kept.append(("lora", "cancelled"))
    assert outcome() == (kept, Counter({"sweep KILLED": 1, "none FINISHED": 1, "lora KILLED": 2}))
    assert ray.is_initialized()  # a joined cluster is left, not stopped
    assert ray.cluster_resources()["CPU"] >= 2


def test_doctor_prints_on_any_console(capsys):
    assert cli.main(["doctor"]) in (0, 1)
    capsys.readouterr().out.encode("gbk")


def test_numbers_of_gpus_that_no_machine_has_are_refused(space, capsys):
    name = space()
    for option, number in (("--gpus", "0"), ("--gpus", "-1"), ("--gpu-memory-gib", "nan"), ("--gpu-memory-gib", "inf")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["plan", name, f"{option}={number}"])
        assert ended.value.code == 2
        assert f"{option}: must be a" in capsys.readouterr().err
    assert cli.main(["plan", name, "--gpu", "Voodoo 2"]) == 2
    assert "--gpu Voodoo 2: the known ones are" in capsys.readouterr().err
    assert cli.main(["plan", name, "--gpu", "Voodoo 2", "--gpu-memory-gib", "8"]) == 0


def test_a_plan_predicts_memory_places_trials_and_says_what_fits_instead(space, capsys):
    """0.9 GiB is less than the CUDA context and the margin leave this trial; 8 GiB hold several of it."""
    name = space(train__batch_size=8, train__micro_batch_size=8, data__max_length=96, resources={})
    assert cli.main(["plan", name, "--json", "--gpu-memory-gib", "8", "--gpus", "1", "--cpus", "6"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["predicted_peak_gib"] == pytest.approx(sum(row["components"].values()), abs=1e-3)
    assert row["fits"]
    assert 0 < row["gpu_fraction"] < 0.5
    assert row["cpus_per_worker"] == 1  # a share of six cores, as of the GPU
    assert row["order"] == 1
    assert row["suggestions"] == []
    assert cli.main(["plan", name, "--gpu-memory-gib", "0.9"]) == 0
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert "train.micro_batch_size: 1" in text
    assert "0 of 1 trials fit 0.9 GiB" in text
    assert "1 of a GPU and " in text
    assert cli.main(["plan", name, "--gpu-memory-gib", "0.9", "--strict"]) == 1


def test_a_plan_of_trials_on_the_cpu_says_so_and_what_they_would_take(space, capsys):
    name = space(resources={"gpus_per_worker": 0, "cpus_per_worker": 2})
    assert cli.main(["plan", name, "--gpu-memory-gib", "8"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"  peak \d\.\d\d GiB, 2 CPU cores, (time not measured yet|.* s a step\))\n", text)
    assert "1 of 1 trials fit 8 GiB; at most 1 at once" in text


def test_a_plan_says_what_the_machine_can_never_hold(space, capsys):
    name = space(resources={"num_workers": 2})
    assert cli.main(["plan", name, "--gpu-memory-gib", "8"]) == 0
    assert "DOES NOT FIT: trial lora-" in capsys.readouterr().out
    assert cli.main(["plan", name, "--gpu-memory-gib", "8", "--json", "--strict"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row["fits"] is False
    assert "needs 2 GPUs (2 workers of 1), but there are 1 here" in row["problem"]
