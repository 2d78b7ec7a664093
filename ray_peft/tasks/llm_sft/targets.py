"""The layers of a model that a trial's method reaches, from the config alone: no weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_peft.errors import ModelError, SpecError, first_line
from ray_peft.spec import LlmTrialSpec, ModelSpec
from ray_peft.tasks.llm_sft.grown import grown_config, mark_on_shapes
from ray_peft.tasks.llm_sft.model import load_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

LITTLE = 0.5
"""If less than this share of a base is quantised, the plan says what is not."""

_built: dict[str, PreTrainedModel] = {}
_MOST_BUILT = 4


def check(spec: LlmTrialSpec) -> list[str]:
    """Find every layer that a trial's method names in its model; for an ensemble, those of each member.

    Returns:
        What a reader must know: layers without an adapter, the share that is projected, and what is not in 4 bits.

    Raises:
        ModelError: the model cannot be built from its config, or a target matches nothing that an adapter can train.
        SpecError: nothing would be projected, or in 4 bits.
    """
    notes: list[str] = []
    members = spec.members()
    for place, trial in enumerate(members or [spec]):
        parts = trial.method.parts()
        if not parts and trial.quantization is None:
            continue
        model, of = on_meta(trial.model), trial.model.name
        within = f"method.members.{place}." if members else ""
        for key, stage in parts:
            notes += stage.check(model, of=of, key=within + key)
        notes += _quantised(trial, model, of)
    return list(dict.fromkeys(notes))


def on_meta(model: ModelSpec) -> PreTrainedModel:
    """The model's architecture without weights; it is shared, so leave it as it is.

    Raises:
        ModelError: it cannot be built from its config.
    """
    config = grown_config(model, load_config(model))
    key = f"{model.name} {model.revision} {len(model.new_tokens)} {config.to_json_string()}"
    if key not in _built:
        while len(_built) >= _MOST_BUILT:
            _built.pop(next(iter(_built)))
        _built[key] = _build(model, config)
    return _built[key]


def _build(model: ModelSpec, config: PretrainedConfig) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            built: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=model.trust_remote_code
            )
    except Exception as error:  # any class of transformers, or remote code, may raise anything
        raise ModelError(
            f"model.name: {model.name}: no causal language model can be built from its config: {first_line(error)}"
        ) from None
    mark_on_shapes(built, model)
    return built


def quantised_layers(model: PreTrainedModel) -> list[str]:
    """Names of the layers that transformers quantises: plain nn.Linear and GPT-2's Conv1D, but not the output.

    Subclasses of nn.Linear, such as Falcon's, and fused experts stay as they are (transformers 5.23,
    integrations/bitsandbytes.py).
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    fp32: Any = getattr(model, "_keep_in_fp32_modules", None) or []
    untouched = [*get_keys_to_not_convert(model), *fp32]
    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, untouched)
    ]


def _quantised(trial: LlmTrialSpec, model: PreTrainedModel, of: str) -> list[str]:
    """A note if only a small share of a quantised base is quantised.

    Raises:
        SpecError: nothing of it would be.
    """
    from ray_peft.reach.coverage import block_weights, in_words
    from ray_peft.reach.targets import numbers

    quantization = trial.quantization
    if quantization is None:
        return []
    bits = quantization.bits
    names = set(quantised_layers(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(numbers(model.get_submodule(name)) for name in names) / total
    if not names:
        raise SpecError(
            f"method {trial.method.name}: nothing of {of} would be in {bits} bits: bitsandbytes stores plain linear "
            f"layers, and those of this architecture are {_kinds(model)}; use method lora, with model.quantization: "
            "null"
        )
    if share >= LITTLE:
        return []
    blocks = {name: size for name, size in block_weights(model).items() if name not in names}
    remaining = {name: size for name, size in blocks.items() if size / total >= 0.01}
    others = 1 - share - sum(remaining.values()) / total
    parts = ([in_words(remaining, total)] if remaining else []) + [f"embeddings, norms and the like ({others:.0%})"]
    return [
        f"{trial.method.name}: {share:.0%} of the weights of {of} are in {bits} bits; the others stay in "
        f"{trial.model.dtype}: {', '.join(parts)}"
    ]


def _kinds(model: nn.Module) -> str:
    from ray_peft.reach.targets import in_blocks, linear

    layers = linear(model)
    kinds = {type(layers[name]).__name__ for name in in_blocks(layers)}
    return ", ".join(sorted(kinds)) or "of another kind"
