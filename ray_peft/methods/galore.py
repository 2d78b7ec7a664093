"""GaLore: full weights, AdamW's moments in a low-rank subspace of the gradient (Zhao et al. 2024, arXiv:2403.03507)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import Field

from ray_peft.errors import SpecError
from ray_peft.methods.base import TargetNames, Task
from ray_peft.methods.full_weights import FullWeights
from ray_peft.methods.optimizers import trainable
from ray_peft.reach.shared_weights import output_layer
from ray_peft.reach.targets import ALL_LINEAR, endings, in_blocks, is_pattern, linear

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

ATTENTION_AND_MLP = ("attn", "mlp")
"""Parts of the names of a Llama-style block's linear layers. As `targets`, they mean the linear layers of any block."""


class GaLore(FullWeights):
    """Train every weight; gradients of the target matrices are projected to `rank` before AdamW sees them."""

    name: Literal["galore"] = "galore"
    tasks: ClassVar[frozenset[Task]] = frozenset({"llm_sft"})
    rank: int = Field(default=128, ge=1)
    """Dimension of the gradient's subspace; moments of an (m, n) matrix take rank * max(m, n) numbers."""
    update_proj_gap: int = Field(default=200, ge=1)
    """Optimizer steps for which a subspace is kept."""
    scale: float = Field(default=0.25, gt=0)
    """Factor on the update after it is projected back."""
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    targets: TargetNames = Field(default=ATTENTION_AND_MLP, min_length=1)
    """Linear layers whose name contains one of these (or a match of a regular expression, or `all-linear`) are
    projected; all other weights get plain AdamW. The default means the linear layers of a block, whatever the
    architecture calls them. Each must match something."""
    svd: Literal["randomized", "exact"] = "randomized"
    """How a subspace is computed. randomized: orthogonal iteration on all matrices of a size at once, from the previous
    subspace, and the first time from random columns that depend on the seed. exact: a singular value
    decomposition of each matrix, as in galore-torch; for all of Gemma-3-1B it took 12 s on an H200. A `proj_type` that
    projects the larger side is always exact."""
    moments: Literal["weights", "8bit"] = "weights"
    """How AdamW's moments are stored: in the dtype of the weights, or as 8-bit numbers with a scale for every 256."""
    gradients: Literal["device", "host"] = "device"
    """Where the gradients of a step are accumulated. host: a gradient moves to the host as soon as the backward pass
    has computed it, and comes back for the update, so that the GPU holds one layer's gradient at a time. The gradient
    of the vocabulary is accumulated in place. Accumulation, clipping and new subspaces use the same numbers as on the
    device. The host needs as many bytes as the weights take."""
    layerwise: bool = False
    """Update each weight as soon as its gradient is computed, then free the gradient."""
    eps: float = Field(default=1.0e-6, gt=0)
    """AdamW's term for numerical stability; the value of the reference implementation."""

    def conflicts(self, *, accumulates: bool, num_workers: int) -> list[str]:
        """A layer-wise update uses one pass of one worker and has no global norm; `host` accumulates for one worker."""
        conflicts: list[str] = []
        if self.gradients == "host" and num_workers > 1:
            conflicts.append(
                f"method.gradients: host keeps gradients where workers cannot exchange them, so it needs "
                f"resources.num_workers: 1 (found {num_workers})"
            )
        if not self.layerwise:
            return conflicts
        if self.gradients == "host":
            conflicts.append(
                "layerwise GaLore keeps no gradient, so method.gradients: host has no effect; "
                "set method.layerwise: false, which accumulates and clips, or method.gradients: device"
            )
        if accumulates:
            conflicts.append(
                "layerwise GaLore updates in the backward pass, so it cannot accumulate gradients; "
                "set train.micro_batch_size to train.batch_size / resources.num_workers, or method.layerwise: false"
            )
        if num_workers > 1:
            conflicts.append(
                f"layerwise GaLore updates before workers exchange gradients, so it needs resources.num_workers: 1 "
                f"(found {num_workers})"
            )
        if self.max_grad_norm is not None:
            conflicts.append(
                f"layerwise GaLore never holds the whole gradient, so it cannot clip its norm; "
                f"set method.max_grad_norm: null (found {self.max_grad_norm})"
            )
        return conflicts

    def needs_own_loop(self) -> str | None:
        """Gradients on the host must be clipped by the optimizer itself, and another loop would not ask it to."""
        return "gradients: host" if self.gradients == "host" else None

    def attach(self, model: nn.Module) -> nn.Module:
        """Mark every parameter as trained. With gradients on the host, accumulate the vocabulary's in place."""
        from ray_peft.methods.vocabulary import add_in_place

        model = super().attach(model)
        if self.gradients == "host":
            add_in_place(model)
        return model

    def optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW over all parameters, with projected moments for the target matrices.

        Raises:
            SpecError: no linear layer matches `targets`.
        """
        from ray_peft.methods.galore_adamw import GaLoreAdamW, LayerwiseGaLoreAdamW
        from ray_peft.methods.host_gradients import HostGaLoreAdamW

        projected = self.projected(model)
        ids = {id(parameter) for parameter in projected}
        rest = [parameter for parameter in trainable(model) if id(parameter) not in ids]
        subspace = {
            "rank": self.rank,
            "update_proj_gap": self.update_proj_gap,
            "scale": self.scale,
            "proj_type": self.proj_type,
            "svd": self.svd,
        }
        groups: list[dict[str, object]] = [
            {"params": projected, "weight_decay": self.weight_decay, **subspace},
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        kind = LayerwiseGaLoreAdamW if self.layerwise else GaLoreAdamW
        return (HostGaLoreAdamW if self.gradients == "host" else kind)(
            [group for group in groups if group["params"]],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            stochastic=self.weights == "bfloat16_stochastic",
            eight_bit=self.moments == "8bit",
        )

    def check(self, model: nn.Module, *, of: str, key: str) -> list[str]:
        """The share of the trained weights that is projected, and ranks at which nothing is.

        Raises:
            SpecError: as `projected`.
        """
        from ray_peft.reach.coverage import rank_notes
        from ray_peft.reach.targets import smaller_side

        projected = self.projected(model, of=of, key=f"{key}.targets")
        total = sum(parameter.numel() for parameter in model.parameters())
        share = sum(parameter.numel() for parameter in projected) / total
        notes = [f"{share:.0%} of the trained weights of {of} are projected; plain AdamW trains the others"]
        sizes = [smaller_side(parameter) for parameter in projected]
        notes += rank_notes(self.rank, sizes, "a subspace's rank", "a gradient, so that nothing is projected there")
        return [f"{self.name}: {note}" for note in notes]

    def projected(self, model: nn.Module, *, of: str = "the model", key: str = "method.targets") -> list[nn.Parameter]:
        """The weights whose gradients are projected, in definition order.

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
