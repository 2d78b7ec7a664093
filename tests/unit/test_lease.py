"""Two drivers at one URL: the second is refused, and takes the place of a first one that was killed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid

import pytest

from ray_peft.errors import ReportLost, SearchSpaceError, StorageError
from ray_peft.foundation.audience import Silence
from ray_peft.foundation.regularly import regularly
from ray_peft.store import lease as leases
from ray_peft.store import places
from ray_peft.store.lease import FILE, Lease
from ray_peft.store.places import folder_of, working_folder
from ray_peft.store.remote import Remote


@pytest.fixture
def remote(monkeypatch) -> Remote:
    monkeypatch.setattr(leases, "SILENT_S", 0.3)
    monkeypatch.setattr(leases, "_LOOK_S", 0.05)
    monkeypatch.setattr(leases, "_SETTLE_S", 0.05)
    monkeypatch.setattr(places, "SEND_S", 0.05)
    return Remote(f"memory://{uuid.uuid4().hex}/sweep")


def taken(remote: Remote, **changes: object) -> Lease:
    """A lease that some driver has taken, which says of itself what is given."""
    lease = Lease(remote, Silence())
    lease.take()
    for name, value in changes.items():
        setattr(lease._own, name, value)
    lease.beat()
    return lease


def test_what_was_given_back_is_free(remote):
    taken(remote).give_back()
    Lease(remote, Silence()).take()


def test_a_driver_that_lives_is_left_alone(remote):
    lease = taken(remote, host="far", pid=77)
    says = r"--out memory://\S+: another ray-peft is writing there \(process 77 on far"
    with regularly(lease.beat, 0.05, "beat"), pytest.raises(SearchSpaceError, match=says):
        Lease(remote, Silence()).take()
    assert lease.lost_to is None


def test_a_driver_that_says_nothing_is_taken_for_dead(remote, capsys):
    from ray_peft.console import Console

    first = taken(remote, host="far", pid=77)
    second = Lease(remote, Console())
    second.take()
    assert "process 77 on far, heard of 0 s ago by its own clock, has not given it back" in capsys.readouterr().out
    first.beat()  # it was only cut off
    assert first.lost_to is not None
    first.give_back()
    assert Remote(remote.shown).read(FILE) is not None, "what belongs to the second"


def test_a_driver_of_this_machine_that_was_killed_is_not_waited_for(remote, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    taken(remote, pid=process.pid)
    monkeypatch.setattr(Lease, "_watch", lambda *_: pytest.fail("it is waited for"))
    Lease(remote, Silence()).take()


def test_one_of_two_that_begin_at_once_is_refused(remote):
    class Late(Remote):
        """At which another driver comes between the look and the writing."""

        def create(self, path, content):
            taken(remote, pid=77)
            return super().create(path, content)

    with pytest.raises(SearchSpaceError, match="process 77"):
        Lease(Late(remote.shown), Silence()).take()


def test_one_of_two_that_replace_a_dead_one_at_once_is_refused(remote):
    taken(remote, host="far")
    both, refused = threading.Barrier(2), []

    def replace() -> None:
        both.wait(5)
        try:
            Lease(Remote(remote.shown), Silence()).take()
        except SearchSpaceError as error:
            refused.append(error)

    threads = [threading.Thread(target=replace) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(refused) == 1


def test_what_is_no_lease_is_said(remote):
    remote.put(json.dumps({"owner": 1}).encode(), FILE)
    with pytest.raises(StorageError, match=r"driver.json: says nothing that this version understands; remove it if no"):
        Lease(remote, Silence()).take()


def test_a_driver_whose_place_was_taken_sends_nothing_more(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "BEAT_S", 0.05)
    with pytest.raises(ReportLost, match=r"another ray-peft has taken it .* All of it is in .*, and the same command"):  # noqa: PT012, SIM117
        with working_folder(remote.shown, tmp_path, Silence()) as folder:
            other = taken(Remote(remote.shown + "x"))
            other._own.beat = 99
            remote.put(other._content(), FILE)
            threading.Event().wait(0.3)
            (folder / "row").write_text("late")
    assert remote.read("row") is None


def test_a_url_stands_for_one_folder_whose_name_holds_no_password(tmp_path):
    folder = folder_of("sftp://me:word@host/a/sweep/", tmp_path)
    assert folder == folder_of("sftp://other:one@host/a/sweep", tmp_path)
    assert folder.parent == tmp_path
    assert folder.name.startswith("sftp-host-a-sweep-")
    assert folder != folder_of("sftp://host/a-sweep", tmp_path)
    assert folder_of((tmp_path / "my runs").as_uri(), tmp_path) == tmp_path / "my runs"
