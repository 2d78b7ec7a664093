"""What a stage writes and what is free; the cache's limit; what `clean` removes; a stop that leaves a checkpoint."""

import os
import shutil
import time
from collections import namedtuple

import pytest
import tiny

from ray_peft import cli
from ray_peft.engine import disk, stopping
from ray_peft.engine.checkpoint import read_last
from ray_peft.errors import StorageError
from ray_peft.foundation import cache
from ray_peft.schedule import worker
from ray_peft.schedule.decide import Demand
from ray_peft.spec import TrialSpec
from ray_peft.store.ledger import Ledger
from ray_peft.store.tracking import default_uri, open_store

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("free", "every", "fits"),
    [
        (40, 2, True),  # 10 of weights and three checkpoints of 10
        (39, 2, False),
        (20, 5, True),  # one of them in 10 steps: the last step writes none
        (19, 5, False),
        (10, None, True),
        (9, None, False),
        (10, "5min", True),  # they may never be due
    ],
)
def test_a_stage_that_cannot_fit_does_not_start(tmp_path, monkeypatch, caplog, free, every, fits):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 100 - free, free))
    folder = tmp_path / "trial" / "stage1"
    if fits:
        disk.check(folder, 10, 10, steps=10, every=every)
    else:
        with pytest.raises(StorageError, match=r"trial: a trial that writes .* does not start.*use another --out"):
            disk.check(folder, 10, 10, steps=10, every=every)
    assert ("do not fit" in caplog.text) == (every == "5min")


def test_checkpoints_that_are_there_need_no_further_space(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 80, 20))
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "state.pt").write_bytes(bytes(10))
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "state.pt").write_bytes(bytes(10))
    disk.check(tmp_path, 10, 10, steps=10, every=2)


def test_the_cache_drops_what_was_not_used_for_longest(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path))
    monkeypatch.setenv("RAY_PEFT_CACHE_GIB", str(2500 / 2**30))
    ages = {"old": 5, "older": 9, "used": 7, "new": 0}
    for name, days in ages.items():
        folder = tmp_path / "prepared" / name
        folder.mkdir(parents=True)
        (folder / "rows").write_bytes(bytes(1000))
        os.utime(folder, (time.time() - days * 86400,) * 2)
    assert cache.entry("prepared", "used") == tmp_path / "prepared" / "used"
    assert [entry.folder.name for entry in cache.trim()] == ["older", "old"]
    assert sorted(path.name for path in (tmp_path / "prepared").iterdir()) == ["new", "used"]
    monkeypatch.setenv("RAY_PEFT_CACHE_GIB", "0")
    assert cache.trim() == []  # used today: a sweep that runs may need them


def test_a_trial_that_is_told_to_stop_ends_at_its_next_step_with_a_checkpoint(
    tiny_model, questions, empty_database, tmp_path
):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    plain = tiny.plain_spec(tiny_model, questions, train__steps=5000, evaluation__generate=False)
    spec = TrialSpec.from_plain(plain)
    store = open_store(default_uri(tmp_path), "x", tmp_path / "artifacts")
    assignment = worker.Assignment(
        spec, tmp_path / "trial", store, None, "x", Demand(1, 1, 0.0), stop_file=tmp_path / "stop"
    )

    def report(metrics, step):
        if step == 3:
            (tmp_path / "stop").touch()

    row = worker.run_alone(assignment, report)
    assert row.status == "cancelled"
    path, state = read_last(tmp_path / "trial" / "stage1")
    assert 3 <= state["step"] < 5000
    assert path.name == f"checkpoint-{state['step']}"
    assert not stopping.is_told()  # of the next trial


def test_clean_shows_what_it_would_remove_and_never_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_PEFT_OUTPUTS", str(tmp_path / "outputs"))
    out = tmp_path / "outputs" / "sweep"
    results = ["results.jsonl", "sweep.json", "trials/a/result.json", "trials/a/adapter/adapter.safetensors",
            "trials/b/stage1/checkpoint-5/state.pt"]  # fmt: skip
    gone = ["ray/tune-1/handout.pickle", "trials/a/.x.partial/y", "trials/b/stage1/.checkpoint-9.partial/state.pt"]
    for name in [*results, *gone]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    cached = tmp_path / "cache" / "latents" / "key"
    cached.mkdir(parents=True)
    (cached / "file").write_bytes(bytes(2**20))
    assert cli.main(["clean"]) == 0
    said = capsys.readouterr().out
    assert f"1.0 MiB  {cached}" in said
    assert "ray-peft clean --yes" in said
    assert all((out / name).exists() for name in [*results, *gone])
    assert cli.main(["clean", "--yes"]) == 0
    assert [name for name in gone if (out / name).exists()] == []
    assert [name for name in results if not (out / name).exists()] == []
    assert not cached.exists()
    with Ledger(out).locked():
        (out / "ray").mkdir()
        assert cli.main(["clean", "--yes"]) == 0
    assert (out / "ray").exists()
    assert "is in use" in capsys.readouterr().out
    assert cli.main(["clean", str(tmp_path / "cache")]) == 2
    assert "holds no sweep.json" in capsys.readouterr().err
