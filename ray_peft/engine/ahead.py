"""The inputs of the round to come, computed while the GPU still works on the passes of the round before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Generic

from ray_peft.engine.contract import Computation, PartT, Rows, Share

if TYPE_CHECKING:
    from torch import Tensor


class Ahead(Generic[PartT]):
    """The passes of a round, prepared before they are due, or when they are."""

    def __init__(self, data: Rows[PartT], computation: Computation[PartT], share: Share) -> None:
        """Nothing is prepared yet; the arguments are the engine's."""
        self._data, self._computation, self._share = data, computation, share
        self._due: tuple[int, int] | None = None
        self._prepared: list[tuple[PartT, Sequence[Tensor]]] = []

    def prepare(self, number: int, rows: int) -> None:
        """Compute the inputs of round `number` in passes of at most `rows` rows."""
        parts = self._data.parts(number, self._share, rows)
        self._prepared = [(part, self._computation.inputs(part)) for part in parts]
        self._due = number, rows

    def forget(self) -> None:
        """What is prepared is no longer what the round will see."""
        self._due, self._prepared = None, []

    def take(self, number: int, rows: int) -> Iterator[tuple[PartT, Sequence[Tensor]]]:
        """The passes of round `number`, each with its inputs on the CPU."""
        if self._due == (number, rows):
            prepared = self._prepared
            self.forget()
            yield from prepared
            return
        self.forget()
        for part in self._data.parts(number, self._share, rows):
            yield part, self._computation.inputs(part)
