"""Prompt tuning: trained embeddings of tokens before every row (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.adapter import Adapter, on_shapes

if TYPE_CHECKING:
    from torch import nn


class PromptTuning(Adapter):
    """Virtual tokens at the input alone, which start as tokens of the vocabulary."""

    name: Literal["prompt_tuning"] = "prompt_tuning"
    kind: ClassVar[str] = "PROMPT_TUNING"
    virtual_tokens: int = Field(default=20, ge=1)
    """Tokens before each row; every pass is longer by as many."""
    lr: float = Field(default=1.0e-2, gt=0)

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Tokens, and where they start."""
        start = "RANDOM" if on_shapes(model) else "SAMPLE_VOCAB"
        return {"num_virtual_tokens": self.virtual_tokens, "prompt_tuning_init": start}
