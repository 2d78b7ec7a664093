"""(IA)3: trained factors of keys, values and the input of down projections (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from ray_peft.methods.adapter import LayerAdapter
from ray_peft.methods.base import TargetNames
from ray_peft.reach.targets import Targets, linear, named_by

if TYPE_CHECKING:
    from torch import nn

_OF_LLAMA = ("k_proj", "v_proj", "down_proj")
_FEEDFORWARD_OF_LLAMA = ("down_proj",)


class IA3(LayerAdapter):
    """Multiply what some layers give, or what feed-forward layers take, by a trained vector each."""

    name: Literal["ia3"] = "ia3"
    kind: ClassVar[str] = "IA3"
    targets: TargetNames = Field(default=_OF_LLAMA, min_length=1)
    """The layers that get a factor. The default are names of Llama-like models; of another architecture that PEFT knows
    they mean the layers that PEFT names for it, and `feedforward` does, too."""
    feedforward: TargetNames = _FEEDFORWARD_OF_LLAMA
    """Those of them whose input is multiplied, and not their output; each is one of `targets`."""
    lr: float = Field(default=3.0e-3, gt=0)

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Which factors lie before a layer."""
        own = self._named_in(model)
        return {"target_modules": list(own.targets), "feedforward_modules": list(own.feedforward)}

    def placed(self, model: nn.Module, *, of: str = "the model", key: str = "method") -> Targets:
        """As that of every adapter, with the names of the model's architecture."""
        return super(IA3, self._named_in(model)).placed(model, of=of, key=key)

    def _named_in(self, model: nn.Module) -> Self:
        """With PEFT's names for an architecture that lacks the default ones; other settings are left alone."""
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

        kind = getattr(getattr(model, "config", None), "model_type", None)
        layers = linear(model)
        whole = all(any(named_by(target, name) for name in layers) for target in self.targets)
        if self.targets != _OF_LLAMA or whole or kind not in TARGETS:
            return self
        written = self.feedforward != _FEEDFORWARD_OF_LLAMA
        feedforward = self.feedforward if written else tuple(FEEDFORWARD[kind])
        return self.model_copy(update={"targets": tuple(TARGETS[kind]), "feedforward": feedforward})
