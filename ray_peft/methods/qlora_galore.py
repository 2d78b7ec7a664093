"""QLoRA, then GaLore: adapters on a 4-bit base, merged into the dequantised base, then all weights refined."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ray_peft.errors import SpecError
from ray_peft.methods.base import Dtype, Method, Quantization, Stage, Task
from ray_peft.methods.galore import GaLore
from ray_peft.methods.qlora import QLoRA


class QLoRAThenGaLore(Method):
    """Two stages in one trial; each has its own learning rate and its own schedule."""

    name: Literal["qlora_galore"] = "qlora_galore"
    tasks: ClassVar[frozenset[Task]] = frozenset({"llm_sft"})
    qlora: QLoRA = QLoRA()
    galore: GaLore = GaLore()
    switch_at: float = Field(default=2 / 3, gt=0, lt=1)
    """Share of the trial's optimizer steps that QLoRA gets."""

    def quantization(self) -> Quantization:
        """The 4-bit storage of the first stage's base."""
        return self.qlora.quantization()

    def arithmetic(self, dtype: Dtype, four_bit_share: float | None = None, storage: Quantization | None = None) -> str:
        """Of both stages."""
        return f"{self.qlora.arithmetic(dtype, four_bit_share)}; then {self.galore.arithmetic(dtype)}"

    def conflicts(self, *, accumulates: bool, num_workers: int) -> list[str]:
        """The rules of the second stage."""
        return self.galore.conflicts(accumulates=accumulates, num_workers=num_workers)

    def stages(self, steps: int) -> list[tuple[Stage, int]]:
        """QLoRA for the first `switch_at` of the steps, GaLore for the rest.

        Raises:
            SpecError: a stage would have no step.
        """
        first = round(steps * self.switch_at)
        if not 0 < first < steps:
            raise SpecError(
                f"method.switch_at ({self.switch_at:g}) of {steps} steps leaves {'QLoRA' if not first else 'GaLore'} "
                "without a step; train more steps, or move switch_at"
            )
        return [(self.qlora, first), (self.galore, steps - first)]
