"""`evaluation.split`: which held-out rows a trial is scored on."""

import json

import pytest
import tiny
from pydantic import ValidationError
from untracked import run

from ray_peft.spec import TrialSpec


def spec(model, rows, **changes):
    plain = tiny.plain_spec(model, rows, {"name": "none"}, **changes)
    plain["data"]["sources"][0]["validation"] = 5
    return TrialSpec.from_plain(plain)


def test_validation_rows_are_scored_in_place_of_the_test_rows(tiny_model, questions, tmp_path):
    rows = {}
    for split, count in (("test", 8), ("validation", 5)):
        result, _ = run(spec(tiny_model, questions, evaluation__split=split), tmp_path / split)
        assert (result.scores.eval_rows, result.scores.generated_rows) == (count, 4)
        losses = (tmp_path / split / "losses.jsonl").read_text(encoding="utf-8").splitlines()
        rows[split] = [json.loads(line)["loss"] for line in losses]
        assert len(rows[split]) == count
    assert rows["validation"] != rows["test"][:5]


def test_the_split_is_part_of_what_a_trial_is_and_the_test_rows_are_the_default(tiny_model, questions):
    default, test, validation = (
        spec(tiny_model, questions, **changes)
        for changes in ({}, {"evaluation__split": "test"}, {"evaluation__split": "validation"})
    )
    assert default.trial_id == test.trial_id != validation.trial_id
    assert default.scored_as() == test.scored_as() != validation.scored_as()


def test_a_split_without_rows_is_refused(tiny_model, questions):
    with pytest.raises(ValidationError, match="evaluation.split: validation needs validation rows"):
        TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, evaluation__split="validation"))
