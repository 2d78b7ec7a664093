"""What is killed while trials train together, and while a search proposes them."""

from __future__ import annotations

import json
import signal
from collections import Counter

import pytest
import tiny
from killed import Sweep, write_space

PACK = {"grid": [{"name": "lora", "rank": rank, "lr": 0.001} for rank in (2, 4, 8)]}
STEPS = 40
LONGEST_S = 700
"""A second start of Ray and of a worker may take minutes on a busy machine."""
SEARCHED = {"name": "lora", "rank": 4, "lr": {"loguniform": [1.0e-4, 1.0e-2]}}


@pytest.fixture
def sweep(tiny_model, questions, tmp_path):
    """Starts a sweep with a checkpoint every 5 steps; what is left of one is ended after the test."""
    started = []

    def start(method, search=None, **changes):
        changes = {"train__steps": STEPS, "train__checkpoint_every": 5, "evaluation__generate": False, **changes}
        plain = tiny.plain_spec(tiny_model, questions, method, **changes) | ({"search": search} if search else {})
        space = write_space(tmp_path / "space.yaml", plain)
        started.append(Sweep(space, tmp_path / "out", f"sqlite:///{tmp_path / 'mlflow.db'}"))
        return started[-1]

    yield start
    for running in started:
        running.end()


def rows_of(running):
    """The last row of each trial, in the order of their first."""
    lines = (running.out / "results.jsonl").read_text().splitlines()
    return list({row["trial_id"]: row for row in map(json.loads, lines)}.values())


def check_whole(running, count):
    """Every trial has one finished row with each loss once, and nothing is left over."""
    rows = rows_of(running)
    assert [row["status"] for row in rows] == ["finished"] * count
    for row in rows:
        lines = (running.out / "trials" / row["trial_id"] / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines if "train_loss" in line] == list(range(1, STEPS + 1))
    assert "Traceback" not in running.output
    assert "[state-dump]" not in running.output  # of a raylet's log
    assert running.left() == []
    return rows


@pytest.mark.slow
@pytest.mark.long
def test_a_pack_that_is_stopped_leaves_a_checkpoint_of_each_trial(sweep):
    running = sweep(PACK, train__pack=True, train__steps=5000)
    running.until(lambda: running.steps("lora") > 30)
    running.send(signal.SIGINT)
    assert running.wait() == 130
    assert "interrupted; the same command runs the missing trials" in running.output
    rows = rows_of(running)
    assert Counter(row["status"] for row in rows) == {"cancelled": 3}
    states = [*running.out.glob("trials/*/stage1/checkpoint-*/state.pt")]
    assert {state.parents[2].name for state in states} == {row["trial_id"] for row in rows}
    assert running.left() == []


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_pack_goes_on_in_the_local_ray_that_replaces_a_dead_one(sweep):
    running = sweep(PACK, train__pack=True)
    running.until(lambda: running.steps("lora") > 30)
    running.kill("raylet")
    assert running.wait(LONGEST_S) == 0
    rows = check_whole(running, 3)
    assert all(row["restarts"] == ["its raylet was killed or crashed"] for row in rows)
    assert all(row["resumed_from_step"] >= 5 for row in rows)
    assert [row["pack_size"] for row in rows] == [3, 3, 3]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_search_goes_on_in_the_local_ray_that_replaces_a_dead_one(sweep):
    running = sweep(SEARCHED, {"samples": 3, "algorithm": "optuna"}, resources__cpus_per_worker=2)
    running.until(lambda: running.out.joinpath("results.jsonl").exists() and running.steps("lora") > STEPS + 10)
    running.kill("raylet")
    assert running.wait(LONGEST_S) == 0
    rows = check_whole(running, 3)
    assert [row["restarts"] for row in rows].count(["its raylet was killed or crashed"]) == 1
