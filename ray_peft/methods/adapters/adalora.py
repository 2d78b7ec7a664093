"""AdaLoRA: LoRA as P E Q, whose ranks move to where they count (Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ray_peft.methods.adapter import LayerAdapter
from ray_peft.methods.base import ENOUGH_STEPS, Stage
from ray_peft.methods.rank_allocation import allocate_ranks

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class AdaLoRA(LayerAdapter):
    """Every layer starts with `rank`; while it trains, the least important of all ranks are taken away."""

    name: Literal["adalora"] = "adalora"
    kind: ClassVar[str] = "ADALORA"
    rank: int = Field(default=12, ge=1)
    """Ranks of each layer at the start."""
    target_rank: int = Field(default=8, ge=1)
    """Ranks of a layer at the end, on average."""
    alpha: float = Field(default=32.0, gt=0)
    """Numerator of the scale."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    begin: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps before ranks are taken away."""
    end: float = Field(default=0.3, ge=0, lt=1)
    """Share of the steps after that, with the ranks that are left."""
    every: int = Field(default=1, ge=1)
    """Optimizer steps between two choices."""
    orthogonality: float = Field(default=0.1, gt=0)
    """Weight of the loss that keeps P and Q orthogonal."""
    total_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps by which ranks are chosen; None takes the trial's."""

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.begin + self.end >= 1:
            raise ValueError(f"begin ({self.begin:g}) and end ({self.end:g}) leave no steps to take ranks away")
        if self.target_rank > self.rank:
            raise ValueError(f"target_rank ({self.target_rank}) is above rank ({self.rank}), which layers start with")
        return self

    def stages(self, steps: int) -> list[tuple[Stage, int]]:
        """The stage itself, which knows how many steps there are."""
        return [(self.model_copy(update={"total_steps": self.total_steps or steps}), steps)]

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Ranks, scale and schedule."""
        total = self.total_steps or ENOUGH_STEPS
        return {
            "init_r": self.rank, "target_r": self.target_rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout,
            "tinit": int(self.begin * total), "tfinal": int(self.end * total), "total_step": total,
            "deltaT": self.every, "orth_reg_weight": self.orthogonality,
        }  # fmt: skip

    def select(self, adapted: nn.Module) -> None:
        """PEFT's counts of ranks are parameters, and not trained."""
        for name, parameter in adapted.named_parameters():
            if "ranknum" in name:
                parameter.requires_grad_(False)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW that chooses ranks after each step."""
        optimizer = super().optimizer(model)
        allocate_ranks(optimizer, model, self.orthogonality)
        return optimizer
