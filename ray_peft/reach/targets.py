"""Which layers of a model `targets` name: by the end of their names, by a pattern, or by the architecture."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_peft.errors import ModelError
from ray_peft.foundation.lists import some
from ray_peft.reach.shared_weights import output_layer, tied_layers

if TYPE_CHECKING:
    from torch import Tensor, nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of a Llama- or Gemma-style block; as `targets` they mean those of any other architecture, too."""

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the output's."""

MOST_NAMES = 24
"""Names of layers that an error lists."""

_PATTERN = re.compile(r"[*+?()\[\]{}|^$\\]")
_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_READ_BY_KERNELS = {"out_proj", "conv1d"}
"""Layers of `_MAMBA` that PEFT 0.21 refuses (tuners_utils.py): their kernels read the weights and pass the layer by."""

_ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Parts of names that choose experts: they are small, and an adapter on them changes who answers, not what."""


@dataclass(frozen=True)
class Targets:
    """What gets an adapter, as PEFT takes it."""

    modules: tuple[str, ...]
    """Name endings, or whole names."""
    parameters: tuple[str, ...] = ()
    """Endings of the names of fused experts, which are parameters and no layers."""
    layers: tuple[str, ...] = ()
    """Whole names of all layers that are meant."""
    experts: tuple[str, ...] = ()
    """Whole names of all fused experts that are meant."""


def check_words(targets: Iterable[str]) -> None:
    """Refuse targets that no model can have.

    Raises:
        ValueError: an empty name, or a regular expression that does not compile.
    """
    for target in targets:
        if not target.strip():
            raise ValueError("an empty name would match every layer; name layers, or all-linear")
        if is_pattern(target):
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"{target!r} is no regular expression: {error}") from None


def is_pattern(target: str) -> bool:
    """True for a regular expression; a plain name holds letters, digits, `_`, `-` and dots alone."""
    return bool(_PATTERN.search(target))


def named_by(target: str, name: str) -> bool:
    """True if `target` means the layer `name`: its whole name, or its end from a dot on."""
    if is_pattern(target):
        return re.fullmatch(rf"(?:.*\.)?(?:{target})", name) is not None
    return name == target or name.endswith(f".{target}")


def resolve(targets: Sequence[str], model: nn.Module, *, of: str = "the model", key: str = "method.targets") -> Targets:
    """The layers that `targets` mean in `model`.

    The default targets are the projections of a Llama-like block. A model that lacks one of them gets adapters beside
    all linear layers of its blocks, under the names of its architecture. Fused experts count as layers.

    Args:
        targets: name endings, regular expressions that match a whole name or its end, or `all-linear`.
        model: plain or in 4 bits; on any device, meta too.
        of: the model as an error names it.
        key: the setting as an error names it.

    Raises:
        ModelError: a target matches nothing, or something that cannot carry an adapter.
    """
    layers, experts = adaptable(model), fused_experts(model)
    if tuple(targets) == PROJECTIONS:
        return _by_architecture(model, layers, experts)
    names = [name for name, _ in model.named_modules() if name]
    chosen: dict[str, None] = {}
    parameters: dict[str, None] = {}
    plain = True
    for target in targets:
        if target.lower() == ALL_LINEAR:
            chosen |= dict.fromkeys(_all_linear(model, layers))
            parameters |= dict.fromkeys(experts)
            plain = False
            continue
        matched = [name for name in names if named_by(target, name)]
        usable = [name for name in matched if name in layers]
        inside = [name for name in experts if named_by(target, name)]
        if not usable and not inside:
            raise ModelError(f"{key}: {_why_unusable(target, matched, model, of)}; {_available_names(target, model)}")
        plain = plain and not is_pattern(target) and len(usable) == len(matched) and not inside
        chosen |= dict.fromkeys(usable)
        parameters |= dict.fromkeys(inside)
    _refuse_taken_for_experts(model, chosen, key, experts)
    modules = tuple(targets) if plain else tuple(chosen)
    return Targets(modules, _endings(parameters, experts), tuple(chosen), tuple(parameters))


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` beside which PEFT puts an adapter, by name."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    unfit = _READ_BY_KERNELS if getattr(getattr(model, "config", None), "model_type", None) in _MAMBA else set()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and getattr(module, "groups", 1) == 1 and name.rpartition(".")[2] not in unfit
    }


def linear(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of `model` by name; GPT-2's are called Conv1D."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def all_turned(model: nn.Module, names: Iterable[str]) -> bool:
    """True if the weights of all these layers lie as (in, out), as those of GPT-2's Conv1D do; PEFT asks for it."""
    from transformers.pytorch_utils import Conv1D

    kinds = {type(model.get_submodule(name)) for name in names}
    return kinds == {Conv1D}


def fused_experts(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all experts of a layer in one parameter (expert, out, in), by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "expert" in name.rpartition(".")[0]
    }


def in_blocks(names: Iterable[str]) -> list[str]:
    """Of the names of layers, those in one of the model's repeated blocks, without the routers of experts."""
    chosen = []
    for name in names:
        parts = name.split(".")
        if any(part.isdigit() for part in parts) and not _ROUTERS.intersection(parts):
            chosen.append(name)
    return chosen


def endings(names: Iterable[str]) -> list[str]:
    """The distinct last parts of names, in order; `to_out.0` keeps the part before its number."""
    short: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        short[".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]] = None
    return list(short)


def smaller_side(weights: Any) -> int:
    """Of a layer or of fused experts: the highest rank that an update of one of its matrices has."""
    if hasattr(weights, "in_features"):  # in 4 bits the weight itself has no shape
        return int(min(weights.in_features, weights.out_features))
    if hasattr(weights, "weight"):
        return int(min(weights.weight.shape[0], weights.weight[0].numel()))
    return int(min(weights.shape[-2:]))


def numbers(layer: Any) -> int:
    """How many numbers a layer's weight holds, in 4 bits too."""
    if hasattr(layer, "in_features"):
        return int(layer.in_features * layer.out_features)
    return int(layer.weight.numel())


def _by_architecture(model: nn.Module, layers: dict[str, nn.Module], experts: dict[str, Tensor]) -> Targets:
    parameters = _endings(experts, experts)
    inside = tuple(experts)
    llama_like = {target: [name for name in layers if named_by(target, name)] for target in PROJECTIONS}
    if all(llama_like.values()) and not any(taken_for_experts(model, target) for target in PROJECTIONS):
        named = [name for names in llama_like.values() for name in names]
        return Targets(PROJECTIONS, parameters, tuple(named), inside)
    usable = _all_linear(model, layers)
    blocks = in_blocks(usable) or ([] if experts else usable)
    short = endings(blocks)
    everywhere = [name for name in layers if any(named_by(ending, name) for ending in short)]
    return Targets(tuple(short if len(everywhere) == len(blocks) else blocks), parameters, tuple(blocks), inside)


def _all_linear(model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    plain, head = linear(model), output_layer(model)
    chosen = [name for name, module in layers.items() if name in plain and module is not head]
    mistaken = {ending for ending in endings(chosen) if taken_for_experts(model, ending)}
    return [name for name in chosen if name.rpartition(".")[2] not in mistaken]


def taken_for_experts(model: nn.Module, name: str) -> bool:
    """True if PEFT would take a layer's name for the former name of fused experts, and leave the layer alone.

    PEFT 0.21 rewrites targets of architectures whose experts transformers 5 has fused
    (peft/utils/transformers_weight_conversion.py): `gate_proj` of an OLMoE becomes its experts' `gate_up_proj`.
    """
    if not hasattr(model, "config") or not fused_experts(model):  # nor is PEFT imported then, which takes seconds
        return False
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of two names that were fused into one
        return True
    return name not in (config.target_modules or ())


def _refuse_taken_for_experts(model: nn.Module, chosen: Iterable[str], key: str, experts: Iterable[str]) -> None:
    mistaken = [name for name in endings(chosen) if experts and taken_for_experts(model, name)]
    if mistaken:
        raise ModelError(
            f"{key}: PEFT takes {', '.join(mistaken)} of this architecture for its fused experts; name "
            f"{', '.join(_endings(experts, experts))} to train those, and leave {', '.join(mistaken)} out"
        )


def _endings(names: Iterable[str], experts: Iterable[str]) -> tuple[str, ...]:
    """Short names of fused experts: `experts.down_proj`; whole names where only some of the layers are meant."""
    names, experts = list(names), list(experts)
    short = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
    everywhere = [name for name in experts if any(named_by(ending, name) for ending in short)]
    return tuple(short if len(everywhere) == len(names) else names)


def _why_unusable(target: str, matched: list[str], model: nn.Module, of: str) -> str:
    if not matched:
        return f"{target} is no layer of {of}"
    module = model.get_submodule(matched[0])
    kind = type(module).__name__
    if any(True for _ in module.children()):
        return f"{target} is a {kind} of {of}, which holds layers and is none"
    return f"{target} is a {kind} of {of}, beside which no adapter can be put"


def _available_names(target: str, model: nn.Module) -> str:
    head, tied, experts = output_layer(model), tied_layers(model), fused_experts(model)
    usable = [name for name, module in adaptable(model).items() if module is not head and name not in tied]
    available = [*endings(usable), *_endings(experts, experts)]
    lower = {name.lower(): name for name in reversed(available)}
    near = [lower[name] for name in difflib.get_close_matches(target.strip().lower(), lower, n=1)]
    names = [name.strip() for name in target.split(",")]
    near = [f"[{', '.join(names)}]"] if len(names) > 1 and set(names) <= set(available) else near
    suggestion = f"did you mean {near[0]}? " if near else ""
    return f"{suggestion}the layers that can have one end in {some(available, MOST_NAMES)}"
