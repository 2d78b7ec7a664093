"""Differences between all rows: pairs, seeds, families, tiers."""

import pytest
from answered import NEARLY, POOR, REFERENCES, WORSE, material, trial

from ray_peft.report.material import Material
from ray_peft.report.uncertainty import Statistics
from ray_peft.result import Provenance


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
