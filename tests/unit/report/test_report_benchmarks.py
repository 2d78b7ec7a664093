"""Further benchmarks in the report: paired by question, or within two standard errors tied; few show nothing."""

from __future__ import annotations

import csv
import math
import random

import pytest

from ray_peft.metrics.scores import QuestionScores, Scores
from ray_peft.report.benchmark_differences import Sides, differences
from ray_peft.report.benchmarks import further
from ray_peft.report.content import build
from ray_peft.report.csvfile import write_csv
from ray_peft.report.document import Table
from ray_peft.report.material import Material
from ray_peft.report.questions import Questions
from ray_peft.report.table import rows, units
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import TrialResult


def trial(method, values, errors=None, questions=100, seed=0, **asked):
    spec = TrialSpec.from_plain(
        {
            "model": {"name": "org/tiny"},
            "data": {"sources": [{"recipe": "alpaca", "path": "a.jsonl", "train": 90, "test": 10}]},
            "method": {"name": method},
            "train": {"steps": 10},
            "seed": seed,
            "evaluation": {"benchmarks": {"tasks": ["mmlu"]} | asked},
        }
    )
    scores = Scores(benchmarks=values, benchmark_stderr=errors or {}, benchmark_rows=dict.fromkeys(values, questions))
    return TrialResult(trial_id=spec.trial_id, spec=spec, status="finished", scores=scores)


def against_base(*results):
    table = further(rows(list(results)))[0]
    assert isinstance(table, Table)
    return {(line[0], line[1]): line[5] for line in table.lines}


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


def answered(method, right, key="mmlu/acc", seed=0, **asked):
    """A trial that was given these values, with lm-eval's standard error of their mean; and its lines by its id."""
    mean, size = sum(right) / len(right), len(right)
    error = math.sqrt(sum((value - mean) ** 2 for value in right) / (size - 1) / size)
    result = trial(method, {key: mean}, {key: error}, size, seed, **asked)
    task = key.partition("/")[0]
    lines = [QuestionScores(task=task, question=at, hash=f"h{at}", values={key: one}) for at, one in enumerate(right)]
    return result, {result.trial_id: lines}


def said(results, given, names=("lora",)):
    table = further(rows(results), Questions(given))[0]
    return {line[1]: line[5:] for line in table.lines if line[1] in names}


HARD = [float(at % 2) for at in range(200)]
"""Right or wrong, the same for all systems."""


def better(gained):
    """The answers of a system that has these many more right."""
    wrong = [at for at, value in enumerate(HARD) if not value][:gained]
    return [1.0 if at in wrong else value for at, value in enumerate(HARD)]


def test_pairing_by_question_shows_what_independent_samples_do_not():
    (base, a), (lora, b) = answered("none", HARD), answered("lora", better(12))
    assert said([base, lora], {})["lora"] == (
        "+0.0600 +/- 0.0499, tied with base", "two independent samples: no values by question on file",
    )  # fmt: skip
    assert said([base, lora], a | b)["lora"] == ("+0.0600 [+0.0268, +0.0932]", "paired by question")
    (_, c) = answered("none", HARD[:-1] + [0.5])
    assert said([base, lora], c | b)["lora"][1] == "two independent samples: no mean over questions"


def test_the_same_questions_pair_whatever_the_settings_say():
    (first, a), (second, b) = answered("lora", HARD, limit=200), answered("full", better(12))
    compared = rows([first, second])
    (_, _, _, _, table) = further(compared, Questions(a | b), units(compared))
    assert [line[4] for line in table.lines] == ["paired by question"]
    assert len(further(compared, Questions(a), units(compared))) == 2, "nothing says that they are the same"


@pytest.mark.parametrize(("questions", "words"), [(5, "too few questions"), (6, "+1.0000 [+1.0000, +1.0000]")])
def test_fewer_than_six_paired_questions_show_nothing(questions, words):
    (base, a), (lora, b) = answered("none", [0.0] * questions), answered("lora", [1.0] * questions)
    assert said([base, lora], a | b)["lora"][0].endswith(words)


@pytest.mark.parametrize("paired", [True, False])
def test_what_a_table_shows_is_corrected_for_all_that_it_compares(paired):
    """Alone this difference is shown; beside nine comparisons of equal systems it may be chance."""
    (base, a), (lora, b) = answered("none", HARD), answered("lora", better(7 if paired else 22))
    given = a | b if paired else {}
    alone = Sides(key="mmlu/acc", first=(lora,), second=(base,))
    equal = Sides(key="mmlu/acc", first=(base,), second=(base,))
    (found,) = differences([alone], Questions(given))
    assert (found.interval.shown, found.why_not is None) == (True, paired)
    among = differences([alone, *[equal] * 9], Questions(given))
    assert not among[0].interval.shown
    assert among[0].interval.p == pytest.approx(10 * found.interval.p)
    assert "tied" in among[0].text("tied")


def test_comparisons_that_can_show_nothing_cost_the_others_nothing():
    (base, a), (lora, b) = answered("none", HARD), answered("lora", better(7))
    (few, c), (other, d) = answered("none", HARD[:4], "arc/acc"), answered("lora", better(7)[:4], "arc/acc")
    given = Questions(
        {few.trial_id: c[few.trial_id] + a[base.trial_id], lora.trial_id: b[lora.trial_id] + d[other.trial_id]}
    )
    alone, small = (
        Sides(key=key, first=(x,), second=(y,)) for key, x, y in [("mmlu/acc", lora, base), ("arc/acc", other, few)]
    )
    assert differences([alone, small], given)[0] == differences([alone], given)[0]


def test_equal_systems_are_told_apart_in_at_most_one_of_twenty_tables():
    draws, false = random.Random(1), 0
    for _ in range(60):
        right = [[float(draws.random() < 0.5) for _ in range(40)] for _ in range(4)]
        built = [answered(method, own) for method, own in zip(("none", "lora", "full", "qlora"), right, strict=True)]
        found = said(
            [one for one, _ in built],
            {key: lines for _, given in built for key, lines in given.items()},
            ("lora", "full", "qlora"),
        )
        assert {how for _, how in found.values()} == {"paired by question"}
        false += any("tied" not in words for words, _ in found.values())
    assert false <= 7, "more than 7 of 60 have a chance of 1 % at a rate of 5 %"


def test_fine_tuned_trials_are_compared_with_each_other_over_the_seeds_that_both_have():
    built = [answered(method, better(gained), seed=seed) for method, gained, seed in
             [("none", 0, 1), ("lora", 40, 1), ("lora", 50, 2), ("full", 44, 1), ("full", 12, 2)]]  # fmt: skip
    compared = rows([one for one, _ in built])
    given = {key: lines for _, own in built for key, lines in own.items()}
    _, _, heading, _, table = further(compared, Questions(given), units(compared))
    assert heading.text == "Between fine-tuned trials"
    (line,) = table.lines
    assert line[:3] == ("mmlu/acc", "full", "lora")
    assert line[3].startswith("-0.0850 [")
    assert line[4] == "paired by question"
    by_errors = further(compared, Questions(), units(compared))[4].lines[0]
    assert by_errors[3].startswith("-0.0850 +/- ")
    assert by_errors[4] == "two independent samples: no values by question on file"
