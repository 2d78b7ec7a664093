"""Which candidate for which budget: every answer worked out by hand."""

import pytest

from ray_peft.report.recommend import Choice, cheapest, pareto, tiers, unbeaten, walk


def shown(*pairs):
    """The differences that are shown: (better, worse)."""
    return lambda first, second: (first, second) in pairs


def test_who_is_beaten_by_nobody_is_the_first_tier():
    # 2 is the best and beats 0; 1 is tied with both.
    assert unbeaten([0, 1, 2], shown((2, 0))) == [1, 2]
    assert tiers([0, 1, 2], shown((2, 0))) == [[1, 2], [0]]
    assert tiers([0, 1, 2], shown()) == [[0, 1, 2]]
    assert tiers([0, 1, 2], shown((0, 1), (0, 2), (1, 2))) == [[0], [1], [2]]
    assert tiers([], shown()) == []


def test_a_circle_ends():
    assert tiers([0, 1, 2], shown((0, 1), (1, 2), (2, 0))) == [[0, 1, 2]]


def test_the_walk_changes_where_a_dearer_one_is_shown_to_be_better():
    # base, qlora, lora, galore: lora beats qlora, all beat the base, galore is tied with lora.
    better = shown((1, 0), (2, 0), (3, 0), (2, 1))
    assert walk([0.25, 6.1, 7.3, 9.28], [0.0, 38.8, 39.7, 26.6], better) == [
        Choice(at_least=0.25, take=0),
        Choice(at_least=6.1, take=1),
        Choice(at_least=7.3, take=2, tied=(3,)),
    ]
    # By time galore is the cheapest of those that nobody beats, and lora is only tied with it.
    assert walk([0.0, 38.8, 39.7, 26.6], [0.25, 6.1, 7.3, 9.28], better) == [
        Choice(at_least=0.0, take=0),
        Choice(at_least=26.6, take=3, tied=(2,)),
    ]


def test_no_difference_shown_means_the_cheapest_for_every_budget():
    assert walk([5.0, 1.0, 3.0], [1.0, 9.0, 1.0], shown()) == [Choice(at_least=1.0, take=1, tied=(0, 2))]


def test_equal_costs_are_decided_by_the_other_cost_and_unknown_ones_are_left_out():
    assert walk([2.0, 2.0, None], [9.0, 8.0, 0.0], shown((2, 0), (2, 1))) == [Choice(at_least=2.0, take=1, tied=(0,))]
    assert walk([None, None], [1.0, 2.0], shown()) == []
    assert cheapest([0, 1], [None, None], [1.0, 2.0]) is None
    assert cheapest([0, 1, 2], [3.0, 3.0, 4.0], [None, 5.0, 1.0]) == 1


@pytest.mark.parametrize(
    ("costs", "gains", "front"),
    [([1, 2, 3], [1, 3, 2], [0, 1]), ([1, 1, 2], [1, 2, 2], [1]), ([3, 2, 1], [1, 1, 1], [2]), ([], [], [])],
)
def test_the_pareto_front(costs, gains, front):
    assert pareto(costs, gains) == front
