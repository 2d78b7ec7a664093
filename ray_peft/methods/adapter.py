"""What all adapters of PEFT share: a frozen base, a config of PEFT's beside it, and what of a model it reaches."""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from ray_peft.errors import ModelError, RayPeftError, SpecError, first_line
from ray_peft.methods.base import Dtype, Quantization, Stage, TargetNames, Task
from ray_peft.methods.kinds import KINDS, PROMPTS, config_type
from ray_peft.methods.new_tokens import TRAINED_KINDS, complete, marked, rows_to_train
from ray_peft.methods.optimizers import OptimizerName, adamw, trainable
from ray_peft.reach.targets import PROJECTIONS, Targets, all_turned, resolve

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from torch.optim import Optimizer


def on_shapes(model: nn.Module) -> bool:
    """Whether a model has no numbers, so that nothing can be initialised from them."""
    return any(parameter.is_meta for parameter in model.parameters())


class Adapter(Stage):
    """A frozen base and what one of PEFT's configs adds to it."""

    tasks: ClassVar[frozenset[Task]] = frozenset({"llm_sft"})
    kind: ClassVar[str]
    """PEFT's name of its config, of `KINDS`."""
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

    @property
    def peft_kind(self) -> str:
        """PEFT's name of the config."""
        return self.kind

    @property
    def trains_prompts(self) -> bool:
        """Whether it trains virtual tokens before each row, and changes no layer."""
        return self.peft_kind in PROMPTS

    @abstractmethod
    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """The fields of PEFT's config that the method's settings mean; on the meta device without initial values."""

    def arithmetic(self, dtype: Dtype, four_bit_share: float | None = None, storage: Quantization | None = None) -> str:
        """The storage of the base, the dtype it is computed in, and that of the adapters."""
        base = f"frozen {dtype} base"
        if storage is not None:
            computed = f" computed in {storage.compute_dtype}" if storage.bits == 4 else ""
            base = f"frozen {storage.quant_type} base{computed}"
            if four_bit_share is not None:
                kind = f"{storage.quant_type}{computed}"
                base = f"frozen base, {four_bit_share:.0%} of its weights in {kind}, the others in {dtype}"
        return f"{base}, {self.adapter_dtype} adapters"

    def why_not_on(self, storage: Quantization) -> str | None:
        """Whether PEFT's kind of adapter can lie beside quantised layers."""
        reason = KINDS[self.peft_kind].quantised
        if reason is None:
            return None
        return (
            f"method {self.name} cannot be trained on a base in {storage.quant_type}: {reason}; set "
            "model.quantization: null, or use method qlora"
        )

    def why_not_merged(self) -> str | None:
        """Why what it trains cannot be added to the base's weights; None if it can."""
        return KINDS[self.peft_kind].merges

    def peft_config(self, model: nn.Module, *, of: str = "the model", key: str = "method") -> PeftConfig:
        """PEFT's config for a model.

        Raises:
            ModelError: a target matches nothing that can carry an adapter.
            SpecError: PEFT refuses a setting.
        """
        task = "CAUSAL_LM" if hasattr(model, "generate") else None
        try:
            config: PeftConfig = config_type(self.peft_kind)(task_type=task, **self.config_fields(model))
        except (TypeError, ValueError) as error:
            raise SpecError(f"{key}: PEFT refuses these settings of {self.name}: {first_line(error)}") from None
        return config

    def why_not_new_tokens(self) -> str | None:
        """Why embeddings of `model.new_tokens` cannot be trained beside it, with the way out; None if they can."""
        if self.peft_kind in TRAINED_KINDS:
            return None
        return (
            f"model.new_tokens: PEFT trains embeddings of new tokens beside LoRA and its kin and AdaLoRA, not beside "
            f"those of method {self.name}; use one of them, or a method that trains all weights, such as full"
        )

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze the base and add adapters.

        Raises:
            ModelError, SpecError: as `peft_config`.
        """
        import torch
        from peft import get_peft_model

        adapted: Any = get_peft_model(model, self.peft_config(model))
        complete(adapted)
        self.select(adapted)
        for parameter in trainable(adapted):
            parameter.data = parameter.data.to(getattr(torch, self.adapter_dtype))
        attached: nn.Module = adapted
        return attached

    def select(self, adapted: nn.Module) -> None:
        """Mark other parameters as trained than PEFT does; nothing by default."""

    def check(self, model: nn.Module, *, of: str, key: str) -> list[str]:
        """How many parameters are trained, counted on shapes.

        Raises:
            ModelError, SpecError: as `peft_config`, or nothing would be trained.
        """
        self.peft_config(model, of=of, key=key)
        try:
            adapted = self.attach(copy.deepcopy(model))
        except RayPeftError:
            raise
        except Exception:  # noqa: BLE001 - of any of PEFT's kinds; the rehearsal says what failed, or that it cannot tell
            return []
        count, total = (sum(p.numel() for p in ps) for ps in (trainable(adapted), list(model.parameters())))
        if not count:
            raise ModelError(f"{key}: nothing of {of} would be trained by {self.name}; name other targets")
        return [f"{self.name}: {count:,} parameters are trained, {count / total:.2%} of those of {of}"]

    def optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW over the adapters."""
        return adamw(trainable(model), self.optim, lr=self.lr, betas=self.betas, decay=self.weight_decay)

    def merge(self, model: nn.Module) -> nn.Module:
        """Add what was trained to the base's weights, dequantised where they are quantised, and drop the adapters.

        Raises:
            SpecError: PEFT cannot.
        """
        from ray_peft.methods.merging import merged

        reason = self.why_not_merged()
        if reason is not None:
            raise SpecError(f"method {self.name} cannot be merged into the base: {reason}; export the adapter")
        return merged(model)


class LayerAdapter(Adapter):
    """An adapter beside layers of the base."""

    takes_experts: ClassVar[bool] = False
    """Whether PEFT puts it beside fused experts, which are parameters and no layers."""
    targets: TargetNames = Field(default=PROJECTIONS, min_length=1)
    """The layers that get an adapter: ends of their names, regular expressions that match a whole name or its end, or
    `all-linear`. The default means the linear layers of a block, whatever the architecture calls them, and the fused
    experts of a mixture. Each must match something."""
    modules_to_save: tuple[str, ...] = ()
    """Ends of the names of modules that are trained whole and saved with the adapter, such as norms."""

    def peft_config(self, model: nn.Module, *, of: str = "the model", key: str = "method") -> PeftConfig:
        """As that of every adapter, with its targets in `model`."""
        from ray_peft.methods.saved_modules import check_modules

        targets = self.placed(model, of=of, key=key)
        check_modules(self.modules_to_save, model, of=of, key=f"{key}.modules_to_save")
        fields = {field.name for field in dataclasses.fields(config_type(self.peft_kind))}
        config: Any = super().peft_config(model, of=of, key=key)
        config.target_modules = set(targets.modules)
        if targets.parameters:
            config.target_parameters = list(targets.parameters)
        if "fan_in_fan_out" in fields:
            config.fan_in_fan_out = all_turned(model, targets.layers)
        if self.modules_to_save:
            config.modules_to_save = list(self.modules_to_save)
        if marked(model):
            rows = rows_to_train(model, targets.layers, self.modules_to_save, of=of, key=key)
            config.trainable_token_indices = rows or None
        checked: PeftConfig = config
        return checked

    def placed(self, model: nn.Module, *, of: str = "the model", key: str = "method") -> Targets:
        """The layers of `model` that get an adapter.

        Raises:
            ModelError: a target matches nothing that can carry one, or a layer whose weight is used elsewhere, too.
            SpecError: dropout on fused experts.
        """
        from ray_peft.reach.shared_weights import refuse_head_and_tied

        targets = resolve(self.targets, model, of=of, key=f"{key}.targets")
        refuse_head_and_tied(model, targets.layers, of=of, key=f"{key}.targets")
        if targets.parameters and not self.takes_experts:
            if self.targets != PROJECTIONS or not targets.modules:
                raise ModelError(
                    f"{key}.targets: {', '.join(targets.parameters)} are fused experts of {of}, beside which "
                    f"{self.name} puts nothing; name other layers, or use method lora"
                )
            targets = dataclasses.replace(targets, parameters=(), experts=())
        return targets
