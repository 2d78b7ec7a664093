"""AdaLoRA's choice of ranks: PEFT's allocator after each optimizer step, and the loss that keeps P and Q orthogonal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

STATE = "ranks"
"""What the optimizer's state holds of it."""
_MEANS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""The allocator's running means: the importance of each number, smoothed, and its uncertainty."""


def allocate_ranks(optimizer: Optimizer, model: Any, orthogonality: float) -> None:
    """Have an optimizer choose ranks after each of its steps, and carry what that needs in its state.

    The gradient of the orthogonality loss is added where the engine clips, once a step and whatever its passes.

    Args:
        optimizer: over the adapters of `model`.
        model: PEFT's, with AdaLoRA attached.
        orthogonality: weight of that loss.
    """
    import torch

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(parameter.is_meta for parameter in parameters):
        _reserve(optimizer)
        return
    tuner, steps = model.base_model, [0]
    allocator, config = tuner.rankallocator, model.peft_config[tuner.trainable_adapter_name]

    def clip(limit: float | None) -> Tensor:
        (orthogonality * _distance(model)).backward()  # type: ignore[no-untyped-call]
        return torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)

    def after_step(*_: Any) -> None:
        steps[0] += 1
        tuner.update_and_allocate(steps[0])

    def save(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        means = {name: dict(getattr(allocator, name)) for name in _MEANS}
        return {**state, STATE: {"steps": steps[0], "pattern": config.rank_pattern, **means}}

    def load(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        ranks = state[STATE]
        steps[0], config.rank_pattern = ranks["steps"], ranks["pattern"]
        for name in _MEANS:
            setattr(allocator, name, {key: value.to(parameters[0].device) for key, value in ranks[name].items()})
        return {key: value for key, value in state.items() if key != STATE}

    optimizer.clip = clip  # type: ignore[attr-defined]  # the engine asks for it
    optimizer.register_step_post_hook(after_step)
    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)


def _distance(model: nn.Module) -> Tensor:
    """Mean over all P and Q of the Frobenius norm of their products with themselves less the identity (eq. 4)."""
    import torch

    norms = []
    for name, matrix in model.named_parameters():
        if matrix.requires_grad and ("lora_A" in name or "lora_B" in name):
            product = matrix @ matrix.T if "lora_A" in name else matrix.T @ matrix
            norms.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device)))
    return torch.stack(norms).mean()


def _reserve(optimizer: Optimizer) -> None:
    """On shapes, the memory of the running means alone."""
    import torch

    def after_step(*_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault(STATE, [torch.empty_like(parameter) for _ in _MEANS])

    optimizer.register_step_post_hook(after_step)
