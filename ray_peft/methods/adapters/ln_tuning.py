"""LN-tuning: the norms of a model alone (Zhao et al. 2023, arXiv:2312.11420)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.adapter import LayerAdapter
from ray_peft.methods.base import TargetNames
from ray_peft.reach.norms import norms
from ray_peft.reach.targets import Targets

if TYPE_CHECKING:
    from torch import nn


class LNTuning(LayerAdapter):
    """Train copies of the weights of norms, the smallest adapter of all."""

    name: Literal["ln_tuning"] = "ln_tuning"
    kind: ClassVar[str] = "LN_TUNING"
    targets: TargetNames = Field(default=("all-norms",), min_length=1)
    """Norms by the end of their names or a regular expression; `all-norms` are those of the whole model."""
    lr: float = Field(default=1.0e-3, gt=0)

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """It has none."""
        return {}

    def placed(self, model: nn.Module, *, of: str = "the model", key: str = "method") -> Targets:
        """The norms that are trained."""
        names = norms(self.targets, model, of=of, key=f"{key}.targets")
        return Targets(names, layers=names)
