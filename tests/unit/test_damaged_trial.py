"""Whatever file of an interrupted trial is damaged, the trial goes on or begins anew, and its row is the same."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import tiny
from gone_on import assert_same_trial, attempt
from untracked import HYBRID

from ray_peft.cli import main
from ray_peft.engine import checkpoint
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft import trl_checkpoints
from ray_peft.trial.stages import STAGE_FILE

STEPS = 10
RELEASED = Path(__file__).resolve().parents[1] / "assets" / "0.1.0"
DAMAGES = ("removed", "emptied", "halved", "flipped")


def damage(file, kind):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if kind == "removed":
        file.unlink()
    else:
        file.write_bytes({"emptied": b"", "halved": content[: len(content) // 2], "flipped": content}[kind])


@pytest.fixture(scope="module")
def spec(tiny_model, questions):
    changes = {"train__steps": STEPS, "train__checkpoint_every": 1, "evaluation__generate": False}
    return TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, HYBRID, **changes))


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory):
    """An undisturbed trial: its folder, row and points."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *attempt(spec, folder)


@pytest.fixture(scope="module")
def stopped(spec, tmp_path_factory):
    """The folder of a trial that was stopped in its second stage, after its eighth step."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        attempt(spec, folder, stop_at=9)
    return folder


FILES = {
    "metrics.jsonl": 8,
    "result.json": 8,
    "stage1/checkpoint-3/state.pt": 8,
    "stage1/checkpoint-4/state.pt": 8,
    "stage1_adapter/README.md": 4,
    "stage1_adapter/adapter_config.json": 4,
    "stage1_adapter/adapter_model.safetensors": 4,
    "stage1_adapter/sealed.json": 4,
    "stage1_adapter/stage.json": 4,
    "stage2/checkpoint-2/state.pt": 8,
    "stage2/checkpoint-3/state.pt": 7,
}
"""All files of such a folder, and the step from which the trial goes on without it."""


def test_the_table_names_every_file(stopped):
    assert sorted(path.relative_to(stopped).as_posix() for path in stopped.rglob("*") if path.is_file()) == sorted(
        FILES
    )


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        pytest.param(file, kind, marks=[] if (place - number) % len(DAMAGES) == 0 else pytest.mark.long)
        for place, file in enumerate(FILES)
        for number, kind in enumerate(DAMAGES)
    ],
)
def test_a_damaged_file_costs_steps_but_no_number(spec, whole, stopped, tmp_path, file, kind, caplog):
    folder = tmp_path / "trial"
    shutil.copytree(stopped, folder)
    damage(folder / file, kind)
    with caplog.at_level(logging.WARNING), tiny.one_thread():
        row, points = attempt(spec, folder)
    assert row.resumed_from_step == FILES[file]
    assert_same_trial(folder, row, points, whole)
    read = file.startswith("stage") and FILES[file] < 8
    assert caplog.text.count("is not whole") == read


def test_with_all_checkpoints_damaged_the_trial_begins_anew(spec, whole, stopped, tmp_path, caplog):
    folder = tmp_path / "trial"
    shutil.copytree(stopped, folder)
    for file in [*folder.glob("stage*/checkpoint-*/*"), folder / "stage1_adapter" / STAGE_FILE]:
        damage(file, "emptied")
    with caplog.at_level(logging.WARNING), tiny.one_thread():
        row, points = attempt(spec, folder)
    assert row.resumed_from_step is None
    assert_same_trial(folder, row, points, whole)
    assert "no checkpoint is whole, so the stage starts anew" in caplog.text


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_report_is_written_whatever_became_of_the_files_of_finished_trials(tmp_path, kind):
    folder = tmp_path / "out"
    shutil.copytree(RELEASED, folder)
    for file in [path for path in folder.glob("trials/*/*") if path.is_file()]:
        damage(file, kind)
    assert main(["report", str(folder)]) == 0
    trials = [path.name for path in (RELEASED / "trials").iterdir()]
    assert len((folder / "report.csv").read_text(encoding="utf-8").splitlines()) == 1 + len(trials)


@pytest.fixture(scope="module")
def stock(tiny_model, questions, tmp_path_factory):
    """A trial of TRL's own trainer, stopped after its seventh step, and one that nobody stopped."""
    method = {"name": "galore", "rank": 4, "lr": 0.01, "update_proj_gap": 4, "weights": "float32"}
    changes = {"train__steps": STEPS, "train__checkpoint_every": 2, "train__engine": "trl"}
    plain = tiny.plain_spec(tiny_model, questions, method, evaluation__generate=False, **changes)
    spec = TrialSpec.from_plain(plain)
    undisturbed, folder = (tmp_path_factory.mktemp(name) for name in ("whole_stock", "stock"))
    row, points = attempt(spec, undisturbed)
    with pytest.raises(KeyboardInterrupt):
        attempt(spec, folder, stop_at=7)
    return spec, folder, (undisturbed, row, points)


def test_a_stock_trial_that_is_stopped_is_the_undisturbed_one(stock, tmp_path):
    spec, folder, whole = stock
    shutil.copytree(folder, tmp_path / "trial")
    row, points = attempt(spec, tmp_path / "trial")
    assert row.resumed_from_step == 6
    assert_same_trial(tmp_path / "trial", row, points, whole)


def test_a_damaged_file_of_a_stock_checkpoint_is_told_and_the_one_before_is_used(stock, tmp_path, caplog):
    _, folder, _ = stock
    stage = folder / "stage1"
    assert [path.name for path in checkpoint.numbered(stage)] == ["checkpoint-6", "checkpoint-4"]
    files = [path.name for path in (stage / "checkpoint-6").iterdir()]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"} <= set(files)
    for name in files:
        for kind in DAMAGES:
            copy = tmp_path / f"{name}-{kind}"
            shutil.copytree(stage, copy)
            damage(copy / "checkpoint-6" / name, kind)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                assert trl_checkpoints.last_checkpoint(copy).name == "checkpoint-4", (name, kind)
            assert caplog.text.count("checkpoint-6 is not whole") == 1, (name, kind)
            shutil.rmtree(copy)
