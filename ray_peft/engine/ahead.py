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
        self._prepared: dict[tuple[int, int], list[tuple[PartT, Sequence[Tensor]]]] = {}
        """Of one round, by its number and the most rows of a pass; empty where nothing is prepared."""

    def prepare(self, number: int, rows: int) -> None:
        """Compute the inputs of round `number` in passes of at most `rows` rows."""
        self._prepared = {(number, rows): list(self._passes(number, rows))}

    def forget(self) -> None:
        """What is prepared is no longer what the round will see."""
        self._prepared = {}

    def take(self, number: int, rows: int) -> Iterator[tuple[PartT, Sequence[Tensor]]]:
        """The passes of round `number`, each with its inputs on the CPU."""
        prepared = self._prepared.get((number, rows))
        self.forget()
        return self._passes(number, rows) if prepared is None else iter(prepared)

    def _passes(self, number: int, rows: int) -> Iterator[tuple[PartT, Sequence[Tensor]]]:
        for part in self._data.parts(number, self._share, rows):
            yield part, self._computation.inputs(part)

    def beside(self, number: int, rows: int) -> list[Sequence[Tensor]]:
        """The inputs that this worker passes for nothing after its own rows of round `number`.

        So it runs as many passes as any other: workers of a sharded model need each other's parts of the weights.
        """
        workers = self._share.workers
        parts = [self._data.parts(number, Share(rank, workers), rows) for rank in range(workers)]
        missing = max(map(len, parts)) - len(parts[self._share.rank])
        return [self._computation.inputs(parts[0][0])] * missing if missing else []
