"""What is predicted of trials that train together: the memory of all, and what they save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

from ray_peft.methods.lora import LowRankAdapter
from ray_peft.spec import LlmTrialSpec
from ray_peft.spec.keys import CHECKPOINTING, MICRO_BATCH
from ray_peft.tasks.base import PackForecast
from ray_peft.tasks.llm_sft import bench
from ray_peft.tasks.llm_sft.lanes import PASS
from ray_peft.vram.cards import Gpu
from ray_peft.vram.predict import Prediction, segments

if TYPE_CHECKING:
    from ray_peft.tasks.llm_sft.data import PreparedData

_MEASURED_LAYERS, _MEASURED_WEIGHTS = 26, 1.06e9
"""Of Gemma-3-1B, whose recorded passes `lanes.PASS` was measured on; weights as `overhead` counts them."""
_OWN = ("adapters", "gradients", "optimizer")
"""What each trial has for itself, among the components of a prediction."""


def of_pack(specs: Sequence[LlmTrialSpec], rows: Sequence[PreparedData], gpu: Gpu) -> PackForecast:
    """The peak of all trials on one base, and how many times as long their steps take one after the other.

    Args:
        specs: of one base, as they run.
        rows: of each.
        gpu: decides the workspace of matrix products and the slack of the allocator.
    """
    from ray_peft.tasks.llm_sft.model import load_config

    config: Any = load_config(specs[0].model).get_text_config()
    means = [fmean(map(len, data.train["input_ids"])) for data in rows]
    steps = [mean * spec.train.batch_size for mean, spec in zip(means, specs, strict=True)]
    return PackForecast(memory(specs, rows, gpu), gain(steps, [spec.accumulation for spec in specs], overhead(config)))


def memory(specs: Sequence[LlmTrialSpec], rows: Sequence[PreparedData], gpu: Gpu) -> Prediction:
    """The peak of a pass of all trials' rows; each has an adapter of the largest rank, its gradients and moments."""
    longest = max(range(len(specs)), key=lambda place: max(map(len, rows[place].train["input_ids"])))
    count = sum(spec.train.micro_batch_size for spec in specs)
    methods = [cast(LowRankAdapter, spec.method) for spec in specs]
    whole = specs[longest].changed(
        {
            "method.rank": max(method.rank for method in methods),
            "method.dropout": max(method.dropout for method in methods),
            "train.batch_size": count,
            MICRO_BATCH: count,
            CHECKPOINTING: any(spec.train.gradient_checkpointing for spec in specs),
        }
    )
    single = bench.predictor(whole, rows[longest])(whole, gpu)
    own = {kind: single.components.get(kind, 0) * (len(specs) - 1) for kind in _OWN}
    more = sum(own.values())
    return replace(
        single,
        components={kind: size + own.get(kind, 0) for kind, size in single.components.items()},
        peak_allocated=single.peak_allocated + more,
        peak_reserved=single.peak_reserved + segments(more, gpu.slack),
        evaluation=None if single.evaluation is None else single.evaluation + more,
    )


def gain(step_tokens: Sequence[float], passes: Sequence[int], overhead_tokens: float) -> float:
    """How many times as long trials take one after the other as in passes that they share.

    A pass takes a time of its own and one for each token.

    Args:
        step_tokens: of an optimizer step of each trial.
        passes: of a step of each trial.
        overhead_tokens: what a pass takes by itself, in the time of so many tokens.
    """
    total = sum(step_tokens)
    apart = total + overhead_tokens * sum(passes)
    return apart / (total + overhead_tokens * max(passes))


def overhead(config: Any) -> float:
    """What a recorded pass takes by itself, in the time of so many tokens.

    The first grows with the layers, a token's time with the weights; scaled from the one model that was measured.
    """
    layers, width = int(config.num_hidden_layers), int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    weights = layers * (4 * width**2 + 3 * width * inner) + int(config.vocab_size) * width
    return PASS * (layers / _MEASURED_LAYERS) * (_MEASURED_WEIGHTS / weights)
