"""The answer in few lines, the chosen settings behind it, and one screen's table."""

import pytest
from answered import NEARLY, POOR, REFERENCES, WORSE, material, trial

from ray_peft.report.answer import LINES, answer, answer_table
from ray_peft.report.choosing import MOST
from ray_peft.report.content import build
from ray_peft.report.document import Table
from ray_peft.report.labels import labels
from ray_peft.report.markdown import LONGEST, to_markdown
from ray_peft.report.webpage import to_html
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import Provenance


def at(lr, method="lora", *, seed=42, memory=1.0):
    """A trial of one learning rate."""
    first = trial(method, seed=seed, memory=memory)
    plain = first.spec.plain()
    plain["method"]["lr"] = lr
    spec = TrialSpec.from_plain(plain)
    return first.model_copy(update={"spec": spec, "trial_id": spec.trial_id})


def many(number, texts=POOR, methods=("lora", "qlora", "full")):
    return [(at(1e-5 * (1 + place), methods[place % len(methods)]), texts) for place in range(number)]


def test_methods_are_compared_by_their_best_setting():
    compared = material(
        [(trial("none"), POOR), (at(1e-4), WORSE), (at(2e-4), REFERENCES), (at(3e-4), POOR), (at(1e-4, "full"), NEARLY)]
    )
    (family,) = compared.families
    assert {unit.label for unit in family.units} == {"lora lr=0.0002", "none", "full"}
    assert {unit.label for unit in family.passed_over} == {"lora lr=0.0003", "lora lr=0.0001"}
    assert len(family.pairs) == 3
    settings = {line[0]: line[-1] for line in answer_table(family).lines}
    assert settings == {"lora lr=0.0002": "3", "none (no fine-tuning)": "1", "full": "1"}
    assert "4 settings, of which the best were chosen on these rows" in answer(compared)[-1]


def test_settings_of_a_single_method_are_compared_with_each_other():
    compared = material([(trial("none"), POOR), (at(1e-4), WORSE), (at(2e-4), REFERENCES)])
    (family,) = compared.families
    assert len(family.units) == 3
    assert "every other setting" in answer(compared)[0]
    (large,) = material([(trial("none"), POOR), *many(40, methods=("lora",))]).families
    assert len(large.units) == MOST + 1


def test_seeds_count_as_one_setting_and_a_lucky_seed_does_not_win():
    half = [*REFERENCES[:20], *POOR[20:]]
    compared = material(
        [(at(1e-4, seed=1), REFERENCES), (at(1e-4, seed=2), WORSE), (at(2e-4, seed=1), half), (at(2e-4, seed=2), half),
         (trial("none", seed=1), POOR), (at(1e-4, "full", seed=1), POOR)]
    )  # fmt: skip
    (family,) = compared.families
    assert next(unit.label for unit in family.units if "lora" in unit.label) == "lora lr=0.0002"


def test_two_hundred_tied_trials_give_an_answer_of_five_short_lines():
    compared = material([(trial("none"), WORSE), *many(200)])
    lines = answer(compared)
    assert len(lines) <= LINES
    assert max(map(len, lines)) < 250
    assert "full lr" in " ".join(lines)
    text = to_markdown(build(compared))
    assert text.count("\n") <= LONGEST
    assert "more lines: report.html and report.csv." in text
    assert "None" not in lines


def test_where_fine_tuning_is_not_shown_to_help_the_answer_says_that_first():
    compared = material([(trial("none", memory=1.0), POOR), (trial("lora", memory=0.5), NEARLY)])
    assert answer(compared)[0].startswith("No method is shown to be better than the model without fine-tuning.")


def test_several_models_have_one_line_each():
    trials = [
        trial(method, model={"name": f"org/m{number}"}, provenance=Provenance(model_fingerprint=f"f{number}"))
        for number in range(7)
        for method in ("none", "lora")
    ]
    compared = material([(result, POOR) for result in trials])
    lines = answer(compared)
    assert len(lines) == LINES
    assert lines[0].startswith("m0: ")
    assert lines[-1] == "3 further comparisons: see Recommendation."


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ((0.1 + 0.2, 0.00030000000000000003), ["lr=0.3", "lr=0.0003"]),
        ((1.23456789e-5, 2.0), ["lr=1.235e-05", "lr=2.0"]),
        ((0.12345678, 0.12345679), ["lr=0.12345678", "lr=0.12345679"]),  # four digits would not tell them apart
    ],
)
def test_numbers_in_labels_are_short_where_that_tells_them_apart(rates, words):
    trials = {str(place): at(rate).spec for place, rate in enumerate(rates)}
    assert [label.partition(" ")[2] for label in labels(trials).values()] == words


def test_the_first_table_has_at_most_eight_columns_and_begins_with_the_best():
    compared = material([(trial("none"), POOR), (trial("lora"), REFERENCES), (trial("full"), WORSE)])
    first = next(block for block in build(compared).sections[0].blocks if isinstance(block, Table))
    assert len(first.header) == 8
    assert first.fits
    assert [line[0] for line in first.lines] == ["lora", "none (no fine-tuning)", "full"]
    page = to_html(build(compared))
    assert page.index("<h2>Answer</h2>") < page.index('<div id="appendix">') < page.index("<h2>Scores</h2>")
