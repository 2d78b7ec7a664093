"""A sweep whose --out is a bucket: another machine goes on where the first one was lost, and has all of its results."""

from __future__ import annotations

import contextlib
from pathlib import Path

import bucket
import pytest
import tiny
from killed import write_space
from untracked import Notes

import ray_peft
from ray_peft import cli
from ray_peft.console import Console
from ray_peft.foundation.audience import Silence
from ray_peft.schedule import plan
from ray_peft.spec import TrialSpec
from ray_peft.store import lease, places
from ray_peft.store.mirror import Mirror
from ray_peft.store.places import folder_of
from ray_peft.store.remote import Remote
from ray_peft.store.results_file import read_results
from ray_peft.trial import trial
from ray_peft.trial.result import TrialResult


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


def interrupted(spec: TrialSpec, folder: Path, step: int) -> TrialResult | None:
    """Run a trial in this process until a step; its row if it gets to its end before."""

    def report(metrics, now):
        if "train_loss" in metrics and now == step:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        return trial.run(spec, trial.Place(folder, "cpu"), Notes(), report)
    return None


def test_another_machine_goes_on(ray_cluster, tiny_model, questions, tmp_path, server, monkeypatch, capsys):
    methods = [{"name": "none"}, {"name": "lora", "rank": 4, "lr": 0.01}]
    changes = {"train__steps": 8, "train__checkpoint_every": 2, "evaluation__generate": False}
    first, both = (
        write_space(tmp_path / f"{name}.yaml", tiny.plain_spec(tiny_model, questions, {"grid": grid}, **changes))
        for name, grid in (("first", methods[:1]), ("both", methods))
    )
    url = f"s3://{bucket.new_bucket(server)}/sweep"
    more = ["--out", url, "--tracking-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    monkeypatch.setenv("RAY_PEFT_OUTPUTS", str(tmp_path / "one"))
    assert cli.main(["sweep", str(first), *more]) == 0
    first = folder_of(url, tmp_path / "one")
    (ended,) = read_results(first)

    # The machine is lost while it trains the second trial.
    spec = plan.plan(both, [], None, Console(quiet=True))[1]
    assert interrupted(spec, first / "trials" / spec.trial_id, 6) is None
    mirror = Mirror(Remote(url), first)
    mirror.fetch()
    assert mirror.send() > 0
    taken = lease.Lease(Remote(url), Silence())
    taken._own.host = "lost"
    taken.take()

    monkeypatch.setenv("RAY_PEFT_OUTPUTS", str(tmp_path / "two"))
    assert cli.main(["sweep", str(both), *more]) == 0
    two = folder_of(url, tmp_path / "two")
    again, resumed = read_results(two)
    assert again.trial_id == ended.trial_id
    assert again.provenance.started_at == ended.provenance.started_at, "it was trained again"
    assert resumed.resumed_from_step in (4, 6)
    whole = interrupted(spec, tmp_path / "whole", 99)
    assert whole is not None
    assert resumed.scores.eval_loss == pytest.approx(whole.scores.eval_loss, abs=1e-6)
    _check_url(server, url, two)
    shown = capsys.readouterr().out
    assert "on lost, heard of" in shown
    assert f"all of it is at {url}" in shown
    assert bucket.KEYS["AWS_SECRET_ACCESS_KEY"] not in shown

    # A third machine only looks.
    monkeypatch.setenv("RAY_PEFT_OUTPUTS", str(tmp_path / "three"))
    assert cli.main(["report", url]) == 0
    assert read_results(folder_of(url, tmp_path / "three")) == [again, resumed]


def _check_url(server: str, url: str, folder: Path) -> None:
    """The bucket holds what the folder holds, less what belongs to one machine."""
    there = {key.removeprefix("sweep/") for key in bucket.keys(server, url.split("/")[2])}
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {path for path in here - there if not path.rpartition("/")[2].startswith(".")} == {"driver.json"}
    assert not there - here
    assert {"results.jsonl", "report.html", "sweep.json"} <= there


@pytest.mark.long
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
        if " to run, each " in text:
            for entry in self._client.list_objects_v2(Bucket=self._name).get("Contents", ()):
                self._client.delete_object(Bucket=self._name, Key=entry["Key"])
            self._client.delete_bucket(Bucket=self._name)
