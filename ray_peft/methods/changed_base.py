"""LoRA whose start is taken out of the base; what is saved is plain LoRA for the base as it was."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from ray_peft.methods.adapter import on_shapes
from ray_peft.methods.base import Quantization
from ray_peft.methods.lora import LowRankAdapter

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

INITIAL = "initial_adapter"
"""Attribute of an attached model: its A and B before training, by the names of their parameters."""


class ChangedBase(LowRankAdapter):
    """LoRA that starts from parts of W, which PEFT subtracts from the base while it attaches."""

    changes_base: ClassVar[bool] = True

    @property
    @abstractmethod
    def initial(self) -> str:
        """PEFT's name of the initialisation."""

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """LoRA's, with the initialisation; on shapes there is nothing to start from, and sizes are the same."""
        return {**super().config_fields(model), "init_lora_weights": True if on_shapes(model) else self.initial}

    def why_not_on(self, storage: Quantization) -> str | None:
        """The rest of a quantised weight would be quantised again, and the saved adapter would not fit the base."""
        return (
            f"method {self.name} cannot be trained on a base in {storage.quant_type}: what is left of a weight would "
            "be quantised anew, so that the saved adapter would belong to another base; set model.quantization: null, "
            "or use method qlora"
        )

    def attach(self, model: nn.Module) -> nn.Module:
        """Attach, and remember where A and B start: the same seed and weights start again from there."""
        adapted = super().attach(model)
        if not on_shapes(adapted):
            start = {n: p.detach().to("cpu", copy=True) for n, p in adapted.named_parameters() if "lora_" in n}
            object.__setattr__(adapted, INITIAL, start)
        return adapted


def as_plain_lora(model: Any) -> tuple[dict[str, Tensor], PeftConfig] | None:
    """Weights and config of plain LoRA on the original base that equals a trained model; None if it is that already.

    The change of a layer, B A - B0 A0, has at most twice the rank. Its two matrices come from a singular value
    decomposition and are balanced, so that rounding them is small beside the change itself; PEFT's own conversion
    (`path_initial_model_for_weight_conversion`) keeps the four matrices, which are large beside it.

    Returns:
        Weights by the names of the model's parameters, float32, on the CPU.
    """
    import torch

    initial = model.__dict__.get(INITIAL)
    if initial is None:
        return None
    state: dict[str, Tensor] = {}
    for name in (name for name in initial if "lora_A" in name):
        other = name.replace("lora_A", "lora_B")
        start = [initial[part].to(model.device).float() for part in (name, other)]
        now = [model.get_parameter(part).detach().float() for part in (name, other)]
        down, up = torch.cat([now[0], start[0]]), torch.cat([now[1], -start[1]], dim=1)
        state[name], state[other] = (part.cpu() for part in _balanced(down, up))
    config: Any = copy.deepcopy(model.peft_config[model.active_adapter])
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: 2 * alpha for name, alpha in config.alpha_pattern.items()}
    plain: PeftConfig = config
    return state, plain


def _balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with the product `up @ down`, of singular vectors times roots of singular values.

    The rank stays, where the product's is lower with zeros.
    """
    import torch

    rank = len(down)
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    u, sizes, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    roots = sizes.sqrt()
    new_up, new_down = left @ u * roots, (roots[:, None] * v) @ right.T
    missing = rank - len(roots)
    return (
        torch.cat([new_down, new_down.new_zeros(missing, new_down.shape[1])]),
        torch.cat([new_up, new_up.new_zeros(len(new_up), missing)], dim=1),
    )
