"""SHiRA: a trained part of each weight itself, chosen at random (Bhardwaj et al. 2024, arXiv:2406.13175)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from ray_peft.methods.adapter import LayerAdapter, on_shapes

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn


class SHiRA(LayerAdapter):
    """y = (W + S) x, with S sparse: of high rank, and quick to add to a base and to take away."""

    name: Literal["shira"] = "shira"
    kind: ClassVar[str] = "SHIRA"
    rank: int = Field(default=16, ge=1)
    """S has as many numbers as LoRA of this rank."""
    mask_seed: int = Field(default=0, ge=0)
    """Draws which numbers of a weight are trained; apart from the trial's seed, since the adapter is found by it."""
    lr: float = Field(default=3.0e-4, gt=0)

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Rank and the seed of its places."""
        return {"r": self.rank, "random_seed": self.mask_seed}

    def peft_config(self, model: nn.Module, *, of: str = "the model", key: str = "method") -> PeftConfig:
        """As that of every adapter; on shapes no places are drawn."""
        config: Any = super().peft_config(model, of=of, key=key)
        if on_shapes(model):
            config.mask_fn = lambda *_, **__: None
        checked: PeftConfig = config
        return checked

    def select(self, adapted: nn.Module) -> None:
        """On shapes, which have no sparse tensors, the trained numbers stand for all of a weight."""
        if on_shapes(adapted):
            for layer in adapted.modules():
                if hasattr(layer, "shira_weight"):
                    cast(Any, layer).get_delta_weight = partial(_delta_on_shapes, layer)


def _delta_on_shapes(layer: Any, adapter: str) -> Tensor:
    spread: Tensor = layer.shira_weight[adapter][0].expand(layer.out_features, layer.in_features)
    return spread
