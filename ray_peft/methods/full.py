"""Full fine-tuning: every weight of the base is trained with AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.base import Task
from ray_peft.methods.full_weights import FullWeights
from ray_peft.methods.optimizers import OptimizerName, adamw, trainable

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class FullFineTuning(FullWeights):
    """Train every weight."""

    name: Literal["full"] = "full"
    tasks: ClassVar[frozenset[Task]] = frozenset({"llm_sft", "text_to_image"})
    lr: float = Field(default=2.0e-5, gt=0)
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
        """AdamW over all parameters."""
        stochastic = self.weights == "bfloat16_stochastic"
        return adamw(
            trainable(model),
            self.optim,
            lr=self.lr,
            betas=self.betas,
            decay=self.weight_decay,
            stochastic=stochastic,
        )
