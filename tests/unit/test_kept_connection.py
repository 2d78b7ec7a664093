"""The cluster of several sweeps one after the other."""

import contextlib

import pytest

from ray_peft.schedule import cluster
from ray_peft.schedule.cluster import KeptConnection


@pytest.fixture
def told(monkeypatch):
    """Starts and ends of a pretended Ray."""
    events = []

    @contextlib.contextmanager
    def connect(address):
        events.append(f"start {address}")
        try:
            yield ["node"]
        finally:
            events.append("end")

    monkeypatch.setattr(cluster, "connect", connect)
    monkeypatch.setattr(cluster, "nodes_now", lambda: ["node as it is now"])
    return events


def test_a_local_ray_starts_once_for_all_sweeps_and_ends_after_the_last(told):
    kept = KeptConnection("here:1")
    with kept:  # a sweep
        assert kept.connect() == ["node"]
    with kept:
        assert kept.connect() == ["node as it is now"]
        kept.replace()  # the local Ray has died
    assert told == ["start here:1", "end", "start here:1"]
    kept.leave()
    assert told[3:] == ["end"]
    kept.leave()  # nothing is left to leave
    assert told[3:] == ["end"]
