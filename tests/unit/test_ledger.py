"""The output folder survives kill -9, and belongs to one process."""

import json

import pytest
import tiny

from ray_peft.errors import SearchSpaceError
from ray_peft.spec import TrialSpec
from ray_peft.store.ledger import Ledger, SweepRecord
from ray_peft.trial.result import TrialResult


def row(seed: int, status: str = "finished") -> TrialResult:
    spec = TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d", seed=seed))
    return TrialResult(trial_id=spec.trial_id, status=status, spec=spec)


def test_rows_come_back_and_the_last_of_a_trial_counts(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add(row(1, "failed"))
    ledger.add(row(2))
    assert set(ledger.finished()) == {row(2).trial_id}
    ledger.add(row(1))
    assert set(ledger.finished()) == {row(1).trial_id, row(2).trial_id}
    assert len(ledger.results()) == 2


def test_a_half_written_line_costs_only_itself(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add(row(1))
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(json.dumps(row(2).row()).encode()[:50])
    assert set(ledger.finished()) == {row(1).trial_id}
    ledger.add(row(3))
    assert set(ledger.finished()) == {row(1).trial_id, row(3).trial_id}


def test_two_processes_cannot_write_one_folder(tmp_path):
    refused = pytest.raises(SearchSpaceError, match="another ray-peft")
    with Ledger(tmp_path).locked(), refused, Ledger(tmp_path).locked():
        pass


def test_set_aside_keeps_earlier_rows_under_another_name(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add(row(1))
    ledger.write_record(SweepRecord("n", ""))
    ledger.set_aside()
    assert ledger.finished() == {}
    assert ledger.read_record() is None
    assert len(list(tmp_path.glob("results-*.jsonl"))) == 1
