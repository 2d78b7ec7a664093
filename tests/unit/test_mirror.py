"""A sweep's folder and its copy at a URL: the same after each start, and usable after a kill at any moment."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

import pytest

from ray_peft.errors import StorageError
from ray_peft.store.mirror import STATE_FILE, Mirror
from ray_peft.store.remote import Remote

TRIAL = "trials/lora-1"
SENT = f"{TRIAL}/outbox.sent.json"
FILES = {
    "results.jsonl": "row\n",
    "sweep.json": "{}",
    f"{TRIAL}/adapter/adapter_model.safetensors": "weights",
    f"{TRIAL}/outbox.jsonl": "x" * 40,
    SENT: '{"offset": 40}',
    f"{TRIAL}/result.json": "row",
    f"{TRIAL}/stage1/checkpoint-2/state.pt": "state",
}
OF_THIS_MACHINE = (
    ".lock", "driver.json", "ray/tune/params.json", "control/1.request", f"{TRIAL}/live.json", f"{TRIAL}/cancel",
    f"{TRIAL}/.outbox.lock", f"{TRIAL}/stage1/.checkpoint-4.partial/state.pt",
)  # fmt: skip


def write(folder: Path, files: dict[str, str]) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)


def read(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != STATE_FILE]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


@pytest.fixture
def remote() -> Remote:
    return Remote(f"memory://{uuid.uuid4().hex}/sweep")


@pytest.fixture
def machines(remote, tmp_path):
    """Two folders with what both have sent and fetched."""
    write(tmp_path / "a", FILES)
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        synced(remote, folder)
    return folders


def synced(remote: Remote, folder: Path) -> None:
    """One start of a sweep to its end."""
    mirror = Mirror(remote, folder)
    mirror.fetch()
    mirror.send()


def fetched(remote: Remote, folder: Path) -> dict[str, str]:
    Mirror(remote, folder).fetch()
    return read(folder)


def test_a_new_machine_gets_what_belongs_to_the_sweep_and_nothing_else(remote, tmp_path):
    write(tmp_path / "a", FILES | dict.fromkeys(OF_THIS_MACHINE, "own"))
    synced(remote, tmp_path / "a")
    assert fetched(remote, tmp_path / "b") == FILES
    assert Mirror(remote, tmp_path / "b").fetch() == 0


def test_what_did_not_change_is_not_sent_again(remote, tmp_path):
    write(tmp_path / "a", FILES)
    mirror = Mirror(remote, tmp_path / "a")
    mirror.fetch()
    assert mirror.send() == len(FILES)
    assert mirror.send() == 0
    again = Mirror(remote, tmp_path / "a")  # another start
    assert again.fetch() == 0
    write(tmp_path / "a", {"results.jsonl": "row\nrow\n"})
    (tmp_path / "a" / f"{TRIAL}/stage1/checkpoint-2/state.pt").unlink()
    assert again.send() == 2
    assert "stage1" not in str(fetched(remote, tmp_path / "b"))


CHANGED, REMOVED, SAME = "changed", "removed", "same"


@pytest.mark.parametrize(
    ("here", "there", "then"),
    [
        (SAME, CHANGED, "there"),
        (CHANGED, SAME, "here"),
        (CHANGED, CHANGED, "there"),
        (REMOVED, SAME, "row"),
        (REMOVED, CHANGED, "there"),
        (SAME, REMOVED, None),
        (CHANGED, REMOVED, "here"),
    ],
)
def test_which_side_counts_where_two_machines_went_on(remote, machines, here, there, then):
    path = f"{TRIAL}/result.json"
    for folder, change, content in zip(machines, (here, there), ("here", "there"), strict=True):
        if change == CHANGED:
            write(folder, {path: content})
        elif change == REMOVED:
            (folder / path).unlink()
    mirror = Mirror(remote, machines[1])
    mirror._recall()  # as while a sweep runs
    mirror.send()
    assert fetched(remote, machines[0]).get(path) == then


class Killed(BaseException):
    """The process ends here."""


class Mortal(Remote):
    """A URL at which the sender is killed after so many files: before it knows that the last one has arrived."""

    def __init__(self, url: str, files: int) -> None:
        super().__init__(url)
        self.left, self.at_once = files, 1

    def put(self, source, path):
        version = super().put(source, path)
        self.left -= 1
        if not self.left:
            raise Killed
        return version


@pytest.mark.parametrize("files", range(1, len(FILES) + 1))
def test_a_kill_after_any_file_leaves_what_another_machine_can_use(tmp_path, files):
    url = f"memory://{uuid.uuid4().hex}"
    write(tmp_path / "a", {"results.jsonl": "", SENT: '{"offset": 0}', f"{TRIAL}/outbox.jsonl": ""})
    synced(Remote(url), tmp_path / "a")
    write(tmp_path / "a", FILES)
    mirror = Mirror(Mortal(url, files), tmp_path / "a")
    mirror.fetch()
    with pytest.raises(Killed):
        mirror.send()
    there = fetched(Remote(url), tmp_path / "b")
    assert json.loads(there[SENT])["offset"] <= len(there[f"{TRIAL}/outbox.jsonl"])
    arrived = {path for path in FILES if there.get(path) == FILES[path]}
    if there["results.jsonl"]:
        assert f"{TRIAL}/result.json" in arrived
    if f"{TRIAL}/result.json" in arrived:
        assert f"{TRIAL}/adapter/adapter_model.safetensors" in arrived
    # This machine wrote on until the kill: its next start keeps that, and sends it.
    write(tmp_path / "a", {f"{TRIAL}/outbox.jsonl": "x" * 60})
    synced(Remote(url), tmp_path / "a")
    assert read(tmp_path / "a") == FILES | {f"{TRIAL}/outbox.jsonl": "x" * 60} == fetched(Remote(url), tmp_path / "c")


def test_what_a_file_said_when_the_others_were_looked_at_is_sent(remote, tmp_path):
    """The outbox is sent while its trial goes on: what is said to be taken out of it must be in what was sent."""

    class Busy(Remote):
        def put(self, source, path):
            version = super().put(source, path)
            if path.endswith("outbox.jsonl"):
                write(tmp_path / "a", {SENT: '{"offset": 90}', path: "x" * 90})
            return version

    busy = Busy(remote.shown)
    write(tmp_path / "a", FILES)
    mirror = Mirror(busy, tmp_path / "a")
    mirror.fetch()
    mirror.send()
    assert fetched(remote, tmp_path / "b")[SENT] == FILES[SENT]


def test_a_checkpoint_that_goes_while_the_folder_is_looked_at_is_no_error(remote, machines, monkeypatch):
    mirror = Mirror(remote, machines[0])
    mirror.fetch()
    looked_at, scandir = machines[0] / TRIAL / "stage1/checkpoint-2", os.scandir

    def late(folder):
        if folder == str(looked_at):
            (looked_at / "state.pt").unlink()
            looked_at.rmdir()
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", late)
    mirror.send()
    monkeypatch.undo()
    assert "stage1" not in str(fetched(remote, machines[1]))


def test_a_folder_that_is_gone_takes_nothing_with_it(remote, machines):
    mirror = Mirror(remote, machines[0])
    mirror.fetch()
    for path in machines[0].rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(StorageError, match="is gone, or was emptied, while a sweep used it; nothing more is sent"):
        mirror.send()
    assert len(remote.versions()) == len(FILES)
