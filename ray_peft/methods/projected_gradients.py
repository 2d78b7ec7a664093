"""What methods share that keep AdamW's moments of a matrix in a low-rank subspace of its gradient."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ray_peft.methods.matrix_weights import MatrixWeights

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.optim import Optimizer

    from ray_peft.methods.optim.low_rank_rules import ProjectBack


class ProjectedGradients(MatrixWeights):
    """A stage that trains every weight; AdamW sees the gradients of the target matrices in subspaces."""

    rank: int = Field(default=128, ge=1)
    """Dimension of the gradient's subspace; moments of an (m, n) matrix take rank * max(m, n) numbers."""
    scale: float = Field(default=0.25, gt=0)
    """Factor on the update after it is projected back."""
    moments: Literal["weights", "8bit"] = "weights"
    """How AdamW's moments are stored: in the dtype of the weights, or as 8-bit numbers with a scale for every 256."""
    gradients: Literal["device", "host"] = "device"
    """Where the gradients of a step are accumulated. host: a gradient moves to the host as soon as the backward pass
    has computed it, and comes back for the update, so that the GPU holds one layer's gradient at a time. The gradient
    of the vocabulary is accumulated in place. Accumulation, clipping and new subspaces use the same numbers as on the
    device. The host needs as many bytes as the weights take."""
    update_proj_gap: int = Field(default=200, ge=1)
    """Optimizer steps for which a subspace is kept."""

    def conflicts(self, *, accumulates: bool, num_workers: int) -> list[str]:
        """Those of every method with a layer-wise update; `host` accumulates for one worker."""
        conflicts: list[str] = []
        if self.gradients == "host" and num_workers > 1:
            conflicts.append(
                f"method.gradients: host keeps gradients where workers cannot exchange them, so it needs "
                f"resources.num_workers: 1 (found {num_workers})"
            )
        if self.gradients == "host" and self.layerwise:
            conflicts.append(
                f"layerwise {self.title} keeps no gradient, so method.gradients: host has no effect; "
                "set method.layerwise: false, which accumulates and clips, or method.gradients: device"
            )
        return conflicts + super().conflicts(accumulates=accumulates, num_workers=num_workers)

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

    def for_targets(self) -> dict[str, object]:
        """Rank and kind of the subspaces."""
        gap = self.update_proj_gap
        return {"rank": self.rank, "scale": self.scale, "update_proj_gap": gap, "proj_type": "std"}

    def rule(self) -> ProjectBack:
        """What becomes of AdamW's direction in a subspace; GaLore's rule by default."""
        from ray_peft.methods.optim.low_rank_rules import ProjectBack

        return ProjectBack()

    def optimizer_kind(self) -> Callable[..., Optimizer]:
        """AdamW with projected moments, as its fields ask for."""
        from ray_peft.methods.galore_adamw import GaLoreAdamW, LayerwiseGaLoreAdamW
        from ray_peft.methods.host_gradients import HostGaLoreAdamW

        kind = LayerwiseGaLoreAdamW if self.layerwise else GaLoreAdamW
        chosen: Any = HostGaLoreAdamW if self.gradients == "host" else kind
        return partial(chosen, eight_bit=self.moments == "8bit", rule=self.rule())

    def check(self, model: nn.Module, *, of: str, key: str) -> list[str]:
        """The share of the trained weights that is projected, and ranks that save no memory.

        Raises:
            SpecError: as `target_weights`.
        """
        from ray_peft.reach.coverage import rank_notes
        from ray_peft.reach.targets import smaller_side

        notes = super().check(model, of=of, key=key)
        sizes = [smaller_side(parameter) for parameter in self.target_weights(model, of=of, key=f"{key}.targets")]
        more = rank_notes(
            self.rank, sizes, "a subspace's rank", "a gradient, so that moments are no smaller there than AdamW's"
        )
        return notes + [f"{self.name}: {note}" for note in more]


class SingularSubspaces(ProjectedGradients):
    """One whose subspaces are leading singular vectors of a gradient."""

    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    svd: Literal["randomized", "exact"] = "randomized"
    """How a subspace is computed. randomized: orthogonal iteration on all matrices of a size at once, from the previous
    subspace, and the first time from random columns that depend on the seed. exact: a singular value
    decomposition of each matrix, as in galore-torch; for all of Gemma-3-1B it took 12 s on an H200. A `proj_type` that
    projects the larger side is always exact."""

    def for_targets(self) -> dict[str, object]:
        """Rank and kind of the subspaces."""
        return super().for_targets() | {"proj_type": self.proj_type, "svd": self.svd}
