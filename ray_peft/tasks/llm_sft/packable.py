"""Which trials may train together on one base: a rule on their settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray_peft.errors import SpecError
from ray_peft.methods.lora import LoRA
from ray_peft.methods.qlora import QLoRA
from ray_peft.spec import LlmTrialSpec


def why_alone(spec: LlmTrialSpec) -> str | None:
    """Why a trial can share its base with none; None if it can.

    LoRA and QLoRA can, whatever their rank, alpha, targets, dropout, learning rate, schedule, steps, warm-up, weight
    decay, clipping, seed, rows and batch size.
    """
    method = spec.method
    if not isinstance(method, LoRA | QLoRA):
        return f"method {method.name} has no adapter that lies beside those of others; lora and qlora have"
    if spec.quantization is not None and spec.quantization.bits == 8:
        return "a base in int8 looks for outliers in all rows of a pass; use nf4"
    if spec.model.new_tokens:
        return "model.new_tokens are trained by one trial at a time; leave them out, or use pack: false"
    if method.rank_pattern or method.alpha_pattern or method.modules_to_save:
        return "method.rank_pattern, alpha_pattern and modules_to_save are for a trial alone; leave them out"
    if method.optim != "adamw":
        return f"method.optim {method.optim} keeps its moments in blocks, which cross matrices; use optim: adamw"
    if spec.train.objective != "sft":
        return f"train.objective {spec.train.objective} trains one trial at a time; use pack: false"
    if spec.train.engine != "own":
        return f"train.engine {spec.train.engine} trains one trial at a time; use engine: own"
    if spec.train.warm_start is not None:
        return "a warm start is for a trial alone"
    if spec.resources.num_workers > 1:
        return f"resources.num_workers is {spec.resources.num_workers}; use num_workers: 1"
    return None


def shared_settings(spec: LlmTrialSpec) -> dict[str, Any]:
    """By key, the settings in which trials of one base agree: what is loaded, and how passes compute."""
    quantization = spec.quantization
    return {
        **{f"model.{name}": value for name, value in spec.model.plain().items() if name != "quantization"},
        "the base's quantization": quantization.plain() if quantization is not None else None,
        "method.adapter_dtype": getattr(spec.method, "adapter_dtype", None),
        "train.precision": spec.train.precision,
        "train.cuda_graphs": spec.train.cuda_graphs,
    }


def packs(specs: Sequence[LlmTrialSpec]) -> list[list[LlmTrialSpec]]:
    """The trials by the base that they may share, in their order; one that can share with none is by itself."""
    groups: list[list[LlmTrialSpec]] = []
    for spec in specs:
        own = None if why_alone(spec) else shared_settings(spec)
        group = next((group for group in groups if own is not None and _base_of(group) == own), None)
        if group is None:
            groups.append([spec])
        else:
            group.append(spec)
    return groups


def fits_place(spec: LlmTrialSpec, others: Sequence[LlmTrialSpec]) -> bool:
    """Whether the adapter of a trial fits a place that was made for others of the same base."""
    method, theirs = spec.method, [other.method for other in others if isinstance(other.method, LoRA | QLoRA)]
    return (
        isinstance(method, LoRA | QLoRA)
        and method.rank <= max(other.rank for other in theirs)
        and method.targets in [other.targets for other in theirs]
        and (not method.dropout or any(other.dropout for other in theirs))
        and spec.train.micro_batch_size <= max(other.train.micro_batch_size for other in others)
    )


def check(specs: Sequence[LlmTrialSpec]) -> None:
    """Refuse trials that cannot train together.

    Raises:
        SpecError: one can share its base with none, or two differ in what they share.
    """
    for spec in specs:
        reason = why_alone(spec)
        if reason is not None:
            raise SpecError(f"trial {spec.trial_id} cannot train together with others: {reason}")
    first = shared_settings(specs[0])
    for spec in specs[1:]:
        for key, value in shared_settings(spec).items():
            if value != first[key]:
                raise SpecError(
                    f"trials {specs[0].trial_id} and {spec.trial_id} cannot train together: {key} is {first[key]} and "
                    f"{value}; give them the same, or train them apart"
                )


def _base_of(group: Sequence[LlmTrialSpec]) -> dict[str, Any] | None:
    return None if why_alone(group[0]) else shared_settings(group[0])
