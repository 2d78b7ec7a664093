"""LoRA: frozen weights plus a trained low-rank update (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.errors import SpecError
from ray_peft.methods.adapter import LayerAdapter
from ray_peft.methods.base import Task
from ray_peft.reach.targets import ALL_LINEAR, PROJECTIONS, Targets

if TYPE_CHECKING:
    from torch import nn


class LowRankAdapter(LayerAdapter):
    """What LoRA and its kin share: two thin trained matrices beside each target weight."""

    kind: ClassVar[str] = "LORA"
    says_no_count: ClassVar[bool] = False
    """Whether a plan leaves out how many parameters are trained, as it did before other methods could be compared."""
    rank: int = Field(default=16, ge=1)
    """Inner dimension of the update; trainable parameters grow linearly with it."""
    alpha: float = Field(default=32.0, gt=0)
    """Numerator of the scale alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    rank_pattern: dict[str, int] = {}
    """Other ranks for some layers, by the end of a layer's name or a regular expression."""
    alpha_pattern: dict[str, float] = {}
    """Other alphas for some layers, by the same."""

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Rank, scale and dropout."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "bias": "none",
        }

    def placed(self, model: nn.Module, *, of: str = "the model", key: str = "method") -> Targets:
        """As that of every adapter; dropout cannot be put on the input of fused experts, and patterns must match."""
        targets = super().placed(model, of=of, key=key)
        if self.dropout and targets.parameters:
            raise SpecError(
                f"{key}.dropout: {self.dropout:g} cannot be put on the input of fused experts "
                f"({', '.join(targets.parameters)}) of {of}; set dropout: 0, or name targets without them"
            )
        for field, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            check_pattern(pattern, targets.layers, of=of, key=f"{key}.{field}")
        return targets

    def check(self, model: nn.Module, *, of: str, key: str) -> list[str]:
        """Where adapters go by the architecture, what of the blocks has none, and ranks that are no restriction.

        Raises:
            ModelError, SpecError: as `placed`.
        """
        from ray_peft.methods.new_tokens import marked
        from ray_peft.methods.saved_modules import check_modules
        from ray_peft.reach.coverage import adapter_notes

        targets = self.placed(model, of=of, key=key)
        check_modules(self.modules_to_save, model, of=of, key=f"{key}.modules_to_save")
        if marked(model):
            self.peft_config(model, of=of, key=key)
        by_default = self.targets in (PROJECTIONS, (ALL_LINEAR,))
        notes = adapter_notes(model, targets, self.rank, of=of, by_default=by_default)
        lines = [f"{self.name}: {note}" for note in notes]
        return lines if self.says_no_count else [*lines, *super().check(model, of=of, key=key)]


def check_pattern(pattern: dict[str, Any], layers: tuple[str, ...], *, of: str, key: str) -> None:
    """Refuse a pattern of which an entry matches no target layer, as PEFT would match it.

    Raises:
        SpecError: there is one.
    """
    import re

    for entry in pattern:
        # PEFT 0.21's get_pattern_key: the whole name, or its end from a dot on.
        if not any(re.match(rf"(.*\.)?({entry})$", name) for name in layers):
            raise SpecError(f"{key}: {entry} matches no target layer of {of}; name the end of a target's name")


class LoRA(LowRankAdapter):
    """Train B A beside each target weight W: y = W x + (alpha / rank) B A x."""

    name: Literal["lora"] = "lora"
    tasks: ClassVar[frozenset[Task]] = frozenset({"llm_sft", "text_to_image"})
    takes_experts: ClassVar[bool] = True
    says_no_count: ClassVar[bool] = True

    def why_not_sharded(self) -> str | None:
        """The frozen base is spread; every worker holds the adapters whole."""
        return None
