"""What is killed in mid-sweep: workers, Ray's own processes, the driver; and what two Ctrl-C leave."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import tiny
from killed import ROOT, Sweep, write_space

from ray_peft.schedule import watch
from ray_peft.store.results_file import read_results

NONE = {"name": "none"}
LORA = {"name": "lora", "rank": 4, "lr": 0.001}


@pytest.fixture
def sweep(tiny_model, questions, tmp_path):
    """Starts a sweep of the untouched base and LoRA; what is left of one is ended after the test."""
    started = []

    def start(*more, steps=20000, **changes):
        plain = tiny.plain_spec(
            tiny_model, questions, {"grid": [NONE, LORA]}, train__steps=steps, evaluation__generate=False, **changes
        )
        space = write_space(tmp_path / "space.yaml", plain)
        started.append(Sweep(space, tmp_path / "out", f"sqlite:///{tmp_path / 'mlflow.db'}", *more))
        return started[-1]

    yield start
    for one in started:
        one.end()


def runs(tmp_path):
    """How many MLflow runs of which method have which status."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return Counter(f"{run.data.tags.get('ray_peft.method', 'sweep')} {run.info.status}" for run in found)


def check_clean(running, tmp_path):
    assert running.left() == []
    assert "Traceback" not in running.output
    assert "[state-dump]" not in running.output  # of a raylet's log
    assert not (running.out / "ray").exists()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_local_ray_that_dies_is_replaced_in_the_same_sweep(sweep, tmp_path, victim):
    running = sweep(steps=60, train__checkpoint_every=5)
    running.until(lambda: running.steps("lora") > 12 and "none" in running.rows())
    running.kill(victim)
    running.until(lambda: "another local Ray is started" in running.output, timeout_s=30)
    assert running.wait() == 0
    row = running.rows()["lora"]
    assert (row["status"], row["restarts"]) == ("finished", [f"its {victim} was killed or crashed"])
    assert row["resumed_from_step"] >= 10
    assert runs(tmp_path) == Counter({"sweep FINISHED": 1, "none FINISHED": 1, "lora FINISHED": 1, "lora KILLED": 1})
    check_clean(running, tmp_path)


@pytest.mark.slow
def test_a_cluster_of_somebody_else_that_dies_ends_the_sweep_with_one_error(sweep, tmp_path):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        running = sweep("--address", cluster.address)
        running.until(lambda: running.steps("lora") > 0 and "none" in running.rows())
        cluster.head_node.kill_raylet()
        killed = time.monotonic()
        assert running.wait() == 1
        assert time.monotonic() - killed < 30
    finally:
        cluster.shutdown()
    (error,) = [line for line in running.output.splitlines() if line.startswith("error: ")]
    assert "the Ray cluster is lost: " in error
    assert "the same command runs what is missing" in error
    rows = running.rows()
    assert {name: row["status"] for name, row in rows.items()} == {"none": "finished", "lora": "cancelled"}
    assert rows["lora"]["error"].startswith("the Ray cluster is lost")
    assert runs(tmp_path) == Counter({"sweep KILLED": 1, "none FINISHED": 1, "lora KILLED": 1})
    check_clean(running, tmp_path)


@pytest.mark.slow
def test_a_worker_that_is_killed_goes_on_from_its_checkpoint_in_the_same_sweep(sweep, tmp_path):
    """Its curve is that of an undisturbed one: `test_worker_killed.py`."""
    running = sweep(steps=40, train__checkpoint_every=5)
    running.until(lambda: running.steps("lora") >= 15)
    running.kill_worker("lora")
    assert running.wait() == 0
    row = running.rows()["lora"]
    assert row["status"] == "finished"
    assert len(row["restarts"]) == 1
    assert row["restarts"][0].startswith("the worker died: ")
    assert row["resumed_from_step"] >= 10
    assert "it is started again" in running.output
    assert runs(tmp_path) == Counter({"sweep FINISHED": 1, "none FINISHED": 1, "lora FINISHED": 1, "lora KILLED": 1})
    check_clean(running, tmp_path)


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_no_process_and_the_next_start_no_open_run(sweep, tmp_path):
    running = sweep()
    running.until(lambda: running.steps("lora") > 0 and "none" in running.rows())
    running.send(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert runs(tmp_path)["lora RUNNING"] == 1
    again = sweep(steps=20)  # two other trials: what the kill left is closed all the same
    assert again.wait() == 0
    assert running.left(patience_s=120) == []  # Ray's agents look for their head for 60 s
    assert runs(tmp_path) == Counter({"sweep FINISHED": 1, "none FINISHED": 2, "lora FINISHED": 1, "lora KILLED": 1})
    check_clean(again, tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_a_second_ctrl_c_ends_at_once_with_whole_files(sweep, tmp_path):
    running = sweep()
    running.until(lambda: running.steps("lora") > 0 and "none" in running.rows())
    running.send(signal.SIGINT)
    time.sleep(1.0)
    running.send(signal.SIGINT)
    ended = time.monotonic()
    assert running.wait() == 130
    assert time.monotonic() - ended < 3
    assert running.left() == []
    assert "Traceback" not in running.output
    assert {row.status for row in read_results(running.out)} <= {"finished", "cancelled"}
    again = sweep(steps=20)
    assert again.wait() == 0
    assert set(runs(tmp_path)) == {"sweep FINISHED", "none FINISHED", "lora FINISHED", "lora KILLED"}


@pytest.mark.slow
@pytest.mark.long
def test_a_terminal_that_is_closed_ends_a_sweep_like_ctrl_c(sweep, tmp_path):
    running = sweep()
    running.until(lambda: running.steps("lora") > 0 and "none" in running.rows())
    running.send(signal.SIGHUP)
    assert running.wait() == 130
    assert running.output.strip().endswith("interrupted; the same command runs the missing trials")
    assert list(running.out.glob("trials/lora-*/stage1/checkpoint-*/state.pt"))  # of the step at which it ended
    assert runs(tmp_path) == Counter({"sweep KILLED": 1, "none FINISHED": 1, "lora KILLED": 1})
    check_clean(running, tmp_path)


@pytest.mark.slow
def test_nobody_reads_the_output_and_the_trials_run_all_the_same(tiny_model, questions, tmp_path):
    plain = tiny.plain_spec(tiny_model, questions, {"grid": [NONE, LORA]}, evaluation__generate=False)
    space = write_space(tmp_path / "space.yaml", plain)
    command = (
        f"{sys.executable} -m ray_peft sweep {space} --out {tmp_path / 'out'} --tracking-uri sqlite:///{tmp_path}/m.db"
    )
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.stderr == ""
    assert done.returncode in (0, 141)
    assert [row.status for row in read_results(tmp_path / "out")] == ["finished", "finished"]


def test_a_driver_that_stood_still_does_not_take_its_head_for_dead(ray_cluster):
    seen = watch.Watch()
    try:
        assert seen.lost() is None
        seen._closed.set()  # nobody asks any more
        time.sleep(1.5)
        seen._answered -= 2 * watch.SILENT_S
        seen._looked -= 2 * watch.SILENT_S
        assert seen.lost() is None  # as after Ctrl-Z and fg
        seen._answered -= 2 * watch.SILENT_S
        assert seen.lost() == "its head has not answered for 20 s"
    finally:
        seen.close()
