"""Trials alone and the same trials on one base, to be compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import tiny
import torch

from ray_peft.engine.member import Job
from ray_peft.errors import TrialFailed
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.tasks.llm_sft.bench import LlmBench
from ray_peft.tasks.llm_sft.pack import Pack
from ray_peft.tasks.llm_sft.scores import Outputs


@dataclass
class Told:
    """What a trial left."""

    log: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)
    loss: float = math.nan
    error: Exception | None = None
    tokens: int = 0
    seconds: float = 0.0
    passes: str = ""
    outputs: Outputs | None = None
    """On its held-out rows; in a pack, computed together with others."""


def adapter_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def kept(told, report):
    def keep(metrics, step):
        report(metrics, step)
        told.log.append((step, dict(metrics)))

    return keep


def job_of(bench, folder, told, evaluate, report):
    spec = bench.spec
    ((stage, steps),) = spec.method.stages(bench.total_steps())
    return Job(spec, stage, steps, 0, folder, bench.device, kept(told, report), evaluate)


def alone(spec, folder, device="cpu", report=lambda metrics, step: None, outputs=False):
    """The trial by itself, as `ray-peft run` trains it."""
    bench, told = TASKS["llm_sft"].load(spec, device), Told()
    ((stage, steps),) = spec.method.stages(bench.total_steps())
    bench.attach(stage)
    try:
        trained = bench.train(stage, steps, 0, folder, kept(told, report))
    except TrialFailed as error:
        told.error = error
        return told
    told.tokens, told.seconds = trained.tokens, trained.seconds
    told.adapter, told.loss = adapter_of(bench.model), bench.eval_loss()
    told.outputs = bench.compute_outputs() if outputs else None
    return told


def together(specs, folder, places, plant=None, device="cpu", report=lambda metrics, step: None):
    """The trials in one pack; the first one's metrics go to `report`, too."""
    base = TASKS["llm_sft"].load(specs[0], device)
    others = [TASKS["llm_sft"].load(spec, "cpu") for spec in specs[1:]]
    benches = [base] + [
        LlmBench(spec, device, other.tokenizer, other.data, base.model)
        for spec, other in zip(specs[1:], others, strict=True)
    ]
    told = [Told() for _ in specs]
    by_bench = {id(bench): one for bench, one in zip(benches, told, strict=True)}

    def ended(bench, member, error):
        one = by_bench[id(bench)]
        one.error, one.tokens, one.seconds = error, member.trained.tokens, member.trained.seconds
        one.passes, one.outputs = member.trained.passes, bench.outputs
        if error is None:
            one.adapter, one.loss = adapter_of(bench.model), bench.eval_loss()

    jobs = [
        job_of(
            bench,
            folder / f"member{place}",
            one,
            lambda bench=bench: pack.evaluation(bench)(),
            report if place == 0 else lambda metrics, step: None,
        )
        for place, (bench, one) in enumerate(zip(benches, told, strict=True))
    ]
    pack = Pack(benches, jobs, places, ended)
    before = {name: value.clone() for name, value in base.model.named_parameters()}
    if plant is not None:
        plant(pack)
    pack.run()
    assert [name for name, value in base.model.named_parameters() if not torch.equal(value, before[name])] == []
    assert not any(module._forward_hooks for module in base.model.modules() if isinstance(module, torch.nn.Linear))
    return told


def check_equal(ours, theirs, close=1e-5):
    """Losses, norms, rates, adapter, held-out loss and tokens; `close` is the relative difference of a loss."""
    assert ours.error is None
    assert [step for step, _ in ours.log] == [step for step, _ in theirs.log]
    for (step, our), (_, their) in zip(ours.log, theirs.log, strict=True):
        assert our == pytest.approx(their, rel=close, abs=1e-6), step
    assert ours.adapter.keys() == theirs.adapter.keys()
    for name, value in ours.adapter.items():
        # AdamW divides the first gradient by itself, so a number whose gradient is all rounding may go either way.
        apart = ~torch.isclose(value, theirs.adapter[name], rtol=10 * close, atol=close)
        assert apart.float().mean() < 0.005, name
    assert ours.loss == pytest.approx(theirs.loss, rel=close)
    assert ours.tokens == theirs.tokens


def specs_of(model, rows, settings, **common):
    return [
        TrialSpec.from_plain(tiny.plain_spec(model, rows, {"name": "lora", **method}, **common | changes))
        for method, changes in settings
    ]


UNEQUAL = [
    ({"rank": 4, "lr": 0.01, "alpha": 8}, {"seed": 1, "train__steps": 5}),
    (
        {"rank": 8, "lr": 0.02, "alpha": 4, "weight_decay": 0.1},
        {"seed": 2, "train__steps": 3, "train__schedule": "linear"},
    ),
    (
        {"rank": 2, "lr": 0.005, "max_grad_norm": 0.01, "targets": ["q_proj", "v_proj"]},
        {"seed": 3, "train__steps": 6, "train__batch_size": 4, "train__warmup_steps": 2, "train__eval_every": 2},
    ),
    (
        {"rank": 16, "max_grad_norm": None, "betas": [0.8, 0.99], "targets": ["down_proj", "o_proj"]},
        {"train__steps": 4, "train__batch_size": 12, "train__micro_batch_size": 2, "train__loss": "all"},
    ),
]
