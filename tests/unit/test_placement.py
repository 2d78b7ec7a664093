"""Placement is arithmetic on values: no cluster is needed."""

import pytest
import tiny

from ray_peft.errors import PlacementError
from ray_peft.placement import Demand, Node, concurrent_trials, demand
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
