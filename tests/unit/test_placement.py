"""Placement is arithmetic on values: no cluster is needed."""

import pytest
import tiny

from ray_peft.errors import PlacementError
from ray_peft.schedule.placement import Demand, Need, Node, concurrent_trials, demand, fit
from ray_peft.spec import TrialSpec

LAPTOP = [Node(cpus=2, gpus=0)]
SERVER = [Node(cpus=32, gpus=8)]


def spec(**resources):
    return TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d", resources=resources))


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
    ],
)
def test_what_can_never_fit_is_refused_with_the_way_out(resources, nodes, words):
    with pytest.raises(PlacementError, match=words):
        demand(TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d", train__batch_size=64, resources=resources)), nodes)


def test_multi_worker_trials_at_once_are_bounded_by_their_gpus():
    assert concurrent_trials([Demand(4, 4, 1.0)], SERVER) == 2
    assert concurrent_trials([Demand(2, 1, 0.0)], LAPTOP) == 1
    assert concurrent_trials([Demand(2, 4, 0.0)], LAPTOP) == 1


def need(name, gib, workers=1):
    return Need(name, int(gib * 2**30), workers)


def test_trials_share_a_gpu_when_they_fit_the_largest_first():
    packing = fit([need("small", 3), need("large", 8), need("middle", 5)], 12, 1)
    assert [seat.trial_id for seat in packing.seats] == ["large", "middle", "small"]
    assert packing.packs == (("large", "small"), ("middle",))
    assert packing.at_once == 2


def test_fractions_round_up_and_never_exceed_one_gpu():
    packing = fit([need(str(index), 3.9) for index in range(3)], 12, 1)
    assert {seat.gpu_fraction for seat in packing.seats} == {11 / 32}
    assert sum(2 * [packing.seats[0].gpu_fraction]) <= 1
    assert packing.packs == (("0", "1"), ("2",))


def test_one_at_a_time_when_no_two_fit():
    packing = fit([need("a", 7), need("b", 7)], 12, 1)
    assert packing.at_once == 1
    assert fit([need("a", 7), need("b", 7)], 12, 2).at_once == 2


def test_the_fullest_pack_says_how_many_run_at_one_time():
    packing = fit([need("large", 10), need("a", 5), need("b", 4)], 12, 1)
    assert packing.packs == (("large",), ("a", "b"))
    assert packing.at_once == 2


def test_what_does_not_fit_is_last_and_in_no_pack():
    packing = fit([need("large", 13), need("small", 1)], 12, 1)
    assert [(seat.trial_id, seat.fits) for seat in packing.seats] == [("small", True), ("large", False)]
    assert packing.packs == (("small",),)


def test_several_workers_share_with_nobody():
    packing = fit([need("pair", 2, workers=2), need("single", 1)], 12, 2)
    assert packing.packs == (("pair",), ("single",))
    assert packing.seats[0].gpu_fraction == 1
    assert packing.at_once == 1
    assert not fit([need("pair", 2, workers=2)], 12, 1).seats[0].fits
