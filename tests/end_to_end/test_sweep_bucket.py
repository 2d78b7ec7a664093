"""A sweep whose --out is a bucket: another machine goes on where the first one was lost, and has all of its results."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import bucket
import pytest
import tiny
from killed import write_space

import ray_peft
from ray_peft import cli
from ray_peft.console import Console
from ray_peft.store import lease, places
from ray_peft.store.outbox import SENT_FILE
from ray_peft.store.places import folder_of
from ray_peft.store.results_file import read_results

STEPS = 120


@pytest.fixture
def server(monkeypatch):
    for name, value in bucket.KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(places, "SEND_S", 0.5)
    monkeypatch.setattr(lease, "SILENT_S", 1.0)
    monkeypatch.setattr(lease, "_LOOK_S", 0.3)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with bucket.server() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        yield address


class Lost(threading.Thread):
    """Copies a bucket in mid-sweep, as it would be if the machine were lost at that moment."""

    def __init__(self, address: str, source: str, target: str) -> None:
        super().__init__(daemon=True)
        self.address, self.source, self.target, self.copied = address, source, target, set[str]()

    def run(self) -> None:
        """Wait for the second trial's checkpoint."""
        client = bucket.client(self.address)
        until = time.monotonic() + 120
        while time.monotonic() < until:
            names = bucket.keys(self.address, self.source)
            trials = {name.split("/")[2] for name in names if "checkpoint-" in name}
            ended = {name.split("/")[2] for name in names if name.endswith("/result.json")}
            if ended and trials - ended:
                break
            time.sleep(0.2)
        # The sweep goes on meanwhile: what says how much of an outbox was taken is copied before the outbox.
        for name in sorted(names, key=lambda name: not name.endswith(SENT_FILE)):
            with contextlib.suppress(client.exceptions.NoSuchKey):  # of an older checkpoint
                client.copy_object(Bucket=self.target, Key=name, CopySource=f"{self.source}/{name}")
        self.copied = set(names)


def test_another_machine_goes_on(ray_cluster, tiny_model, questions, tmp_path, server, monkeypatch, capsys):
    methods = [{"name": "lora", "rank": 4, "lr": lr} for lr in (0.01, 0.02)]
    plain = tiny.plain_spec(
        tiny_model, questions, {"grid": methods}, train__steps=STEPS, train__checkpoint_every=10, train__log_every=10,
        evaluation__generate=False,
    )  # fmt: skip
    space, store = write_space(tmp_path / "space.yaml", plain), f"sqlite:///{tmp_path / 'mlflow.db'}"
    first, second = bucket.new_bucket(server), bucket.new_bucket(server)
    machines = {}
    for name in (first, second):
        outputs = tmp_path / name
        monkeypatch.setenv("RAY_PEFT_OUTPUTS", str(outputs))
        machines[name] = folder_of(f"s3://{name}/sweep", outputs)
        if name == first:
            lost = Lost(server, first, second)
            lost.start()
        assert cli.main(["sweep", str(space), "--out", f"s3://{name}/sweep", "--tracking-uri", store]) == 0
        lost.join(10)
        assert lost.copied
    whole, resumed = (read_results(machines[name]) for name in (first, second))
    assert [row.scores.eval_loss for row in resumed] == pytest.approx([row.scores.eval_loss for row in whole], abs=1e-6)
    ended = [row.trial_id for row in whole if f"sweep/trials/{row.trial_id}/result.json" in lost.copied]
    assert len(ended) == 1, "the first trial ended before the machine was lost, and the second one did not"
    for row, before in zip(resumed, whole, strict=True):
        if row.trial_id in ended:
            assert row.provenance.started_at == before.provenance.started_at, "not trained again"
        else:
            assert row.resumed_from_step is not None
            assert row.resumed_from_step >= 10
    _check_url(server, second, machines[second])
    shown = capsys.readouterr().out
    assert f"all of it is at s3://{second}/sweep" in shown
    assert bucket.KEYS["AWS_SECRET_ACCESS_KEY"] not in shown

    # A third machine only looks.
    monkeypatch.setenv("RAY_PEFT_OUTPUTS", str(tmp_path / "third"))
    assert cli.main(["report", f"s3://{second}/sweep"]) == 0
    assert read_results(folder_of(f"s3://{second}/sweep", tmp_path / "third")) == resumed


def _check_url(server: str, name: str, folder: Path) -> None:
    """The bucket holds what the folder holds, less what belongs to one machine."""
    there = {key.removeprefix("sweep/") for key in bucket.keys(server, name)}
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {path for path in here - there if not path.rpartition("/")[2].startswith(".")} == {"driver.json"}
    assert not there - here
    assert {"results.jsonl", "report.html", "sweep.json"} <= there


def test_a_bucket_that_goes_away_loses_nothing(ray_cluster, tiny_model, questions, tmp_path, server, monkeypatch):
    monkeypatch.setenv("RAY_PEFT_OUTPUTS", str(tmp_path))
    name = bucket.new_bucket(server)
    space = write_space(tmp_path / "space.yaml", tiny.plain_spec(tiny_model, questions, {"name": "none"}))
    settings = {"out": f"s3://{name}/sweep", "tracking_uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    policy = bucket.client(server)
    with pytest.raises(ray_peft.errors.ReportLost, match=r"All of it is in \S+, and the same command sends it"):  # noqa: PT012
        ray_peft.sweep(space, **settings, console=_Taking(policy, name))
    policy.create_bucket(Bucket=name)
    assert ray_peft.sweep(space, **settings, console=Console()).complete
    assert "sweep/results.jsonl" in bucket.keys(server, name)


class _Taking(Console):
    """Removes the bucket once the sweep has begun."""

    def __init__(self, client, name: str) -> None:
        super().__init__()
        self._client, self._name = client, name

    def say(self, text: str) -> None:
        super().say(text)
        if "trials to run" in text:
            for entry in self._client.list_objects_v2(Bucket=self._name).get("Contents", ()):
                self._client.delete_object(Bucket=self._name, Key=entry["Key"])
            self._client.delete_bucket(Bucket=self._name)
