"""Further benchmarks in the report: within two standard errors is tied, and few questions show nothing."""

from __future__ import annotations

import csv

import pytest

from ray_peft.report.benchmarks import further
from ray_peft.report.content import build
from ray_peft.report.csvfile import write_csv
from ray_peft.report.document import Table
from ray_peft.report.material import Material
from ray_peft.report.table import rows
from ray_peft.result import Scores, TrialResult
from ray_peft.spec import TrialSpec


def trial(method, values, errors=None, questions=100, **asked):
    spec = TrialSpec.from_plain(
        {
            "model": {"name": "org/tiny"},
            "data": {"sources": [{"recipe": "alpaca", "path": "a.jsonl", "train": 90, "test": 10}]},
            "method": {"name": method},
            "train": {"steps": 10},
            "evaluation": {"benchmarks": {"tasks": ["mmlu"]} | asked},
        }
    )
    scores = Scores(benchmarks=values, benchmark_stderr=errors or {}, benchmark_rows=dict.fromkeys(values, questions))
    return TrialResult(trial_id=spec.trial_id, spec=spec, status="finished", scores=scores)


def against_base(*results):
    table = further(rows(list(results)))[0]
    assert isinstance(table, Table)
    return {(line[0], line[1]): line[-1] for line in table.lines}


@pytest.mark.parametrize(
    ("value", "questions", "said"),
    [
        (0.31, 100, "+0.0600 +/- 0.0500, tied with base"),
        (0.35, 100, "+0.1000 +/- 0.0500, tied with base"),
        (0.36, 100, "+0.1100 +/- 0.0500"),
        (0.14, 100, "-0.1100 +/- 0.0500"),
        (0.36, 29, "+0.1100 +/- 0.0500, too few questions"),
    ],
)
def test_only_what_is_beyond_two_standard_errors_is_shown(value, questions, said):
    base = trial("none", {"mmlu/acc": 0.25}, {"mmlu/acc": 0.03}, questions)
    found = against_base(base, trial("lora", {"mmlu/acc": value}, {"mmlu/acc": 0.04}, questions))
    assert found == {("mmlu/acc", "none"): "-", ("mmlu/acc", "lora"): said}


def test_without_a_standard_error_nothing_is_claimed():
    found = against_base(trial("none", {"mmlu/acc": 0.0}), trial("lora", {"mmlu/acc": 1.0}))
    assert found["mmlu/acc", "lora"] == "+1.0000, no standard error"


def test_other_questions_are_not_compared():
    error = {"mmlu/acc": 0.01}
    base = trial("none", {"mmlu/acc": 0.2}, error, limit=10)
    other = trial("lora", {"mmlu/acc": 0.9}, error, limit=20)
    assert set(against_base(base, other).values()) == {"-"}


def test_tasks_below_a_group_stand_apart_and_a_tag_is_its_tasks():
    values = {"mmlu/acc": 0.3, "mmlu_law/acc": 0.2}
    shown, _, _, below = further(rows([trial("none", values)]))
    assert [line[0] for line in shown.lines] == ["mmlu/acc"]
    assert [line[0] for line in below.lines] == ["mmlu_law/acc"]
    assert below.folded
    tag, _ = further(rows([trial("none", values, tasks=["some_tag"])]))
    assert [line[0] for line in tag.lines] == ["mmlu/acc", "mmlu_law/acc"]


def test_the_section_stands_in_the_report_only_with_benchmarks(tmp_path):
    plain = trial("none", {})
    assert "Further benchmarks" not in [part.title for part in build(Material(title="t", results=[plain])).sections]
    scored = trial("none", {"mmlu/acc": 0.3}, {"mmlu/acc": 0.01})
    assert "Further benchmarks" in [part.title for part in build(Material(title="t", results=[scored])).sections]
    write_csv([scored], tmp_path / "report.csv")
    (line,) = csv.DictReader((tmp_path / "report.csv").read_text().splitlines())
    assert line["scores.benchmarks.mmlu/acc"] == "0.3"
    assert line["scores.benchmark_stderr.mmlu/acc"] == "0.01"
    assert line["scores.benchmark_rows.mmlu/acc"] == "100"
