"""What trials hold on GPUs that are not here: predictions are real, the cluster is a value."""

from __future__ import annotations

import math

import pytest
import tiny

from ray_peft.foundation.units import GIB, MIB
from ray_peft.schedule import sizes
from ray_peft.schedule.decide import PARTS, Card, Demand, Node, card
from ray_peft.schedule.plan import cautions
from ray_peft.schedule.sizes import Scheduler, predicted
from ray_peft.spec import TrialSpec
from ray_peft.vram.cards import ANY
from ray_peft.vram.fit import Size
from ray_peft.vram.nearest import choose
from ray_peft.vram.predict import Prediction

SERVER = [Node(cpus=16, gpus=2, gpu_name="a card of no list", gpu_memory_gib=11.5)]
LAPTOP = [Node(cpus=2, gpus=0)]


@pytest.fixture(scope="module")
def trial(tiny_model, questions):
    def make(**changes):
        open_gpu = {"resources__gpus_per_worker": None, "resources__cpus_per_worker": None}
        changes = {"model__dtype": "bfloat16", "train__precision": "bf16", **open_gpu, **changes}
        return TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, **changes))

    return make


def footprint(spec, part="needed") -> int:
    return ANY.footprint(getattr(predicted(spec, Card(ANY, 1000.0)).prediction, part))


def demand(spec, nodes, gpu_memory_gib=None, **how) -> Demand:
    return Scheduler(nodes, gpu_memory_gib).decide([spec], **how).runs[0].demand


def test_small_trials_share_a_gpu_by_predicted_bytes_and_are_held_to_their_share(trial):
    spec = trial()
    held = demand(spec, SERVER)
    share = held.gpus_per_worker
    assert share == math.ceil(held.gpu_memory_gib / 11.5 * PARTS) / PARTS
    assert 0 < share < 0.2
    assert held.gpu_memory_gib == pytest.approx(share * 11.5)
    assert held.gpu_memory_gib * GIB >= footprint(spec)
    assert held.needed_gib < held.gpu_memory_gib
    assert held.cpus_per_worker == 1  # a share of the cores of its GPU


def test_a_smaller_card_may_be_asked_for(trial):
    held = demand(trial(), SERVER, 2.0)
    assert 0.4 < held.gpus_per_worker < 0.6
    assert held.gpu_memory_gib == pytest.approx(2.0 * held.gpus_per_worker)
    assert card(SERVER, 80.0).memory_gib == 11.5  # it cannot be larger than there is


def test_what_the_spec_asks_for_is_what_it_gets(trial):
    assert demand(trial(resources__gpus_per_worker=1.0), SERVER).gpus_per_worker == 1.0
    half = demand(trial(resources__gpus_per_worker=0.5), SERVER)
    assert (half.gpus_per_worker, half.gpu_memory_gib) == (0.5, 5.75)


def test_workers_that_exchange_gradients_never_share(trial):
    held = demand(trial(resources__num_workers=2, train__batch_size=8), SERVER)
    assert (held.num_workers, held.gpus_per_worker, held.gpu_memory_gib) == (2, 1.0, None)


def test_alone_a_trial_has_the_whole_gpu(trial):
    scheduler, spec, neighbour = Scheduler(SERVER), trial(), trial(seed=2)
    decision = scheduler.decide([spec, neighbour], alone=[spec.trial_id])
    held = {run.trial.trial_id: run.demand for run in decision.runs}
    assert (held[spec.trial_id].gpus_per_worker, held[spec.trial_id].gpu_memory_gib) == (1, None)
    assert held[neighbour.trial_id].gpus_per_worker < 1
    assert scheduler.decide([spec]).runs[0].demand.gpus_per_worker < 1


def test_gpus_of_unknown_size_are_not_shared_and_a_cpu_has_no_limits(trial):
    unknown = demand(trial(), [Node(cpus=8, gpus=1)])
    assert (unknown.gpus_per_worker, unknown.gpu_memory_gib, unknown.needed_gib) == (1.0, None, None)
    cpu = demand(trial(train__fit="auto"), LAPTOP, 12.0)
    assert (cpu.gpus_per_worker, cpu.gpu_memory_gib, dict(cpu.chosen)) == (0.0, None, {})


def test_a_trial_that_nothing_predicts_is_not_shared(trial, monkeypatch):
    from ray_peft.tasks import TASKS

    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(type(TASKS["llm_sft"]), "predictor", broken)
    spec = trial()
    decision = Scheduler(SERVER).decide([spec])
    assert decision.runs[0].demand.gpus_per_worker == 1.0
    assert cautions(decision) == [f"no memory prediction of {spec.trial_id}: RuntimeError: no such kernel"]


def test_the_largest_starts_first(trial, ray_cluster):
    small, large = trial(), trial(train__batch_size=512, train__micro_batch_size=512)
    assert [run.trial for run in Scheduler(SERVER).decide([small, large]).runs] == [large, small]


def test_what_does_not_fit_says_so_with_what_takes_less_and_runs_all_the_same(trial):
    spec = trial(train__batch_size=512, train__micro_batch_size=512)
    decision = Scheduler(SERVER, (footprint(trial()) + 20 * MIB) / GIB).decide([spec])
    held, lines = decision.runs[0].demand, cautions(decision)
    assert (held.gpus_per_worker, held.needed_gib) == (1.0, None)
    assert lines[0].startswith(f"caution: {spec.trial_id} is predicted to need ")
    assert any("train.micro_batch_size" in line and "fits" in line for line in lines[1:])


def test_a_trial_that_fits_nowhere_keeps_its_prediction_and_what_was_chosen(trial):
    """Shorter rows would take less, but too few training rows are that short: advice needs no data."""
    spec = trial(train__fit="auto", data__max_length=512, train__batch_size=8, train__micro_batch_size=8)
    size = predicted(spec, Card(ANY, 0.5))
    assert size.prediction is not None
    assert dict(size.chosen) == {"train.micro_batch_size": 1, "train.gradient_checkpointing": True}
    assert size.less
    assert not any(way.fits for way in size.less)


def test_fit_auto_takes_the_largest_pass_that_fits_and_keeps_the_trial(trial):
    """Where passes are not recorded, the host's time decides, and fewer passes are worth the recomputation."""
    asked = trial(train__fit="auto", train__batch_size=512, train__micro_batch_size=1, train__cuda_graphs=False)
    roomy = demand(asked, SERVER)
    assert dict(roomy.chosen) == {"train.micro_batch_size": 512, "train.gradient_checkpointing": False}
    some = trial(train__batch_size=512, train__micro_batch_size=64, train__cuda_graphs=False)
    tight = demand(asked, SERVER, footprint(some, "peak_reserved") / GIB)
    # 64 rows fit without checkpointing, and four times as many with it.
    assert dict(tight.chosen) == {"train.micro_batch_size": 256, "train.gradient_checkpointing": True}
    many = trial(train__batch_size=512, train__micro_batch_size=256, train__cuda_graphs=False)
    wide = demand(asked, SERVER, footprint(many, "peak_reserved") / GIB)
    assert dict(wide.chosen) == {"train.micro_batch_size": 256, "train.gradient_checkpointing": False}
    least = demand(asked, SERVER, 0.5)
    assert dict(least.chosen) == {"train.micro_batch_size": 1, "train.gradient_checkpointing": True}
    runs = asked.changed(tight.chosen)
    assert (runs.train.batch_size, runs.accumulation) == (512, 2)


@pytest.mark.parametrize(
    ("fixed_rows", "room", "rows", "checkpointing"),
    [
        (1.4, 40, 4, False),  # 1.35 a row; with checkpointing 1.51 of 32
        (1.4, 20, 16, True),  # 1.58 a row; without checkpointing 1.7 of two
        (None, 40, 32, True),  # unrecorded passes: more than four times the rows
        (None, 320, 32, False),
        (1.4, 0, 1, True),
    ],
)
def test_fit_auto_takes_the_pass_whose_rows_take_the_least_time(trial, fixed_rows, room, rows, checkpointing):
    """Without checkpointing a row takes ten units of memory, with it one."""
    written = trial(train__fit="auto", train__batch_size=64, train__micro_batch_size=1)

    def predict(variant):
        taken = variant.train.micro_batch_size * (1 if variant.train.gradient_checkpointing else 10)
        return Prediction({}, taken, taken, None, fixed_rows)

    chosen = choose(written, predict, lambda prediction: prediction.peak_allocated <= room)
    assert chosen == {"train.micro_batch_size": rows, "train.gradient_checkpointing": checkpointing}


def test_what_fit_chooses_for_a_gpu_makes_no_other_trial(trial):
    assert trial(train__fit="auto").trial_id == trial().trial_id


def test_trials_that_differ_in_no_memory_are_predicted_once(trial, monkeypatch):
    asked = []
    monkeypatch.setattr(sizes, "_size", lambda target, spec: asked.append(spec) or Size())
    rates = [trial(method__lr=rate, seed=seed) for rate in (0.01, 0.02) for seed in (1, 2)]
    others = [trial(method__rank=8), trial(train__micro_batch_size=2)]
    predicted_by_id = sizes.predicted_sizes([*rates, *others], SERVER)
    assert asked == [rates[0], *others]
    assert set(predicted_by_id) == {spec.trial_id for spec in (*rates, *others)}
