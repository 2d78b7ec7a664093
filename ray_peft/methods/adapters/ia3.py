"""(IA)3: trained factors of keys, values and the input of down projections (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.adapter import LayerAdapter
from ray_peft.methods.base import TargetNames

if TYPE_CHECKING:
    from torch import nn


class IA3(LayerAdapter):
    """Multiply what some layers give, or what feed-forward layers take, by a trained vector each."""

    name: Literal["ia3"] = "ia3"
    kind: ClassVar[str] = "IA3"
    targets: TargetNames = Field(default=("k_proj", "v_proj", "down_proj"), min_length=1)
    """The layers that get a factor; names are those of Llama-like models."""
    feedforward: TargetNames = ("down_proj",)
    """Those of them whose input is multiplied, and not their output; each is one of `targets`."""
    lr: float = Field(default=3.0e-3, gt=0)

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Which factors lie before a layer."""
        return {"target_modules": list(self.targets), "feedforward_modules": list(self.feedforward)}
