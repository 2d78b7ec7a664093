"""The segments that torch's caching allocator takes from a GPU for a sequence of allocations, in a pool of their own.

Segments are never moved or joined, so free parts of several cannot serve one large tensor: the allocator reserves more
than the tensors ever take together. The rules are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.11).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from ray_peft.foundation.units import MIB

_SMALL = MIB
"""Tensors up to this size share segments of `_SMALL_SEGMENT`."""
_SMALL_SEGMENT = 2 * MIB
_MIDDLE = 10 * MIB
"""Tensors below this size share segments of `_MIDDLE_SEGMENT`; a larger one gets a segment of its own size."""
_MIDDLE_SEGMENT = 20 * MIB
SEGMENT = 2 * MIB
"""The sizes of segments are multiples of this."""
BLOCK = 512
"""Every allocation is rounded up to this many bytes."""


@dataclass(eq=False)
class Block:
    """A part of a segment; neighbours are those in the same segment."""

    address: int
    size: int
    small: bool
    free: bool = False
    before: Block | None = None
    after: Block | None = None


class Pool:
    """An allocator without memory."""

    def __init__(self) -> None:
        self.reserved = 0
        """Bytes of all segments."""
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}
        """Free blocks of small and of other segments, by size and address."""

    def allocate(self, size: int) -> Block:
        """The smallest free block that holds `size` bytes, cut to size; a new segment if there is none."""
        small = size <= _SMALL
        blocks = self._free[small]
        place = bisect.bisect_left(blocks, (size, -1))
        block = blocks.pop(place)[2] if place < len(blocks) else self._segment(size, small)
        block.free = False
        rest = block.size - size
        if rest >= BLOCK if small else rest > _SMALL:
            remainder = Block(block.address + size, rest, small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = remainder
            block.after, block.size = remainder, size
            self._keep(remainder)
        return block

    def free(self, block: Block) -> None:
        """Give a block back; it joins free neighbours."""
        for neighbour in (block.before, block.after):
            if neighbour is None or not neighbour.free:
                continue
            blocks = self._free[neighbour.small]
            del blocks[bisect.bisect_left(blocks, (neighbour.size, neighbour.address))]
            first, second = (neighbour, block) if neighbour is block.before else (block, neighbour)
            first.size, first.after = first.size + second.size, second.after
            if second.after is not None:
                second.after.before = first
            block = first
        self._keep(block)

    def _segment(self, size: int, small: bool) -> Block:
        fixed = _SMALL_SEGMENT if small else _MIDDLE_SEGMENT if size < _MIDDLE else 0
        whole = fixed or -(-size // SEGMENT) * SEGMENT
        address, self.reserved = self.reserved, self.reserved + whole
        return Block(address, whole, small)

    def _keep(self, block: Block) -> None:
        block.free = True
        bisect.insort(self._free[block.small], (block.size, block.address, block))
