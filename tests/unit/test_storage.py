"""Disks that are full, read-only or gone: one error with the path and the way out, and what finished is kept."""

from __future__ import annotations

import errno
import os
import resource

import pytest
import tiny
from untracked import Notes, run

from ray_peft.console import Console
from ray_peft.errors import StorageError
from ray_peft.foundation.cache import made_whole
from ray_peft.foundation.storage import error_line, is_full, writing
from ray_peft.spec import TrialSpec
from ray_peft.store.keeping import LastSteps, Rows
from ray_peft.store.ledger import Ledger
from ray_peft.trial import trial
from ray_peft.trial.result import TrialResult


@pytest.fixture
def no_room():
    """No file of this process grows beyond 4 KiB, as on a full disk: a call, and its undoing."""
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else it ends the process

    def fill(full: bool = True) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if full else before[0], before[1]))

    yield fill
    fill(False)
    signal.signal(signal.SIGXFSZ, handler)


def result(name: str, questions: str = "a.jsonl") -> TrialResult:
    spec = TrialSpec.from_plain(tiny.plain_spec("org/tiny", questions))
    return TrialResult(trial_id=name, status="finished", spec=spec, error="x" * 5000)


def test_a_cache_on_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, no_room):
    with (  # noqa: PT012
        pytest.raises(StorageError, match=r"cache/key: cannot be written: File too large; set RAY_PEFT_CACHE"),
        made_whole(tmp_path / "cache" / "key", "last") as partial,
    ):
        no_room()
        (partial / "last").write_bytes(b"x" * 10_000)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_one_error_and_leaves_no_lock_behind(tmp_path, monkeypatch, number):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    says = rf"out: its file system takes no locks \({os.strerror(number)}\).* on NFS, mount it as version 4, or start"
    with pytest.raises(StorageError, match=says), Ledger(tmp_path / "out").locked():
        pytest.fail("the folder is held without a lock")
    monkeypatch.undo()
    with Ledger(tmp_path / "out").locked():  # the same folder, mounted otherwise
        pass


def test_a_cache_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache" / "key"
    with pytest.raises(StorageError, match=r"key: cannot be written: Not a directory; set"), made_whole(folder, "last"):
        pass


def test_errors_of_libraries_keep_their_meaning(tmp_path):
    with pytest.raises(OSError, match="gone/model is not a local folder"), writing(tmp_path, "x"):
        raise OSError("gone/model is not a local folder")  # as transformers says it
    with pytest.raises(StorageError, match="no space left"), writing(tmp_path, "x"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors says it
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b")
    assert is_full(full)
    assert error_line(full) == "/a/b: No space left on device; free some space, or use a folder on another disk"
    assert error_line(PermissionError(errno.EACCES, "Permission denied", "/a")) == "/a: Permission denied"


def test_rows_wait_until_there_is_room(tmp_path, no_room, capsys):
    ledger = Ledger(tmp_path)
    rows = Rows(ledger, Console())
    rows.add(result("lora-1").model_copy(update={"error": None}))
    no_room()
    for name in ("lora-2", "lora-3"):
        rows.add(result(name))
    assert capsys.readouterr().out.count("caution: ") == 1
    assert [row.trial_id for row in rows.waiting] == ["lora-2", "lora-3"]
    with pytest.raises(StorageError, match=r"results.jsonl: .*free some space.*Rows that it lacks: lora-2, lora-3"):
        rows.flush()
    assert [row.trial_id for row in ledger.results()] == ["lora-1"]
    no_room(False)
    rows.flush()
    assert [row.trial_id for row in ledger.results()] == ["lora-1", "lora-2", "lora-3"]


def test_all_last_steps_are_taken_and_the_first_failure_is_raised():
    last, taken = LastSteps(), []
    for number, error in enumerate([None, ValueError("first"), None, KeyError("second")]):
        with last.step():
            taken.append(number)
            if error is not None:
                raise error
    assert taken == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="first"):
        last.done()


class Away(Notes):
    """A tracker whose store is away."""

    def start(self, spec):
        return None

    def record(self, row):
        return row.model_copy(update={"untracked": "cannot store the result in the tracking store"})


def test_a_finished_trial_is_kept_where_the_store_is_gone(tiny_model, questions, tmp_path):
    spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, {"name": "none"}))
    row = trial.run(spec, trial.Place(tmp_path, "cpu"), Away(), lambda metrics, step: None)
    assert (row.status, row.untracked) == ("finished", "cannot store the result in the tracking store")
    assert row.scores.eval_loss > 0
    kept = TrialResult.model_validate_json((tmp_path / trial.RESULT_FILE).read_text(encoding="utf-8"))
    assert kept == row


def test_a_full_disk_in_training_is_a_row_that_says_so(tiny_model, questions, tmp_path, no_room):
    spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, train__checkpoint_every=2))
    run(spec, tmp_path / "first")  # so that the prepared rows are there
    no_room()
    row, tracker = run(spec, tmp_path / "out")
    no_room(False)
    assert row.status == "failed"
    first = row.error.splitlines()[0]
    assert "free some space" in first
    assert str(tmp_path / "out") in first
    assert tracker.rows == [row]
    assert run(spec, tmp_path / "out")[0].status == "finished"  # the half checkpoint is not gone on from
