"""Exact match, token F1, metrics of one's own, and checks of answers without a judge."""

import pytest

from ray_peft.errors import SpecError
from ray_peft.metrics.answer_checks import check, repeated_share
from ray_peft.metrics.own_metrics import load, rows
from ray_peft.metrics.short_answers import exact_match, exact_match_rows, token_f1_rows
from ray_peft.spec import TrialSpec
from ray_peft.store.consent import check_consent


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1"),
    [
        ("The cat!", "cat", 1.0, 1.0),
        ("a red cat", "the black cat", 0.0, 0.5),
        ("", "cat", 0.0, 0.0),
        ("the", "the", 1.0, 1.0),
        ("", "", 1.0, 1.0),
        ("cat cat", "cat", 0.0, 2 / 3),
        ("北京", "北京。", 1.0, 1.0),
        ("北京", "南京", 0.0, 0.5),
    ],
)
def test_exact_match_and_f1_by_hand(answer, reference, exact, f1):
    assert exact_match_rows([answer], [reference]) == [exact]
    assert token_f1_rows([answer], [reference]) == [pytest.approx(f1)]


def test_short_answers_need_as_many_references():
    with pytest.raises(ValueError, match="1 answers, 2 references"):
        exact_match(["a"], ["a", "b"])


def test_checks_by_hand():
    checks = check(
        ["one two three four five", "", "no no no no no no no no", "北京是首都"],
        ["one two three four five six seven eight nine ten", "x", "no", "Peking is the capital"],
        [True, True, False, None],
    )
    assert checks.ended == pytest.approx(2 / 3)
    assert checks.empty == 0.25
    assert checks.length == pytest.approx((0.5 + 5 / 4) / 2)  # of 0.5, 0, 8 and 5 / 4
    assert checks.repeating == 0.25
    assert checks.same_script == pytest.approx(2 / 3)  # the empty answer has none


def test_a_text_without_repetition_repeats_nothing():
    assert repeated_share(["a", "b", "c", "d", "e"]) == 0
    assert repeated_share(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)
    assert repeated_share(["a"]) == 0


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_scores_of_a_test.py").write_text(
        "number = 3\n"
        "def same_length(answer, reference):\n    return float(len(answer) == len(reference))\n"
        "def broken(answer, reference):\n    return len(answer) / 0\n"
        "def infinite(answer, reference):\n    return float('inf')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_scores_of_a_test"


def test_a_metric_of_ones_own_scores_every_row(own_module):
    assert rows(f"{own_module}:same_length", ["ab", "c"], ["xy", "zz"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_module_of_a_test:f", "cannot be imported: ModuleNotFoundError"),
        ("own_scores_of_a_test:missing", "cannot be imported: AttributeError"),
        ("own_scores_of_a_test:number", "is a int, not a function"),
    ],
)
def test_what_is_no_metric_is_refused_with_its_reason(own_module, path, reason):
    with pytest.raises(SpecError, match=f"evaluation.metrics: {path}: {reason}"):
        load(path)


@pytest.mark.parametrize(("name", "reason"), [("broken", "row 0: ZeroDivisionError"), ("infinite", "row 0: gives inf")])
def test_a_metric_that_fails_names_the_row(own_module, name, reason):
    with pytest.raises(SpecError, match=reason):
        rows(f"{own_module}:{name}", ["a"], ["b"])


def spec(metrics):
    return TrialSpec.from_plain(
        {
            "model": {"name": "some/model"},
            "data": {"sources": [{"recipe": "dolly", "path": "dolly.jsonl", "train": 8, "test": 2}]},
            "method": {"name": "lora"},
            "train": {"steps": 3},
            "evaluation": {"metrics": metrics},
        }
    )


def test_metrics_of_a_run_from_elsewhere_need_consent_and_no_metric_changes_no_id():
    with pytest.raises(SpecError, match="evaluation.metrics: os:system: Python code from there would run"):
        check_consent(spec(["os:system"]), "run", trust_remote_code=False)
    check_consent(spec(["os:system"]), "run", trust_remote_code=True)
    without = spec([]).plain()
    del without["evaluation"]["metrics"]
    assert TrialSpec.from_plain(without).trial_id == spec([]).trial_id


@pytest.mark.parametrize("path", ["os.system", ":f", "os:", "a b:c", "../x:f"])
def test_a_path_that_names_no_function_is_refused(path):
    with pytest.raises(ValueError, match="pattern"):
        spec([path])
