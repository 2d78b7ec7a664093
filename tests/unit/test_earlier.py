"""Rows that earlier runs left: which of them answer today's trials, and what is said of the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import released
import yaml

from ray_peft.checks.inspector import Inspector
from ray_peft.checks.trials import inspect_trials
from ray_peft.console import Console
from ray_peft.report.files import write_report
from ray_peft.space.read import load
from ray_peft.store.earlier import Earlier, recall
from ray_peft.store.results_file import read_results
from ray_peft.trial.result import TrialResult


@pytest.fixture(scope="module")
def inputs(shared: Path) -> Path:
    """The search space of the released stores, with its files."""
    return released.write_inputs(shared / "released")


def today(space: Path, rows: list[TrialResult], overrides: list[str] | None = None) -> Earlier:
    """The trials of a search space beside rows."""
    inspector = Inspector()
    checked = inspect_trials(load(space, overrides).trials, Console(quiet=True), inspector)
    return recall(checked.trials, rows, inspector)


@pytest.fixture
def copied(inputs, tmp_path) -> Path:
    """The same search space in a folder of its own, whose files can be changed."""
    shutil.copytree(inputs.parent, tmp_path / "copied")
    space = tmp_path / "copied" / "released.yaml"
    space.write_text(inputs.read_text().replace(str(inputs.parent), str(space.parent)))
    return space


@pytest.mark.parametrize("release", sorted(path.name for path in released.STORES.iterdir()))
def test_rows_of_every_release_count_as_finished_wherever_their_files_were(release, inputs):
    rows = read_results(released.STORES / release)
    found = today(inputs, rows)
    assert [trial.method.name for trial in found.trials] == ["none", "lora", "lora", "ensemble"]
    assert [trial.trial_id for trial in found.trials] == [row.trial_id for row in rows]
    assert list(found.finished) == [row.trial_id for row in rows]
    assert found.notes == []
    ensemble = found.trials[-1]
    assert [member.trial_id for member in ensemble.members()] == list(rows[-1].members)
    # Written again under today's keys, they count from then on like any other row.
    assert found.renewed == list(found.finished.values())
    again = today(inputs, found.renewed)
    assert (list(again.finished), again.renewed) == (list(found.finished), [])


@pytest.mark.parametrize("release", sorted(path.name for path in released.STORES.iterdir()))
def test_the_report_of_every_release_can_be_written_again(release, tmp_path):
    shutil.copytree(released.STORES / release, tmp_path / release)
    write_report(tmp_path / release)
    assert "lora rank=1" in (tmp_path / release / "report.md").read_text()


def test_changed_rows_under_the_same_name_run_again_and_that_is_said(copied):
    rows = read_results(released.STORES / "0.1.0")
    file = copied.with_name("rows.jsonl")
    file.write_text(file.read_text().replace("two and one.", "one and two."))
    found = today(copied, rows)
    assert found.finished == {}
    assert not {trial.trial_id for trial in found.trials} & {row.trial_id for row in rows}
    assert found.notes == ["3 trials run again: their rows changed since; the earlier results are kept"]


def test_a_changed_model_under_the_same_name_is_said(copied):
    config = copied.parent / "model" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    found = today(copied, read_results(released.STORES / "0.1.0"))
    assert found.notes == ["3 trials run again: their model changed since; the earlier results are kept"]


def test_a_new_question_is_no_changed_file(inputs):
    found = today(inputs, read_results(released.STORES / "0.1.0"), ["train.steps=3", "data.max_length=60"])
    assert (found.finished, found.notes) == ({}, [])


def test_other_rows_beside_known_ones_are_no_changed_file(copied):
    """Two data files in one grid: the rows of one say nothing about the other."""
    plain = yaml.safe_load(copied.read_text())
    (source,) = plain["data"]["sources"]
    other = copied.parent / "more" / "rows.jsonl"
    other.parent.mkdir()
    other.write_text(Path(source["path"]).read_text().replace("two and one.", "one and two."))
    plain["method"] = {"name": "none"}
    plain["data"]["sources"] = {"grid": [[source], [{**source, "path": str(other)}]]}
    copied.write_text(yaml.safe_dump(plain))
    found = today(copied, read_results(released.STORES / "0.1.0"))
    assert (len(found.trials), len(found.finished), found.notes) == (2, 1, [])


def test_unfinished_rows_answer_nothing(inputs):
    rows = read_results(released.STORES / "0.1.0")
    broken = [row.model_copy(update={"status": "failed"}) for row in rows[:2]]
    found = today(inputs, [*broken, *rows[2:]])
    assert list(found.finished) == [rows[2].trial_id]  # and not the ensemble, one of whose members runs again


def test_a_comment_the_cores_and_the_retries_make_no_trial_run_again(copied):
    rows = read_results(released.STORES / "0.1.0")
    copied.write_text("# one comment more\n" + copied.read_text())
    changes = ["resources.cpus_per_worker=2", "resources.max_failures=0", "train.checkpoint_every=1"]
    found = today(copied, rows, changes)
    assert (list(found.finished), found.notes) == ([row.trial_id for row in rows], [])


def test_rows_of_a_pass_make_no_trial_run_again_where_no_loss_depends_on_them(inputs):
    rows = read_results(released.STORES / "0.1.0")
    found = today(inputs, rows, ["train.micro_batch_size=2"])
    assert list(found.finished) == [row.trial_id for row in rows]
    assert [trial.trial_id for trial in found.trials] == [row.trial_id for row in rows]
    (note,) = found.notes
    assert note.startswith("4 trials count as finished that ran with other rows a pass")
    # In bf16 sums are rounded otherwise, and the draws of dropout depend on the rows of a pass.
    bf16 = [
        row.model_copy(update={"spec": row.spec.changed({"train.precision": "bf16"}).under(row.trial_id)})
        for row in rows[:3]
    ]
    assert today(inputs, bf16, ["train.precision=bf16"]).finished != {}
    assert today(inputs, bf16, ["train.precision=bf16", "train.micro_batch_size=2"]).finished == {}
    lora = rows[1].spec.changed({"method.dropout": 0.1}).under(rows[1].trial_id)
    dropped = [rows[1].model_copy(update={"spec": lora})]
    method = "method={name: lora, rank: 2, lr: 0.01, dropout: 0.1}"
    assert list(today(inputs, dropped, [method]).finished) == [rows[1].trial_id]
    assert today(inputs, dropped, [method, "train.micro_batch_size=2"]).finished == {}


def test_trials_that_compare_rows_of_a_pass_stay_apart(inputs):
    rows = read_results(released.STORES / "0.1.0")
    found = today(inputs, rows, ["method={name: none}", "train.micro_batch_size={grid: [1, 2]}"])
    assert (len(found.trials), found.finished) == (2, {})
    found = today(inputs, rows, ["method={name: none}", "train.micro_batch_size={grid: [2, 4]}"])
    assert (len(found.trials), list(found.finished)) == (2, [rows[0].trial_id])
