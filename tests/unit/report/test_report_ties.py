"""Differences between all rows: pairs, seeds, families, tiers."""

import numpy as np
import pytest
from answered import NEARLY, POOR, REFERENCES, WORSE, material, trial

from ray_peft.report.material import Material
from ray_peft.report.uncertainty import Statistics
from ray_peft.trial.result import Provenance


def test_pairs_and_tiers_by_hand():
    found = material(
        [(trial("none"), POOR), (trial("lora"), REFERENCES), (trial("qlora"), NEARLY), (trial("full"), WORSE)]
    )
    (family,) = found.families
    places = {unit.label: place for place, unit in enumerate(family.units)}
    # Perfect answers have ROUGE-L 1; the poor ones share 4 of their 6 and of the 10 reference words: 8 / 16.
    assert family.values[places["lora"]] == 1.0
    assert family.values[places["none"]] == pytest.approx(0.5)
    assert family.better(places["lora"], places["none"])
    assert not family.better(places["none"], places["lora"])
    none, qlora = places["none"], places["qlora"]
    assert not family.better(none, qlora)  # one row of forty differs: resamples without it are equal
    assert not family.better(qlora, none)
    assert family.pairs[min(none, qlora), max(none, qlora)].quality.low <= 0
    tiers = [[family.units[place].label for place in tier] for tier in family.tiers()]
    assert tiers == [["lora"], ["none", "qlora"], ["full"]]
    assert found.left_out == {}


def test_seeds_are_paired_by_row_and_seed():
    half = [*REFERENCES[:20], *POOR[20:]]
    given = [
        (trial("none", seed=7), POOR),
        (trial("lora", seed=1), REFERENCES),
        (trial("lora", seed=2), POOR),
        (trial("qlora", seed=2), POOR),  # its seed 1 failed: only seed 2 of lora stands beside it
        (trial("qlora", seed=1, status="failed"), None),
        (trial("full", seed=1), half),
        (trial("full", seed=2), half),
    ]
    (family,) = material(given).families
    place = {unit.label: index for index, unit in enumerate(family.units)}

    def pair(first, second):
        return family.pairs[place[first], place[second]].quality

    assert family.values[place["lora"]] == pytest.approx(0.75)  # the mean over its seeds
    assert pair("lora", "qlora").difference == 0
    assert pair("none", "lora").difference == pytest.approx(-0.25)  # no seed in common: all seeds of both
    assert not family.better(place["lora"], place["qlora"])
    # Means over seeds in every row: 0.75 everywhere against 1 in half of the rows and 0.5 in the others.
    assert pair("full", "lora").difference == pytest.approx(0)
    assert not pair("full", "lora").excludes_zero
    assert pair("full", "lora").high - pair("full", "lora").low > 0.05


def test_the_base_stands_beside_all_seeds_also_if_it_shares_one_of_them():
    given = [(trial("none", seed=1), POOR), (trial("lora", seed=1), REFERENCES), (trial("lora", seed=2), POOR)]
    (family,) = material(given).families
    assert family.pairs[0, 1].quality.difference == pytest.approx(-0.25)  # not -0.5, that of seed 1 alone


def test_another_order_of_seeds_changes_nothing():
    given = [(trial("lora", seed=1), REFERENCES), (trial("lora", seed=2), POOR)]
    other = [(trial("full", seed=2), POOR), (trial("full", seed=1), REFERENCES)]
    (family,) = material([*given, *other]).families
    (pair,) = family.pairs.values()
    assert (pair.quality.low, pair.quality.high, pair.bleu4.low, pair.bleu4.high) == (0, 0, 0, 0)


def test_rows_that_answered_other_rows_are_another_family():
    first, second, third = trial("none"), trial("lora"), trial("full")
    answers = {
        first.trial_id: (POOR, REFERENCES),
        second.trial_id: (REFERENCES, REFERENCES),
        third.trial_id: (REFERENCES[:10], REFERENCES[:10]),
    }
    found = Material(title="t", results=[first, second, third], answers=answers)
    assert [[unit.label for unit in family.units] for family in found.families] == [["none", "lora"], ["full"]]


def test_what_is_no_candidate_is_named():
    found = material(
        [
            (trial("none"), POOR),
            (trial("lora", status="failed"), None),
            (trial("full"), None),
            (trial("galore", model={"random_weights": True}), WORSE),
        ]
    )
    assert [unit.label for family in found.families for unit in family.units] == ["none random_weights=false"]
    assert {label.split()[0]: reason for label, reason in found.left_out.items()} == {
        "lora": "did not finish",
        "full": "no answers on file",
        "galore": "random weights, so its scores mean nothing",
    }


def test_without_answers_the_loss_decides_beyond_its_margin():
    given = [(trial("none", loss=2.0), None), (trial("lora", loss=1.5), None), (trial("full", loss=1.51), None)]
    (family,) = material(given).families
    assert family.measure == "eval_loss"
    place = {unit.label: index for index, unit in enumerate(family.units)}
    assert family.better(place["lora"], place["none"])
    assert not family.better(place["lora"], place["full"])  # 0.01 is less than 1 % of 1.5
    seeds = [(trial("lora", seed=s, loss=x), None) for s, x in ((1, 1.0), (2, 2.0))]
    seeds += [(trial("full", seed=s, loss=x), None) for s, x in ((1, 1.9), (2, 3.0))]
    (family,) = material(seeds).families
    assert family.tiers() == [[0, 1]]  # the ranges over seeds touch


def test_losses_of_other_rows_are_not_compared():
    prepared = [Provenance(data_key=key) for key in ("a", "b")]
    given = [
        (trial("none", loss=2.0, provenance=prepared[0]), None),
        (trial("lora", loss=1.5, provenance=prepared[1]), None),
    ]
    assert len(material(given).families) == 2


def test_losses_of_single_text_rows_are_compared_like_scores():
    def found(second, tokens=None, loss=None):
        first = [2.0 + 0.1 * (row % 7) for row in range(20)]
        weights = [5 + row % 3 for row in range(20)]
        results = [
            trial("lora", loss=float(np.average(first, weights=weights))),
            trial("full", loss=loss or float(np.average(second, weights=tokens or weights))),
        ]
        return Material(
            title="t", results=results,
            losses=dict(zip((result.trial_id for result in results), (first, second), strict=True)),
            loss_tokens={results[0].trial_id: weights, results[1].trial_id: tokens or weights},
        )  # fmt: skip

    lower = [2.0 + 0.1 * (row % 7) - 0.005 for row in range(20)]
    (family,) = found(lower).families
    assert (family.measure, family.paired, family.rows) == ("eval_loss", True, 20)
    # A quarter of a percent in every single row is shown, where the margin of 1 % would tie them.
    place = {unit.label: index for index, unit in enumerate(family.units)}
    assert family.better(place["full"], place["lora"])
    assert not family.better(place["lora"], place["full"])
    results = found(lower).results
    assert family.values[place["lora"]] == pytest.approx(results[0].scores.eval_loss, abs=1e-12)
    # A few rows that are much better do not make a system better, though the mean is 3 % lower.
    lucky = [2.0 + 0.1 * (row % 7) - (1.2 if row == 3 else 0.0) for row in range(20)]
    (family,) = found(lucky).families
    assert family.tiers() == [[0, 1]]
    # Rows with other tokens, as of another tokenizer, are not the same rows.
    assert len(found(lower, tokens=[7] * 20).families) == 2


def test_rows_are_compared_on_one_model_and_on_the_files_as_they_were():
    def two(first, second):
        given = [(trial("none", provenance=first), POOR), (trial("lora", provenance=second), REFERENCES)]
        return [len(family.units) for family in material(given).families], material(given).intervals

    one, other = Provenance(model_fingerprint="a", data_key="d"), Provenance(model_fingerprint="b", data_key="d")
    assert two(one, other) == ([1, 1], {})  # another model under the same name
    assert two(one, Provenance(model_fingerprint="a", data_key="e")) == ([1, 1], {})  # another file under the same name
    assert two(one, one)[0] == [2]
    assert two(one, Provenance())[0] == [2]  # of an older version, which did not say
    # A second model on the same rows is a comparison of its own.
    elsewhere = trial("full", model={"name": "org/other"}, provenance=other)
    given = [(trial("none", provenance=one), POOR), (trial("lora", provenance=one), POOR), (elsewhere, REFERENCES)]
    assert [len(family.units) for family in material(given).families] == [2, 1]


def test_of_equal_rows_a_chance_difference_is_corrected_for_all_pairs():
    # The second is better in 12 of 14 rows that differ: shown alone, not as one of 28 pairs.
    better = [REFERENCES[i] if i < 12 else "dog" if i < 14 else POOR[i] for i in range(40)]
    methods = ("none", "lora", "full", "galore", "qlora", "qlora_galore")
    pair = material([(trial("none"), POOR), (trial("lora"), better)]).families[0]
    assert pair.better(1, 0)
    seeds = [(trial(method, model={"revision": str(number)}), POOR) for method in methods for number in range(2)]
    (family,) = material([*seeds, (trial("lora", model={"revision": "9"}), better)]).families
    best = next(place for place, value in enumerate(family.values) if value > 0.55)
    assert not any(family.better(best, other) for other in range(len(family.units)) if other != best)


def test_statistics_are_computed_once_a_trial(monkeypatch):
    from ray_peft.report import uncertainty

    calls = []
    monkeypatch.setattr(uncertainty, "rouge_l_rows", lambda *given: calls.append(1) or [1.0] * len(given[0]))
    statistics = Statistics({"a": (POOR, REFERENCES)})
    assert statistics.rouge("a") is statistics.rouge("a")
    assert len(calls) == 1
    found = material([(trial(method), POOR) for method in ("none", "lora", "full", "galore")])
    assert len(found.families[0].pairs) == 6
    assert len(found.intervals) == 3
    assert len(calls) == 5


def test_a_handful_of_rows_shows_nothing():
    def shown(rows):
        given = [(trial("none"), POOR[:rows]), (trial("lora"), REFERENCES[:rows])]
        (family,) = material(given, REFERENCES[:rows]).families
        return family.better(1, 0), len(family.tiers())

    # All rows favour LoRA: of five equal ones that happens in 2 of 32 cases, of six in 2 of 64.
    assert shown(1) == shown(5) == (False, 1)
    assert shown(6) == (True, 2)
