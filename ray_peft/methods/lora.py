"""LoRA: frozen weights plus a trained low-rank update (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from ray_peft.errors import SpecError
from ray_peft.methods.base import Dtype, Stage, TargetNames, Task
from ray_peft.methods.optimizers import OptimizerName, adamw, trainable
from ray_peft.reach.targets import ALL_LINEAR, PROJECTIONS, Targets, all_turned, resolve

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class LowRankAdapter(Stage):
    """What LoRA and QLoRA share: two thin trained matrices beside each target weight."""

    rank: int = Field(default=16, ge=1)
    """Inner dimension of the update; trainable parameters grow linearly with it."""
    alpha: float = Field(default=32.0, gt=0)
    """Numerator of the scale alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: TargetNames = Field(default=PROJECTIONS, min_length=1)
    """The layers that get an adapter: ends of their names, regular expressions that match a whole name or its end, or
    `all-linear`. The default means the linear layers of a block, whatever the architecture calls them, and the fused
    experts of a mixture. Each must match something."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype that holds adapters and their gradients while they train."""
    lr: float = Field(default=2.0e-4, gt=0)
    optim: OptimizerName = "adamw"

    @field_validator("optim", mode="before")
    @classmethod
    def _no_projection_of_thin_matrices(cls, value: object) -> object:
        if isinstance(value, str) and "galore" in value:
            raise ValueError(
                f"{value} projects the gradients of full weight matrices, but an adapter trains two thin ones; "
                "use method galore, or optim: adamw"
            )
        return value

    def arithmetic(self, dtype: Dtype, four_bit_share: float | None = None) -> str:
        """The dtypes of base and adapters."""
        return f"frozen {dtype} base, {self.adapter_dtype} adapters"

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze the base and add adapters to the targets.

        Raises:
            ModelError: a target matches nothing that can carry an adapter.
        """
        import torch
        from peft import LoraConfig, get_peft_model

        targets = self.placed(model)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT annotates int and computes with floats
            lora_dropout=self.dropout,
            target_modules=list(targets.modules),
            target_parameters=list(targets.parameters) or None,
            fan_in_fan_out=all_turned(model, targets.layers),
            bias="none",
            task_type="CAUSAL_LM" if hasattr(model, "generate") else None,
        )
        adapted = get_peft_model(model, config)
        for parameter in trainable(adapted):
            parameter.data = parameter.data.to(getattr(torch, self.adapter_dtype))
        return adapted

    def placed(self, model: nn.Module, *, of: str = "the model", key: str = "method") -> Targets:
        """The layers of `model` that get an adapter.

        Raises:
            ModelError: a target matches nothing that can carry one, or a layer whose weight is used elsewhere, too.
            SpecError: dropout on fused experts.
        """
        from ray_peft.reach.shared_weights import refuse_head_and_tied

        targets = resolve(self.targets, model, of=of, key=f"{key}.targets")
        refuse_head_and_tied(model, targets.layers, of=of, key=f"{key}.targets")
        if self.dropout and targets.parameters:
            raise SpecError(
                f"{key}.dropout: {self.dropout:g} cannot be put on the input of fused experts "
                f"({', '.join(targets.parameters)}) of {of}; set dropout: 0, or name targets without them"
            )
        return targets

    def check(self, model: nn.Module, *, of: str, key: str) -> list[str]:
        """Where adapters go by the architecture, what of the blocks has none, and ranks that are no restriction.

        Raises:
            ModelError, SpecError: as `placed`.
        """
        from ray_peft.reach.coverage import adapter_notes

        targets = self.placed(model, of=of, key=key)
        by_default = self.targets in (PROJECTIONS, (ALL_LINEAR,))
        return [
            f"{self.name}: {note}" for note in adapter_notes(model, targets, self.rank, of=of, by_default=by_default)
        ]

    def optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW over the adapters."""
        return adamw(trainable(model), self.optim, lr=self.lr, betas=self.betas, decay=self.weight_decay)

    def merge(self, model: nn.Module) -> nn.Module:
        """Add B A to the base weights and drop the adapters."""
        merged: nn.Module = model.merge_and_unload()  # type: ignore[operator]
        return merged


class LoRA(LowRankAdapter):
    """Train B A beside each target weight W: y = W x + (alpha / rank) B A x."""

    name: Literal["lora"] = "lora"
    tasks: ClassVar[frozenset[Task]] = frozenset({"llm_sft", "text_to_image"})
