"""LoRA+: LoRA whose B learns faster than A (Hayou et al. 2024, arXiv:2402.12354)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.lora import LowRankAdapter
from ray_peft.methods.optimizers import adamw_over, decayed, trainable

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class LoRAPlus(LowRankAdapter):
    """LoRA with two learning rates."""

    name: Literal["lora_plus"] = "lora_plus"
    takes_experts: ClassVar[bool] = True
    ratio: float = Field(default=16.0, ge=1)
    """Learning rate of B in units of `lr`, which is that of A."""
    lr: float = Field(default=5.0e-5, gt=0)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW, with another rate for B."""
        faster = [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name]
        ids = {id(parameter) for parameter in faster}
        others = [parameter for parameter in trainable(model) if id(parameter) not in ids]
        groups = [{**group, "lr": self.lr} for group in decayed(others, self.weight_decay)]
        groups += [{**group, "lr": self.lr * self.ratio} for group in decayed(faster, self.weight_decay)]
        return adamw_over(groups, self.optim, lr=self.lr, betas=self.betas)
