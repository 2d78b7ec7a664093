"""Numbers that are not finite stay what they are in results, logs and the tracker's files."""

from __future__ import annotations

import json
import math

import pytest
import tiny

from ray_peft.foundation.measured import from_json, to_json
from ray_peft.metrics.scores import Scores
from ray_peft.report.curves import read_curve
from ray_peft.report.files import write_report
from ray_peft.schedule.worker import final_report
from ray_peft.spec import TrialSpec
from ray_peft.store.ledger import Ledger
from ray_peft.trial.result import TrialResult, Usage


@pytest.fixture
def odd() -> TrialResult:
    """A failed trial with numbers of all kinds, and a text that looks like one."""
    spec = TrialSpec.from_plain(tiny.plain_spec("org/tiny", "a.jsonl"))
    return TrialResult(
        trial_id=spec.trial_id,
        status="failed",
        spec=spec,
        scores=Scores(eval_loss=math.nan, rouge_l=0.5, benchmarks={"arc/acc": math.inf}),
        usage=Usage(peak_rss_gib=-math.inf),
        boundary_losses={"after stage 1": math.nan},
        error="NaN",
    )


def same(result: TrialResult) -> None:
    assert math.isnan(result.scores.eval_loss)
    assert math.isnan(result.boundary_losses["after stage 1"])
    assert (result.scores.rouge_l, result.scores.benchmarks) == (0.5, {"arc/acc": math.inf})
    assert (result.usage.peak_rss_gib, result.error) == (-math.inf, "NaN")


def test_a_row_survives_every_way_that_it_takes(odd, tmp_path):
    same(TrialResult.model_validate_json(odd.model_dump_json()))  # from the worker to the driver
    strict = json.dumps(odd.plain(), allow_nan=False)  # what any reader of JSON takes
    same(TrialResult.model_validate_json(strict))
    same(TrialResult.from_plain(json.loads(strict)))
    same(TrialResult.model_validate_json(json.dumps(odd.model_dump(mode="json"))))  # as version 0.1.0 wrote it
    ledger = Ledger(tmp_path)
    ledger.add(odd)
    (row,) = ledger.results()
    same(row)
    assert row.spec == odd.spec


def test_the_report_of_such_a_row_is_written(odd, tmp_path):
    Ledger(tmp_path).add(odd)
    assert "| nan |" in write_report(tmp_path)[0].read_text(encoding="utf-8")


def test_a_search_is_told_finite_scores_alone(odd):
    told = final_report(odd)
    assert "eval_loss" not in told
    assert told["rouge_l"] == 0.5


def test_a_log_reads_back(tmp_path):
    lines = [{"step": 1, "train_loss": 2.0}, {"step": 2, "train_loss": math.nan}, {"step": 3, "train_loss": -math.inf}]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(to_json(line), allow_nan=False) + "\n" for line in lines)
    )
    points = read_curve(tmp_path / "metrics.jsonl").train
    assert points[0] == (1, 2.0)
    assert math.isnan(points[1][1])
    assert points[2] == (3, -math.inf)


def test_only_the_three_texts_are_numbers():
    assert [from_json(text) for text in ("Infinity", "-Infinity", "nan", "inf", 1.5, None)] == [
        math.inf, -math.inf, "nan", "inf", 1.5, None,
    ]  # fmt: skip
