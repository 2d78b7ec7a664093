"""What trials hold on GPUs that are not here: predictions are real, the cluster is a value."""

from __future__ import annotations

import math

import pytest
import tiny

from ray_peft.console import Console
from ray_peft.foundation.units import GIB, MIB
from ray_peft.schedule.allotment import Allotment, card
from ray_peft.schedule.forecast import size_of
from ray_peft.schedule.placement import PARTS, Node
from ray_peft.spec import TrialSpec
from ray_peft.vram.cards import ANY

SERVER = [Node(cpus=16, gpus=2, gpu_name="a card of no list", gpu_memory_gib=11.5)]
LAPTOP = [Node(cpus=2, gpus=0)]


class Heard(Console):
    """A console that keeps what it is told."""

    def __init__(self):
        super().__init__(quiet=True)
        self.said = []

    def say(self, text=""):
        self.said.append(text)


@pytest.fixture(scope="module")
def trial(tiny_model, questions):
    def make(**changes):
        open_gpu = {"resources__gpus_per_worker": None, "resources__cpus_per_worker": None}
        changes = {"model__dtype": "bfloat16", "train__precision": "bf16", **open_gpu, **changes}
        return TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, **changes))

    return make


def footprint(spec, part="needed") -> int:
    return ANY.footprint(getattr(size_of(spec, ANY, None).prediction, part))


def test_small_trials_share_a_gpu_by_predicted_bytes_and_are_held_to_their_share(trial):
    spec = trial()
    held = Allotment(SERVER).demand(spec)
    share = held.gpus_per_worker
    assert share == math.ceil(held.gpu_memory_gib / 11.5 * PARTS) / PARTS
    assert 0 < share < 0.2
    assert held.gpu_memory_gib == pytest.approx(share * 11.5)
    assert held.gpu_memory_gib * GIB >= footprint(spec)
    assert held.needed_gib < held.gpu_memory_gib
    assert held.cpus_per_worker == 1  # a share of the cores of its GPU


def test_a_smaller_card_may_be_asked_for(trial):
    held = Allotment(SERVER, gpu_memory_gib=2.0).demand(trial())
    assert 0.4 < held.gpus_per_worker < 0.6
    assert held.gpu_memory_gib == pytest.approx(2.0 * held.gpus_per_worker)
    assert card(SERVER, 80.0).memory_gib == 11.5  # it cannot be larger than there is


def test_what_the_spec_asks_for_is_what_it_gets(trial):
    assert Allotment(SERVER).demand(trial(resources__gpus_per_worker=1.0)).gpus_per_worker == 1.0
    half = Allotment(SERVER).demand(trial(resources__gpus_per_worker=0.5))
    assert (half.gpus_per_worker, half.gpu_memory_gib) == (0.5, 5.75)


def test_workers_that_exchange_gradients_never_share(trial):
    held = Allotment(SERVER).demand(trial(resources__num_workers=2, train__batch_size=8))
    assert (held.num_workers, held.gpus_per_worker, held.gpu_memory_gib) == (2, 1.0, None)


def test_alone_a_trial_has_the_whole_gpu_and_keeps_it(trial):
    allotment, spec = Allotment(SERVER), trial()
    assert allotment.demand(spec).gpus_per_worker < 1
    assert allotment.demand(spec, alone=True).gpus_per_worker == 1
    assert allotment.demand(spec).gpus_per_worker == 1
    assert allotment.demand(spec).gpu_memory_gib is None


def test_gpus_of_unknown_size_are_not_shared_and_a_cpu_has_no_limits(trial):
    unknown = Allotment([Node(cpus=8, gpus=1)]).demand(trial())
    assert (unknown.gpus_per_worker, unknown.gpu_memory_gib, unknown.needed_gib) == (1.0, None, None)
    cpu = Allotment(LAPTOP, gpu_memory_gib=12.0).demand(trial(train__fit="auto"))
    assert (cpu.gpus_per_worker, cpu.gpu_memory_gib, dict(cpu.chosen)) == (0.0, None, {})


def test_a_trial_that_nothing_predicts_is_not_shared(trial, monkeypatch):
    from ray_peft.tasks import TASKS

    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(type(TASKS["llm_sft"]), "predictor", broken)
    console = Heard()
    allotment, spec = Allotment(SERVER), trial()
    allotment.prepare([spec], console)
    assert allotment.demand(spec).gpus_per_worker == 1.0
    assert console.said == [f"no memory prediction of {spec.trial_id}: RuntimeError: no such kernel"]


def test_the_largest_starts_first(trial, ray_cluster):
    small, large = trial(), trial(train__batch_size=512, train__micro_batch_size=512)
    assert Allotment(SERVER).prepare([small, large], Console(quiet=True)) == [large, small]


def test_what_does_not_fit_says_so_with_what_takes_less_and_runs_all_the_same(trial):
    spec = trial(train__batch_size=512, train__micro_batch_size=512)
    console = Heard()
    allotment = Allotment(SERVER, gpu_memory_gib=(footprint(trial()) + 20 * MIB) / GIB)
    allotment.prepare([spec], console)
    held = allotment.demand(spec)
    assert (held.gpus_per_worker, held.needed_gib) == (1.0, None)
    assert console.said[0].startswith(f"caution: {spec.trial_id} is predicted to need ")
    assert any("train.micro_batch_size" in line and "fits" in line for line in console.said[1:])


def test_a_trial_that_fits_nowhere_keeps_its_prediction_and_what_was_chosen(trial):
    """Shorter rows would take less, but too few training rows are that short: advice needs no data."""
    spec = trial(train__fit="auto", data__max_length=512, train__batch_size=8, train__micro_batch_size=8)
    found = size_of(spec, ANY, 0.5)
    assert found.prediction is not None
    assert dict(found.chosen) == {"train.micro_batch_size": 1, "train.gradient_checkpointing": True}
    assert found.less
    assert not any(way.fits for way in found.less)


def test_fit_auto_takes_the_largest_pass_that_fits_and_keeps_the_trial(trial):
    asked = trial(train__fit="auto", train__batch_size=512, train__micro_batch_size=1)
    roomy = Allotment(SERVER).demand(asked)
    assert dict(roomy.chosen) == {"train.micro_batch_size": 512, "train.gradient_checkpointing": False}
    some = trial(train__batch_size=512, train__micro_batch_size=64)
    tight = Allotment(SERVER, gpu_memory_gib=footprint(some, "peak_reserved") / GIB).demand(asked)
    # 64 rows fit without checkpointing, and four times as many with it.
    assert dict(tight.chosen) == {"train.micro_batch_size": 256, "train.gradient_checkpointing": True}
    many = trial(train__batch_size=512, train__micro_batch_size=256)
    wide = Allotment(SERVER, gpu_memory_gib=footprint(many, "peak_reserved") / GIB).demand(asked)
    assert dict(wide.chosen) == {"train.micro_batch_size": 256, "train.gradient_checkpointing": False}
    least = Allotment(SERVER, gpu_memory_gib=0.5).demand(asked)
    assert dict(least.chosen) == {"train.micro_batch_size": 1, "train.gradient_checkpointing": True}
    runs = asked.changed(tight.chosen)
    assert (runs.train.batch_size, runs.accumulation) == (512, 2)


def test_what_fit_chooses_for_a_gpu_makes_no_other_trial(trial):
    assert trial(train__fit="auto").trial_id == trial().trial_id
