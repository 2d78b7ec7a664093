"""Full fine-tuning: every weight of the base is trained with AdamW."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ray_peft.methods.base import Task
from ray_peft.methods.full_weights import AdamWWeights


class FullFineTuning(AdamWWeights):
    """Train every weight."""

    name: Literal["full"] = "full"
    tasks: ClassVar[frozenset[Task]] = frozenset({"llm_sft", "text_to_image"})
    lr: float = Field(default=2.0e-5, gt=0)

    def why_not_sharded(self) -> str | None:
        """AdamW updates each number by itself, so a part is enough; the kernels of bitsandbytes take whole tensors."""
        return None if self.optim == "adamw" else f"optim: {self.optim} takes whole tensors"
