"""What methods share that train every weight, the matrices of the blocks in another way than the rest."""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from ray_peft.errors import SpecError
from ray_peft.methods.base import TargetNames, Task
from ray_peft.methods.full_weights import FullWeights
from ray_peft.methods.optimizers import decayed, trainable
from ray_peft.reach.shared_weights import output_layer
from ray_peft.reach.targets import ALL_LINEAR, endings, in_blocks, is_pattern, linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.optim import Optimizer

ATTENTION_AND_MLP = ("attn", "mlp")
"""Parts of the names of a Llama-style block's linear layers. As `targets`, they mean the linear layers of any block."""


class MatrixWeights(FullWeights):
    """A stage that trains every weight, with an update of its own for the target matrices."""

    tasks: ClassVar[frozenset[Task]] = frozenset({"llm_sft"})
    title: ClassVar[str]
    """The method as a sentence calls it."""
    done_to_targets: ClassVar[str] = "projected"
    """What becomes of the target matrices, for a sentence."""
    targets: TargetNames = Field(default=ATTENTION_AND_MLP, min_length=1)
    """Linear layers whose name contains one of these (or a match of a regular expression, or `all-linear`) are trained
    in the method's own way; all other weights get plain AdamW. The default means the linear layers of a block, whatever
    the architecture calls them. Each must match something."""
    layerwise: bool = False
    """Update each weight as soon as its gradient is computed, then free the gradient."""
    eps: float = Field(default=1.0e-6, gt=0)
    """AdamW's term for numerical stability; the value of galore-torch."""

    @property
    def updates_in_backward(self) -> bool:
        """With a layer-wise update."""
        return self.layerwise

    def conflicts(self, *, accumulates: bool, num_workers: int) -> list[str]:
        """A layer-wise update uses one pass of one worker, and has no global norm."""
        conflicts: list[str] = []
        if not self.layerwise:
            return conflicts
        if accumulates:
            conflicts.append(
                f"layerwise {self.title} updates in the backward pass, so it cannot accumulate gradients; "
                "set train.micro_batch_size to train.batch_size / resources.num_workers, or method.layerwise: false"
            )
        if num_workers > 1:
            conflicts.append(
                f"layerwise {self.title} updates before workers exchange gradients, so it needs "
                f"resources.num_workers: 1 (found {num_workers})"
            )
        if self.max_grad_norm is not None:
            conflicts.append(
                f"layerwise {self.title} never holds the whole gradient, so it cannot clip its norm; "
                f"set method.max_grad_norm: null (found {self.max_grad_norm})"
            )
        return conflicts

    @abstractmethod
    def for_targets(self) -> dict[str, object]:
        """The settings of the optimizer's group of target matrices."""

    @abstractmethod
    def optimizer_kind(self) -> Callable[..., Optimizer]:
        """What makes the optimizer from its groups, `lr`, `betas`, `eps` and `stochastic`."""

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Over all parameters, with a group for the target matrices.

        Raises:
            SpecError: no linear layer matches `targets`.
        """
        matrices = self.target_weights(model)
        ids = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in trainable(model) if id(parameter) not in ids]
        of_targets: dict[str, Any] = {"params": matrices, "weight_decay": self.weight_decay, **self.for_targets()}
        return self.optimizer_kind()(
            [of_targets, *decayed(rest, self.weight_decay)],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            stochastic=self.weights == "bfloat16_stochastic",
        )

    def check(self, model: nn.Module, *, of: str, key: str) -> list[str]:
        """The share of the trained weights that has the method's own update.

        Raises:
            SpecError: as `target_weights`.
        """
        matrices = self.target_weights(model, of=of, key=f"{key}.targets")
        total = sum(parameter.numel() for parameter in model.parameters())
        share = sum(parameter.numel() for parameter in matrices) / total
        share_text = f"{share:.0%} of the trained weights of {of} are {self.done_to_targets}"
        return [f"{self.name}: {share_text}; plain AdamW trains the others"]

    def target_weights(
        self, model: nn.Module, *, of: str = "the model", key: str = "method.targets"
    ) -> list[nn.Parameter]:
        """The weights of the target matrices, in definition order.

        Args:
            model: on any device.
            of: the model as an error names it.
            key: the setting as an error names it.

        Raises:
            SpecError: a target matches no linear layer.
        """
        layers = linear(model)
        by_target = {target: self._named(target, layers, model) for target in self.targets}
        missing = [target for target, names in by_target.items() if not names]
        chosen = {name for names in by_target.values() for name in names}
        if missing and self.targets == ATTENTION_AND_MLP:
            chosen, missing = set(in_blocks(layers)), []
        if missing or not chosen:
            raise SpecError(
                f"{key}: no linear layer's name contains any of {', '.join(missing or self.targets)}; "
                f"the linear layers of {of} end in {', '.join(sorted(endings(layers)))}"
            )
        return [cast("nn.Parameter", module.weight) for name, module in layers.items() if name in chosen]

    def _named(self, target: str, layers: dict[str, nn.Module], model: nn.Module) -> list[str]:
        if target.lower() == ALL_LINEAR:
            head = output_layer(model)
            return [name for name, module in layers.items() if module is not head]
        if is_pattern(target):
            return [name for name in layers if re.search(target, name)]
        return [name for name in layers if target in name]
