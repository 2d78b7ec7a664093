"""kill -9 of the process that trains: the next attempt goes on, and MLflow shows the trial that nobody killed."""

from __future__ import annotations

import multiprocessing
import re
import time

import pytest
import tiny
from gone_on import logged, unheard
from tracked import client_of

from ray_peft.schedule.decide import Demand
from ray_peft.schedule.worker import Assignment, run_here
from ray_peft.spec import TrialSpec
from ray_peft.store.tracking import default_uri, open_store
from ray_peft.trial import trial
from ray_peft.trial.result import TrialResult

STEPS = 60


@pytest.fixture(scope="module")
def assignment_of(tiny_model, questions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    store = open_store(default_uri(folder), "killed", folder)
    changes = {"train__steps": STEPS, "train__checkpoint_every": 4, "train__eval_every": 10, "train__log_every": 3}
    plain = tiny.plain_spec(tiny_model, questions, evaluation__generate=False, **changes)
    plain["method"]["dropout"] = 0.1
    spec = TrialSpec.from_plain(plain)

    def assignment(name):
        return Assignment(spec, folder / name / spec.trial_id, store, None, name, Demand(1, 1, 0.0))

    return assignment


def curve(store, run_id):
    """Every point of a run that is the same in each attempt, in its order; times depend on what was measured before."""
    client = client_of(store)
    timed = re.compile(r"usage\.|predicted\.\w+_s$")
    names = [name for name in client.get_run(run_id).data.metrics if not timed.match(name)]
    points = {name: client.get_metric_history(run_id, name) for name in names if name != "resumed_from_step"}
    return {name: [(point.step, point.value) for point in history] for name, history in points.items()}


def test_a_worker_that_is_killed_twice_leaves_the_curve_of_the_undisturbed_one(assignment_of):
    undisturbed, killed = assignment_of("undisturbed"), assignment_of("stopped")
    whole = run_here(undisturbed, unheard)
    for last_step in (15, 39):
        worker = multiprocessing.get_context("spawn").Process(target=run_here, args=(killed, unheard))
        worker.start()
        until = time.monotonic() + 120
        while not _has_logged(killed, last_step):
            assert worker.is_alive()
            assert time.monotonic() < until
            time.sleep(0.01)
        worker.kill()
        worker.join()
        assert worker.exitcode == -9
        assert not (killed.folder / trial.RESULT_FILE).exists()
    row = run_here(killed, unheard)
    assert isinstance(row, TrialResult)
    assert isinstance(whole, TrialResult)
    assert row.status == "finished"
    assert row.resumed_from_step is not None
    assert row.resumed_from_step >= 36
    assert (row.steps, row.usage.train_tokens) == (STEPS, whole.usage.train_tokens)
    assert row.usage.peak_rss_gib is not None
    assert row.usage.train_s > 0
    expected, found = curve(undisturbed.store, whole.mlflow_run_id), curve(killed.store, row.mlflow_run_id)
    assert found.keys() == expected.keys()
    assert len(expected["train_loss"]) == 21
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], rel=1e-6), name
    assert len(logged(killed.folder)) == len(logged(undisturbed.folder))
    runs = client_of(killed.store).search_runs([killed.store.experiment_id], 'tags.`ray_peft.sweep` = "stopped"')
    assert sorted(run.info.status for run in runs) == ["FINISHED", "KILLED", "KILLED"]


def _has_logged(assignment, step):
    file = assignment.folder / "metrics.jsonl"
    return file.is_file() and f'"step": {step},' in file.read_text(encoding="utf-8")
