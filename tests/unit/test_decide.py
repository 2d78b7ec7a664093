"""What runs where is arithmetic on values: neither a cluster nor a prediction is needed."""

from collections import Counter

import pytest
import tiny

from ray_peft.errors import PlacementError
from ray_peft.schedule.decide import Decision, Demand, Node, card, decide
from ray_peft.spec import TrialSpec
from ray_peft.vram import Prediction
from ray_peft.vram.cards import ANY
from ray_peft.vram.fit import Size

LAPTOP = [Node(cpus=2, gpus=0)]
SERVER = [Node(cpus=32, gpus=8)]


def spec(seed=1, method=None, **resources):
    return TrialSpec.from_plain(
        tiny.plain_spec("m/m", "d/d", method, train__batch_size=64, resources=resources, seed=seed)
    )


def demand(trial: TrialSpec, nodes) -> Demand:
    decision = decide([trial], nodes, {})
    decision.check()
    return decision.runs[0].demand


def test_an_open_trial_takes_the_whole_laptop():
    assert demand(spec(), LAPTOP) == Demand(1, 2, 0.0)


def test_an_open_trial_takes_one_gpu_and_its_share_of_the_cores():
    assert demand(spec(), SERVER) == Demand(1, 4, 1.0)


def test_a_share_of_a_gpu_takes_that_share_of_the_cores():
    assert demand(spec(gpus_per_worker=0.5), SERVER) == Demand(1, 2, 0.5)


def test_cpu_workers_share_a_node():
    assert demand(spec(num_workers=2), [Node(8, 0)]) == Demand(2, 4, 0.0)


@pytest.mark.parametrize(
    ("resources", "nodes", "words"),
    [
        ({"gpus_per_worker": 1.0}, LAPTOP, "needs 1 GPUs .* there are 0 here; set resources.gpus_per_worker: 0"),
        ({"num_workers": 16}, SERVER, "needs 16 GPUs .* there are 8 here; lower resources.num_workers"),
        ({"cpus_per_worker": 4}, LAPTOP, "needs 4 CPU cores on one node, but the largest node here has 2"),
        ({"num_workers": 4, "cpus_per_worker": 2}, LAPTOP, "the cluster holds 1 of them"),
        ({}, [], "the cluster has no node with a CPU core"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_way_out(resources, nodes, words):
    possible = spec(gpus_per_worker=0, cpus_per_worker=1)
    impossible = spec(**resources)
    decision = decide([possible, impossible], nodes, {})
    assert [run.trial for run in decision.runs] == [possible] * bool(nodes)
    assert impossible.trial_id in decision.impossible
    assert not decision.all_fit
    with pytest.raises(PlacementError, match=words):
        decide([impossible], nodes, {}).check()


def test_teams_of_workers_at_once_are_bounded_by_what_they_hold():
    def most(nodes, **resources):
        (phase,) = decide([spec(**resources)], nodes, {}).phases
        return phase.most_teams

    assert most(SERVER, num_workers=4) == 2
    assert most(LAPTOP, num_workers=2, cpus_per_worker=1) == 1
    assert most([Node(16, 0)], num_workers=2, cpus_per_worker=4) == 2
    assert most(SERVER) is None


def sized(**gib: float | tuple[float, int]) -> tuple[list[TrialSpec], dict[str, Size]]:
    """Trials of predicted footprints, in GiB, or GiB and workers; a seed each, in the order given."""
    trials, sizes = [], {}
    for seed, given in enumerate(gib.values()):
        footprint, workers = given if isinstance(given, tuple) else (given, 1)
        trials.append(spec(seed, num_workers=workers))
        needed = int(footprint * 2**30) - ANY.context - ANY.margin
        sizes[trials[-1].trial_id] = Size(Prediction({}, needed, needed, None))
    return trials, sizes


def decided(memory_gib: float, gpus: int, cpus: int = 64, **gib: float | tuple[float, int]) -> Decision:
    trials, sizes = sized(**gib)
    return decide(trials, [Node(cpus, gpus, None, memory_gib)], sizes)


def order(decision: Decision) -> list[int]:
    return [run.trial.seed for run in decision.runs]


def test_trials_share_a_gpu_when_they_fit_the_largest_first():
    decision = decided(12, 1, small=3, large=8, middle=5)
    assert order(decision) == [1, 2, 0]
    assert [run.demand.gpus_per_worker for run in decision.runs] == [22 / 32, 14 / 32, 8 / 32]
    assert [run.demand.cpus_per_worker for run in decision.runs] == [44, 28, 16]
    assert decision.at_once == 2


def test_shares_round_up_and_never_exceed_one_gpu():
    decision = decided(12, 1, a=3.9, b=3.9, c=3.9)
    assert Counter(run.demand.gpus_per_worker for run in decision.runs) == {11 / 32: 3}
    assert decision.at_once == 2


def test_one_at_a_time_on_each_gpu_when_no_two_fit():
    assert decided(12, 1, a=7, b=7).at_once == 1
    assert decided(12, 2, a=7, b=7).at_once == 2


def test_cores_bound_how_many_run_at_once_as_memory_does():
    small = {str(number): 0.9 for number in range(8)}
    assert decided(12, 1, cpus=16, **small).at_once == 8
    assert decided(12, 1, cpus=4, **small).at_once == 4  # a core each at least


def test_what_does_not_fit_says_so_and_starts_first_on_a_gpu_of_its_own():
    decision = decided(12, 1, small=1, large=13)
    assert [(run.trial.seed, run.fits, run.demand.gpus_per_worker) for run in decision.runs] == [
        (1, False, 1.0),
        (0, True, 3 / 32),
    ]
    assert [run.demand.needed_gib is None for run in decision.runs] == [True, False]
    assert not decision.all_fit


def test_teams_run_before_the_others_and_share_with_nobody():
    decision = decided(12, 2, single=1, pair=(2, 2))
    assert [[run.trial.seed for run in phase.runs] for phase in decision.phases] == [[1], [0]]
    assert (decision.runs[0].demand.num_workers, decision.runs[0].demand.gpus_per_worker) == (2, 1.0)
    assert decision.at_once == 1
    assert list(decided(12, 1, pair=(2, 2)).impossible.values())


def test_an_ensemble_runs_after_its_members_however_large_it_is():
    members = [{"method": {"name": "lora", "rank": rank}} for rank in (2, 4)]
    plain = tiny.plain_spec("m/m", "d/d", {"name": "ensemble", "members": members}, resources={})
    plain["data"]["sources"][0] |= {"validation": 6}
    ensemble = TrialSpec.from_plain(plain)
    trials, sizes = sized(a=1, b=2)
    sizes[ensemble.trial_id] = Size(Prediction({}, 8 * 2**30, 8 * 2**30, None))
    decision = decide([*trials, ensemble], [Node(8, 1, None, 12.0)], sizes)
    assert [[run.trial.method.name for run in phase.runs] for phase in decision.phases] == [["lora"] * 2, ["ensemble"]]


def test_a_trial_on_the_cpu_takes_no_gpu_whatever_is_predicted():
    trial = spec(gpus_per_worker=0, cpus_per_worker=3)
    size = Size(Prediction({}, 2**30, 2**30, None), {"train.micro_batch_size": 8})
    (run,) = decide([trial], [Node(8, 1, None, 12.0)], {trial.trial_id: size}).runs
    assert run.demand == Demand(1, 3, 0.0)
    assert run.fits


def test_trials_are_placed_on_the_smallest_gpu_of_a_cluster():
    nodes = [Node(8, 1, "NVIDIA H200", 139.0), Node(8, 1, "NVIDIA L4", 22.0), Node(8, 0)]
    assert (card(nodes).gpu.name, card(nodes).memory_gib) == ("NVIDIA L4", 22.0)
    assert card(nodes, 12.0).memory_gib == 12.0
    assert card([Node(8, 1)]) is None
    assert card([Node(8, 1)], 12.0).memory_gib == 12.0
    assert card(LAPTOP, 12.0) is None
