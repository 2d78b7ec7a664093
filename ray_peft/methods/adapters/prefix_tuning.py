"""Prefix tuning: trained keys and values before those of every layer (Li and Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.adapter import Adapter

if TYPE_CHECKING:
    from torch import nn


class PrefixTuning(Adapter):
    """Virtual tokens in every layer's attention."""

    name: Literal["prefix_tuning"] = "prefix_tuning"
    kind: ClassVar[str] = "PREFIX_TUNING"
    virtual_tokens: int = Field(default=20, ge=1)
    """Tokens before each row; attention sees as many more."""
    lr: float = Field(default=1.0e-2, gt=0)

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Tokens; they are trained as they are, without a network that makes them."""
        return {"num_virtual_tokens": self.virtual_tokens, "prefix_projection": False}
