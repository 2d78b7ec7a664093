"""A node that does not see the sweep's folder: a clear word, before the sweep or where it joins later."""

from __future__ import annotations

import pytest
import tiny

from ray_peft.errors import PlacementError
from ray_peft.schedule import cluster, joined, worker
from ray_peft.schedule.decide import Demand
from ray_peft.spec import TrialSpec
from ray_peft.store.tracking import Store


def test_a_sweep_does_not_start_where_a_node_has_another_folder(monkeypatch, tmp_path):
    names = {"a": "head", "b": "node-7", "c": "node-8"}
    monkeypatch.setattr(
        cluster, "alive_nodes", lambda: [{"NodeID": key, "NodeManagerHostname": name} for key, name in names.items()]
    )
    monkeypatch.setattr("ray.get_runtime_context", lambda: type("Context", (), {"get_node_id": lambda self: "a"})())
    monkeypatch.setattr(
        cluster, "answers_of", lambda nodes, ask, within_s: [("a", ask()), ("b", False)]  # c is late
    )  # fmt: skip
    with pytest.raises(PlacementError, match=r"--out \S+: not seen on node-7, where trials would write into a folder"):
        joined.check_shared(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_trial_does_not_run_on_a_node_that_has_joined_without_the_folder(tmp_path):
    spec = TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d"))
    folder = tmp_path / "trials" / spec.trial_id
    assignment = worker.Assignment(
        spec, folder, Store("sqlite:///x", "1", "x", "a"), None, "x", Demand(1, 1, 0.0), sign=tmp_path / "sweep.json"
    )
    row = worker.run_alone(assignment, lambda metrics, step: None)
    assert row.status == "failed"
    assert f" does not see {tmp_path}, where this trial has to write; mount it there, or take that" in str(row.error)
    assert not folder.exists()
