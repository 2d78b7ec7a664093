"""On a cluster of unlike GPUs, a trial that the small ones cannot hold is planned for a large one and held to it."""

from __future__ import annotations

import random

import pytest
import tiny

from ray_peft.schedule.decide import Decision, Demand, Node, decide
from ray_peft.schedule.mixed import kinds, spread
from ray_peft.schedule.plan import cautions
from ray_peft.spec import TrialSpec
from ray_peft.vram import Prediction
from ray_peft.vram.cards import ANY
from ray_peft.vram.fit import Size

SMALL = Node(8, 1, "NVIDIA L4", 22.0, "accelerator_type:L4")
MIDDLE = Node(16, 2, "NVIDIA L40S", 44.0, "accelerator_type:L40S")
LARGE = Node(32, 4, "NVIDIA H200", 139.0, "accelerator_type:H200")
NODES = [LARGE, SMALL, Node(64, 0), MIDDLE]


def spread_out(nodes: list[Node], **gib: float | tuple[float, int]) -> Decision:
    """Decide for trials of predicted footprints, in GiB, or GiB and workers; a seed each, in the order given."""
    trials, sizes = [], {}
    for seed, given in enumerate(gib.values()):
        footprint, workers = given if isinstance(given, tuple) else (given, 1)
        resources = {"num_workers": workers}
        plain = tiny.plain_spec("m/m", "d/d", train__batch_size=120, resources=resources, seed=seed)
        trials.append(TrialSpec.from_plain(plain))
        needed = int(footprint * 2**30) - ANY.context - ANY.margin
        sizes[trials[-1].trial_id] = Size(Prediction({}, needed, needed, None))
    return spread(decide(trials, nodes, sizes), nodes, lambda some, part: decide(some, part, sizes))


def placed(decision: Decision) -> dict[int, tuple[str | None, float, bool | None]]:
    return {run.trial.seed: (run.demand.accelerator, run.demand.gpus_per_worker, run.fits) for run in decision.runs}


def test_each_trial_goes_to_the_smallest_kind_that_holds_it():
    decision = spread_out(NODES, fits_all=10, middle=30, large=100, too_large=200)
    assert placed(decision) == {
        0: (None, 15 / 32, True),
        1: ("accelerator_type:L40S", 22 / 32, True),
        2: ("accelerator_type:H200", 24 / 32, True),
        3: ("accelerator_type:H200", 1.0, False),
    }
    assert [run.trial.seed for run in decision.runs] == [3, 2, 1, 0]
    assert [run.card.gpu.name for run in decision.runs if run.card] == ["NVIDIA H200", "NVIDIA H200", "NVIDIA L40S"]


def test_a_team_that_the_large_kind_has_too_few_of_stays_where_it_was():
    decision = spread_out(NODES, team=(30, 5), pair=(30, 2))
    assert placed(decision) == {0: (None, 1.0, False), 1: ("accelerator_type:L40S", 1.0, True)}


@pytest.mark.parametrize("seed", range(20))
def test_no_trial_may_start_on_a_card_that_is_too_small(seed):
    rng = random.Random(seed)
    nodes = [rng.choice([SMALL, MIDDLE, LARGE, Node(16, 0)]) for _ in range(rng.randint(1, 6))] + [SMALL]
    footprints = [rng.uniform(2, 150) for _ in range(8)]
    decision = spread_out(nodes, **{f"trial{number}": gib for number, gib in enumerate(footprints)})
    assert sorted(placed(decision)) == list(range(8))
    cards = [node for node in nodes if node.gpus]
    for run in decision.runs:
        footprint, share = footprints[run.trial.seed], run.demand.gpus_per_worker
        offered = [node for node in cards if run.demand.accelerator in (None, node.accelerator)]
        if run.fits:
            assert all(footprint <= share * node.gpu_memory_gib + 1e-6 for node in offered)
        else:
            assert all(footprint > node.gpu_memory_gib for node in cards), "a card could hold it"
            assert {node.gpu_memory_gib for node in offered} == {max(node.gpu_memory_gib for node in cards)}


def test_a_sweep_says_which_trials_are_held_to_which_cards():
    decision = spread_out(NODES, fits_all=10, large=100, larger=110)
    large, larger = (run.trial.trial_id for run in decision.runs if run.trial.seed)
    assert cautions(decision) == [
        f"on H200 alone, since the cluster's smallest GPUs cannot hold them: {large}, {larger}"
    ]


@pytest.mark.parametrize(
    "nodes",
    [
        [SMALL, SMALL],
        [SMALL, Node(8, 1, "NVIDIA H200", 139.0)],  # Ray names no kind: nothing could hold a trial to it
        [SMALL, Node(8, 1, None, None, "accelerator_type:H200")],
        [Node(8, 0)],
    ],
)
def test_kinds_that_cannot_be_told_apart_are_one(nodes):
    assert len(kinds(nodes)) < 2


def test_what_ray_holds_for_a_worker():
    assert Demand(1, 4, 0.5, accelerator="accelerator_type:H200").per_worker() == {
        "CPU": 4,
        "GPU": 0.5,
        "accelerator_type:H200": 0.001,
    }
    assert Demand(1, 4, 0.0).per_worker() == {"CPU": 4}
