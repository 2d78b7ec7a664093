"""What a task gives the engine: what each optimizer step sees, and what a pass computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

PartT = TypeVar("PartT")


@dataclass(frozen=True)
class Share:
    """The part of a step's rows that one data-parallel worker passes."""

    rank: int = 0
    workers: int = 1


@dataclass(frozen=True)
class Seen:
    """What one optimizer step sees, over all workers."""

    tokens: int = 0
    """Real tokens, without padding."""
    images: int = 0


class Rows(ABC, Generic[PartT]):
    """What each optimizer step sees: a pure function of the trial's seed and the step's number.

    So it depends neither on the rows of a pass, nor on the workers, nor on a resume, and is equal for all methods.
    """

    @abstractmethod
    def parts(self, step: int, share: Share, rows: int) -> list[PartT]:
        """A worker's rows of a step, in passes of at most `rows` rows, in order.

        Args:
            step: counted over the whole trial, from 0.
            share: the worker.
            rows: most rows of a pass, as `fitting` gave it.
        """

    @abstractmethod
    def size(self, part: PartT) -> int:
        """Rows of a pass."""

    @abstractmethod
    def seen(self, step: int) -> Seen:
        """What the whole step sees."""

    @abstractmethod
    def epoch(self, steps: int) -> float:
        """How often every row has been seen after `steps` steps of the trial."""

    def fitting(self, rows: int, share: Share) -> int:
        """The number of rows a pass, at most `rows`, into which a worker's share of a step can be split."""
        return rows

    def heaviest(self, steps: range, rows: int) -> PartT | None:
        """A pass of these steps that needs the most memory; None where all need the same."""
        return None


class Computation(ABC, Generic[PartT]):
    """What a pass computes."""

    keeps_gradients = False
    """Gradients are zeroed between steps, not freed: a recorded pass adds to the same tensors."""
    members: int | None = None
    """Length of a pass's losses, one for each member; None for one member, whose loss is a single number."""

    @abstractmethod
    def inputs(self, part: PartT) -> Sequence[Tensor]:
        """The tensors of a pass, on the CPU."""

    @abstractmethod
    def loss(self, *inputs: Tensor) -> Tensor:
        """The pass's share of its step's mean loss, from what `inputs` returned, on the device.

        Returns:
            Tensor (), or (members,) for several members: each loss depends on that member's rows only.
        """

    def compared(self, *inputs: Tensor) -> Tensor:
        """What must be equal whether the same rows are padded or packed; by default the loss."""
        return self.loss(*inputs)
