"""What methods that train the base share: which dtype holds the weights, and how an update is rounded into it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ray_peft.methods.base import Dtype, Quantization, Stage
from ray_peft.methods.optimizers import OptimizerName, adamw, trainable

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

TrainedWeights = Literal["bfloat16_stochastic", "float32", "bfloat16"]


class FullWeights(Stage):
    """A stage that trains every weight of the base."""

    needs_full_weights: ClassVar[bool] = True
    changes_base: ClassVar[bool] = True
    weights: TrainedWeights = "bfloat16_stochastic"
    """How trained weights and AdamW's moments are held. bfloat16_stochastic: 2 bytes a number, rounded up or down at
    random so that small updates count on average. float32: 4 bytes. bfloat16: 2 bytes, rounded to the nearest, where
    most small updates are lost; it is what `AdamW` on a bf16 model does, and here to show that."""

    @property
    def dtype(self) -> Dtype:
        """The dtype that holds the trained weights."""
        return "float32" if self.weights == "float32" else "bfloat16"

    def weights_dtype(self, dtype: Dtype) -> Dtype:
        """The dtype of the trained weights, whatever the model's setting."""
        return self.dtype

    def arithmetic(self, dtype: Dtype, four_bit_share: float | None = None, storage: Quantization | None = None) -> str:
        """How the trained weights are held and rounded."""
        return {
            "bfloat16_stochastic": "bfloat16 weights, stochastic rounding",
            "float32": "float32 weights",
            "bfloat16": "bfloat16 weights, rounded to nearest",
        }[self.weights]

    def attach(self, model: nn.Module) -> nn.Module:
        """Mark every parameter as trained, in the dtype asked for."""
        import torch

        # Not model.to(), which would round buffers such as the rotary frequencies, and those are not saved.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, self.dtype))
        return model.requires_grad_(True)


class AdamWWeights(FullWeights):
    """A stage that trains weights of the base with AdamW."""

    optim: OptimizerName = "adamw"

    def conflicts(self, *, accumulates: bool, num_workers: int) -> list[str]:
        """The kernels of bitsandbytes round to the nearest, inside."""
        if self.optim == "adamw" or self.weights != "bfloat16_stochastic":
            return []
        return [
            f"method.optim: {self.optim} rounds updates to the nearest, so it cannot hold method.weights: "
            f"{self.weights}; use optim: adamw, or weights: float32 (or bfloat16, which loses small updates)"
        ]

    def optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW over all trained parameters."""
        return adamw(
            trainable(model),
            self.optim,
            lr=self.lr,
            betas=self.betas,
            decay=self.weight_decay,
            stochastic=self.weights == "bfloat16_stochastic",
        )
