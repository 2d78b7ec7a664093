"""Log-probabilities of chosen tokens through a model's output layer, in tiles of the vocabulary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import trl.trainer.utils
from torch import Tensor
from torch.autograd import Function

from ray_peft.methods.vocabulary import PIECE, add_rows, is_added_in_place

trl_utils: Any = trl.trainer.utils
"""TRL's own head reads its kernel from this module, too; memory predictions replace the kernel there."""


def log_probs(head: Any, hidden: Tensor, targets: Tensor, softcap: float | None, scale: float) -> Tensor:
    """Natural logarithms of the probabilities of `targets` (token,), float32.

    Args:
        head: the output layer. If its gradient is accumulated in place, the backward pass of this function does so.
        hidden: (token, column), the input of the layer.
        targets: (token,) int64.
        softcap: limit of the logits; None without one.
        scale: factor on the logits.
    """
    bias = getattr(head, "bias", None)
    if is_added_in_place(head.weight):
        log_probs: Tensor = _InPlace.apply(hidden, head.weight, bias, targets, softcap, scale)  # type: ignore[no-untyped-call]
        return log_probs
    chosen: Tensor = trl_utils._ChunkedLogProbFunction.apply(  # noqa: SLF001
        hidden,
        head.weight,
        bias,
        targets,
        1.0,
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE,
        softcap,
        scale,
        ("log_probs",),  # noqa: SLF001
    )[0]
    return chosen


def head_settings(config: Any) -> tuple[float | None, float]:
    """The soft cap of the logits and the factor on them, read as in TRL 1.16 (trainer/utils.py)."""
    scale = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(config, name, None)) is not None
        ),
        None,
    )
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return getattr(config, "final_logit_softcapping", None), 1.0 if scale is None else float(scale)


def adds_in_place(model: Any) -> bool:
    """Whether the gradient of a model's output layer must be accumulated in place; its own forward pass does not."""
    head = model.get_output_embeddings()
    return head is not None and is_added_in_place(head.weight)


class _InPlace(Function):
    """`log_probs` whose backward pass adds to the weight's gradient piece by piece, with TRL's kernel for each."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: Any, scale: float
    ) -> Tensor:
        # The tiles of logits are as wide as the pieces of the gradient.
        ctx.kernel, ctx.weight = trl_utils._ChunkedLogProbFunction, weight  # noqa: SLF001
        chosen: Tensor = ctx.kernel.forward(
            ctx, hidden, weight, bias, targets, 1.0, PIECE, softcap, scale, ("log_probs",)
        )[0]
        return chosen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, _, bias, targets, log_z, _ = ctx.saved_tensors
        # The kernel returns gradients in the dtype of its inputs, and hidden states need a sum in float32.
        exact, weight = hidden.float(), ctx.weight
        total = torch.zeros_like(exact)
        biases = []
        for begin in range(0, len(weight), PIECE):
            end = min(begin + PIECE, len(weight))
            piece = SimpleNamespace(
                saved_tensors=(
                    exact, weight[begin:end], None if bias is None else bias[begin:end], targets - begin, log_z, log_z
                ),
                needs_input_grad=(True, True, bias is not None),
                compute_dtype=ctx.compute_dtype, chunk_size=PIECE, kernel_args=ctx.kernel_args,
            )  # fmt: skip
            states, rows, of_bias = ctx.kernel.backward(piece, *grads, None)[:3]
            total += states
            add_rows(weight, begin, rows)
            biases.append(of_bias)
        return total.to(hidden.dtype), None, None if bias is None else torch.cat(biases), None, None, None
