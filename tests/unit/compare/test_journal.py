"""What a comparison keeps of itself, and whom it refuses."""

import pytest

from ray_peft.compare.budget import Limits, plan
from ray_peft.compare.journal import FILE, Journal, opened
from ray_peft.errors import SpecError

ASKED = {"model": "a", "hours": 2.0, "methods": ["lora"], "gpu_memory_gib": None}


@pytest.fixture
def written(tmp_path):
    planned = plan(["lora"], lambda *_: 1.0, 600, Limits(40, 20, 20, answers=True), 10.0)
    journal = Journal(tmp_path, ASKED, plan=planned, left_out={"full": "too large"})
    with journal.timed("1_search"):
        pass
    return journal


def test_the_same_question_goes_on(written):
    again = opened(written.folder, ASKED)
    assert again == written
    with again.timed("1_search"):
        pass
    assert again.spent_s["1_search"] > written.spent_s["1_search"]
    assert again.whole_s == sum(again.spent_s.values())


def test_another_question_needs_another_folder(written):
    with pytest.raises(SpecError, match="holds a comparison with hours 2.0 .now 1.0.; give another --out"):
        opened(written.folder, ASKED | {"hours": 1.0})


def test_a_comparison_that_was_refused_for_its_time_may_be_given_more(tmp_path):
    Journal(tmp_path, ASKED, spent_s={"0_speed": 60.0}).write()
    assert opened(tmp_path, ASKED | {"hours": 4.0}) == Journal(tmp_path, ASKED | {"hours": 4.0})


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"plan": {"rates": 3}, "request": {}}'])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match="is no record of a comparison"):
        opened(tmp_path, ASKED)
