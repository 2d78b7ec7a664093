"""Full fine-tuning: every weight of the base is trained with AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.base import Dtype, Stage, Task
from ray_peft.methods.optimizers import OptimizerName, adamw, trainable

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class FullFineTuning(Stage):
    """Train every weight."""

    name: Literal["full"] = "full"
    tasks: ClassVar[frozenset[Task]] = frozenset({"llm_sft"})
    needs_full_weights: ClassVar[bool] = True
    lr: float = Field(default=2.0e-5, gt=0)
    weights: Literal["float32", "bfloat16"] = "float32"
    """The dtype that holds the trained weights. In bfloat16 small updates round away and much of the gain is lost."""
    optim: OptimizerName = "adamw"

    def weights_dtype(self, asked: Dtype) -> Dtype:
        """The dtype of the trained weights, whatever the model's setting."""
        return self.weights

    def attach(self, model: nn.Module) -> nn.Module:
        """Mark every parameter as trained, in the dtype asked for."""
        import torch

        return model.to(getattr(torch, self.weights)).requires_grad_(True)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW over all parameters."""
        return adamw(trainable(model), self.optim, lr=self.lr, betas=self.betas, decay=self.weight_decay)
