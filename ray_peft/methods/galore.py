"""GaLore: full weights, AdamW's moments in a low-rank subspace of the gradient (Zhao et al. 2024, arXiv:2403.03507)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import Field

from ray_peft.errors import SpecError
from ray_peft.methods.base import Task
from ray_peft.methods.full_weights import FullWeights
from ray_peft.methods.optimizers import trainable

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class GaLore(FullWeights):
    """Train every weight; gradients of the target matrices are projected to `rank` before AdamW sees them."""

    name: Literal["galore"] = "galore"
    tasks: ClassVar[frozenset[Task]] = frozenset({"llm_sft"})
    rank: int = Field(default=128, ge=1)
    """Dimension of the gradient's subspace; moments of an (m, n) matrix take rank * max(m, n) numbers each."""
    update_proj_gap: int = Field(default=200, ge=1)
    """Optimizer steps between two singular value decompositions of the gradient."""
    scale: float = Field(default=0.25, gt=0)
    """Factor on the update after it is projected back."""
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    targets: tuple[str, ...] = Field(default=("attn", "mlp"), min_length=1)
    """Linear layers whose name contains one of these are projected; all other weights get plain AdamW."""
    layerwise: bool = False
    """Update each weight as soon as its gradient is there, then free the gradient."""
    eps: float = Field(default=1.0e-6, gt=0)
    """AdamW's term for numerical stability; the value of the reference implementation."""

    def conflicts(self, *, accumulates: bool, num_workers: int) -> list[str]:
        """Layer-wise updates see one backward pass on one worker and no global norm."""
        if not self.layerwise:
            return []
        found = []
        if accumulates:
            found.append(
                "layerwise GaLore updates in the backward pass, so it cannot accumulate gradients; "
                "set train.micro_batch_size to train.batch_size / resources.num_workers, or method.layerwise: false"
            )
        if num_workers > 1:
            found.append(
                f"layerwise GaLore updates before workers exchange gradients, so it needs resources.num_workers: 1 "
                f"(found {num_workers})"
            )
        if self.max_grad_norm is not None:
            found.append(
                f"layerwise GaLore never holds the whole gradient, so it cannot clip its norm; "
                f"set method.max_grad_norm: null (found {self.max_grad_norm})"
            )
        return found

    def optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW over all parameters, with projected moments for the target matrices.

        Raises:
            SpecError: no linear layer matches `targets`.
        """
        from ray_peft.methods.galore_adamw import galore_adamw

        projected = self.projected(model)
        ids = {id(parameter) for parameter in projected}
        rest = [parameter for parameter in trainable(model) if id(parameter) not in ids]
        subspace = {
            "rank": self.rank,
            "update_proj_gap": self.update_proj_gap,
            "scale": self.scale,
            "proj_type": self.proj_type,
        }
        groups: list[dict[str, object]] = [
            {"params": projected, "weight_decay": self.weight_decay, **subspace},
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        kind = galore_adamw(layerwise=self.layerwise, stochastic=self.weights == "bfloat16_stochastic")
        return kind([group for group in groups if group["params"]], lr=self.lr, betas=self.betas, eps=self.eps)

    def projected(self, model: nn.Module) -> list[nn.Parameter]:
        """The weights whose gradients are projected, in definition order.

        Raises:
            SpecError: no linear layer matches `targets`.
        """
        from torch import nn

        found = [
            cast("nn.Parameter", module.weight)  # torch annotates it as a Tensor
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and any(target in name for target in self.targets)
        ]
        if not found:
            names = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise SpecError(
                f"method.targets: no linear layer's name contains any of {', '.join(self.targets)}; "
                f"the linear layers of this model end in {', '.join(names)}"
            )
        return found
