"""The contract of a fine-tuning method: `Method` says how to split a trial, `Stage` how to train one part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ray_peft.foundation.strict import Strict
from ray_peft.reach.targets import check_words

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Task = Literal["llm_sft", "text_to_image"]
Dtype = Literal["float32", "bfloat16", "float16"]

ENOUGH_STEPS = 1000
"""For a method of several stages to have a step in each."""


def _as_list(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _check_targets(targets: tuple[str, ...]) -> tuple[str, ...]:
    check_words(targets)
    return targets


TargetNames = Annotated[tuple[str, ...], BeforeValidator(_as_list), AfterValidator(_check_targets)]
"""Words for layers, as a list or a single one; the method's field says what they match."""


class Quantization(Strict):
    """How the frozen base is stored by bitsandbytes; the name of a type alone stands for its defaults."""

    quant_type: Literal["nf4", "fp4", "int8"] = "nf4"
    """nf4 and fp4: 4 bits (Dettmers et al. 2023, arXiv:2305.14314). int8: 8 bits, with inputs above 6.0 in the model's
    dtype (Dettmers et al. 2022, arXiv:2208.07339)."""
    double_quant: bool = True
    """Quantise the quantisation constants too: about 0.37 bits a parameter less. Of 4 bits alone."""
    compute_dtype: Dtype = "bfloat16"
    """The dtype into which weights are dequantised for each matrix product. Of 4 bits alone: int8 multiplies whole
    numbers."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return {"quant_type": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_eight_bits(self) -> Self:
        unread = sorted({"double_quant", "compute_dtype"} & self.model_fields_set) if self.bits == 8 else []
        changed = [name for name in unread if getattr(self, name) != type(self).model_fields[name].default]
        if changed:
            raise ValueError(
                f"quant_type int8 has no {changed[0]} (found {getattr(self, changed[0])}); leave it out, or use nf4"
            )
        return self

    @property
    def bits(self) -> int:
        """Of a stored weight."""
        return 8 if self.quant_type == "int8" else 4


class Method(Strict, ABC):
    """One way to fine-tune. Its fields are its hyperparameters: nothing else configures it."""

    name: str
    tasks: ClassVar[frozenset[Task]]
    needs_full_weights: ClassVar[bool] = False
    """True if the base itself is trained, so that it cannot be stored in 4 bits."""
    changes_base: ClassVar[bool] = False
    """True if attaching or training changes the base's weights, so that no other trial can start from them."""

    @abstractmethod
    def stages(self, steps: int) -> list[tuple[Stage, int]]:
        """Split `steps` optimizer steps over the stages to run, in order."""

    def parts(self) -> list[tuple[str, Stage]]:
        """Its stages in order, each with its place in the trial's settings: `method`, or `method.qlora`."""
        stages = [stage for stage, _ in self.stages(ENOUGH_STEPS)]
        keys = {id(getattr(self, name)): f"method.{name}" for name in type(self).model_fields}
        return [(keys.get(id(stage), "method"), stage) for stage in stages]

    def quantization(self) -> Quantization | None:
        """How the base must be stored when the first stage starts; None keeps plain weights."""
        return None

    def weights_dtype(self, dtype: Dtype) -> Dtype:
        """The dtype in which the base is held when the first stage starts, given the model's own setting."""
        return dtype

    def arithmetic(self, dtype: Dtype, four_bit_share: float | None = None, storage: Quantization | None = None) -> str:
        """How weights are held and updated, for the comparison's reader.

        Args:
            dtype: the model's own setting.
            four_bit_share: share of the base's weights that are quantised; None where nobody has counted.
            storage: how they are; None for plain weights.
        """
        return f"{dtype} weights, untouched"

    def conflicts(self, *, accumulates: bool, num_workers: int) -> list[str]:
        """Rules of this method that the rest of the trial breaks, one sentence each.

        Args:
            accumulates: one optimizer step takes several forward passes on a worker.
            num_workers: data-parallel workers of the trial.
        """
        return []


OF_TRAINING = frozenset({"lr", "weight_decay", "betas", "max_grad_norm"})
"""Fields of every `Stage` that say how its numbers change: not how many there are, how they begin, or what time a step
takes."""


class Stage(Method):
    """A method that trains in one go; LoRA is one stage, QLoRA-then-GaLore is two."""

    lr: float = Field(default=1.0e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the gradient's global norm to this; None does not clip."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""

    @property
    def updates_in_backward(self) -> bool:
        """Weights are updated in the backward pass, so that it cannot be done again, nor its gradients added up."""
        return False

    def needs_own_loop(self) -> str | None:
        """The setting, such as `gradients: host`, that another training loop than ours cannot serve; None without."""
        return None

    def why_not_recorded(self) -> str | None:
        """Why its passes cannot be recorded once and replayed; None if they can."""
        return f"{self.name} updates weights in the backward pass" if self.updates_in_backward else None

    def why_not_plain(self) -> str | None:
        """Why this stage cannot be trained on a base that is not quantised, with the way out; None if it can."""
        return None

    def why_not_on(self, storage: Quantization) -> str | None:
        """Why this stage cannot be trained on a base that is stored so, with the way out; None if it can."""
        return None

    def why_not_sharded(self) -> str | None:
        """Why it cannot be trained where each worker holds a part of every weight; None if it can."""
        return "it needs whole weights" if self.needs_full_weights else "it was not tried there"

    def why_not_merged(self) -> str | None:
        """Why what it trains cannot be added to the base's weights; None if it can."""
        return None

    def stages(self, steps: int) -> list[tuple[Stage, int]]:
        """The stage itself, for all steps."""
        return [(self, steps)]

    @abstractmethod
    def attach(self, model: nn.Module) -> nn.Module:
        """Return `model` with exactly the parameters to train marked `requires_grad`."""

    @abstractmethod
    def optimizer(self, model: nn.Module) -> Optimizer:
        """Build the optimizer over the trainable parameters of `model`."""

    def check(self, model: nn.Module, *, of: str, key: str) -> list[str]:
        """What a reader must know of this stage on this model, one sentence each.

        Args:
            model: of the trial's architecture, on the meta device; it is left as it is.
            of: the model as an error names it.
            key: the stage's place in the trial's settings, such as `method` or `method.qlora`.

        Raises:
            ModelError, SpecError: the stage cannot train this model.
        """
        return []

    def merge(self, model: nn.Module) -> nn.Module:
        """Fold what was trained into plain weights, ready for the next stage."""
        return model
