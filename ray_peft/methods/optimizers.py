"""AdamW in the storage formats that adapters and full weights share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from torch.optim import Optimizer

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]


def adamw(
    parameters: Sequence[nn.Parameter],
    name: OptimizerName,
    *,
    lr: float,
    betas: tuple[float, float],
    decay: float,
    stochastic: bool = False,
) -> Optimizer:
    """AdamW over `parameters`; biases and norms (one axis) are not decayed.

    Args:
        parameters: what to train.
        name: the storage of the moments.
        lr: learning rate.
        betas: decay rates of the moments.
        decay: decoupled weight decay.
        stochastic: round what is stored in bfloat16 stochastically; only with plain `adamw`.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101; 8-bit moments: Dettmers et al. 2022, arXiv:2110.02861.
    """
    return adamw_over(decayed(parameters, decay), name, lr=lr, betas=betas, stochastic=stochastic)


def decayed(parameters: Sequence[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Groups of parameters for an optimizer; biases and norms (one axis) are not decayed."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw_over(
    groups: list[dict[str, Any]],
    name: OptimizerName,
    *,
    lr: float,
    betas: tuple[float, float],
    stochastic: bool = False,
) -> Optimizer:
    """As `adamw`, over groups that may have rates of their own."""
    import torch

    if stochastic:
        from ray_peft.methods.stochastic import StochasticAdamW

        return StochasticAdamW(groups, lr=lr, betas=betas)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    import bitsandbytes

    kinds = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,  # type: ignore[attr-defined]  # not in __all__
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,  # type: ignore[attr-defined]
        "paged_adamw_32bit": bitsandbytes.optim.PagedAdamW32bit,  # type: ignore[attr-defined]
    }
    optimizer: Optimizer = kinds[name](groups, lr=lr, betas=betas)
    return optimizer


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of `model` that take gradients, in definition order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def keeps_gradient(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether the optimizer itself keeps the gradient of `parameter`, elsewhere than in `parameter.grad`."""
    return hasattr(optimizer, "holds_gradient") and bool(optimizer.holds_gradient(parameter))
