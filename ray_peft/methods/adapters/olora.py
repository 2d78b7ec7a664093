"""OLoRA: LoRA that starts from an orthonormal basis of the weight (Buyukakyuz 2024, arXiv:2406.01775)."""

from __future__ import annotations

from typing import Literal

from ray_peft.methods.changed_base import ChangedBase


class OLoRA(ChangedBase):
    """B A starts from the QR decomposition of W, and the base as the rest: training starts at W itself."""

    name: Literal["olora"] = "olora"

    @property
    def initial(self) -> str:
        """PEFT's name of the initialisation."""
        return "olora"
