"""Keys and values of prompts that are being answered: every lane has one prompt, and its own next place to write.

transformers' StaticCache writes all rows of a batch at the same place, and its sliding layers choose that place in
Python. A new prompt could then not take a lane in the middle of the work, and passes of a sliding layer could not be
recorded until it is full. Here a layer with a window is a ring buffer of the window's size, so that attention sees all
that the buffer holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, StaticLayer

if TYPE_CHECKING:
    from torch import Tensor


class TokensOfPass(ABC):
    """The tokens of one pass: where their keys and values are written, and which ones they attend to."""

    def __init__(self) -> None:
        self._rows: dict[int, Tensor] = {}

    def rows(self, places: int) -> Tensor:
        """The rows (tokens,) int64 of memory that the tokens are written to, in a layer of `places` places a lane."""
        if places not in self._rows:
            self._rows[places] = self._written(places)
        return self._rows[places]

    @abstractmethod
    def _written(self, places: int) -> Tensor:
        """Compute the result of `rows`."""

    @abstractmethod
    def seen(self, layer: LaneLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (row, head, place, size) that attention reads, given those of the new tokens."""

    @abstractmethod
    def mask(self, window: int | None, capacity: int) -> Tensor:
        """Which of them each token attends to, (row, 1, token, place) bool, in layers with such a window."""


class WholePrompts(TokensOfPass):
    """Prompts of up to `capacity` tokens, padded on the left; each attends to itself alone."""

    def __init__(self, lengths: Tensor, lanes: Tensor, capacity: int, spare: int) -> None:
        """Set up the pass.

        Args:
            lengths: (prompt,) int64, in tokens.
            lanes: (prompt,) int64, the lane of each.
            capacity: tokens of the pass's rows.
            spare: the lane that takes what is never read: padding, and tokens outside the window.
        """
        super().__init__()
        self._lengths, self._lanes, self._spare = lengths[:, None], lanes[:, None], spare
        self._index = torch.arange(capacity, device=lengths.device)
        self.positions = self._index - (capacity - self._lengths)
        """Position of each token (prompt, capacity) int64, negative in the padding."""

    def _written(self, places: int) -> Tensor:
        stored = (self.positions >= 0) & (self.positions >= self._lengths - places)
        lanes = torch.where(stored, self._lanes, self._spare)
        return (lanes * places + self.positions.clamp(min=0) % places).flatten()

    def seen(self, layer: LaneLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of the prompts themselves."""
        return keys, values

    def mask(self, window: int | None, capacity: int) -> Tensor:
        """A token attends to earlier ones in the window, and not to padding; padding attends to itself alone."""
        distance = self._index[:, None] - self._index[None, :]
        backwards = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return ((backwards & (self.positions >= 0)[:, None, :]) | (distance == 0))[:, None]


class NextTokens(TokensOfPass):
    """The next token of each of the first lanes; it attends to all that its lane holds."""

    def __init__(self, positions: Tensor, span: int) -> None:
        """Set up the pass.

        Args:
            positions: (lane,) int64 of the tokens, below `span`.
            span: how many places are read, of layers that hold more.
        """
        super().__init__()
        self._positions, self._span = positions, span

    def _written(self, places: int) -> Tensor:
        lanes = torch.arange(len(self._positions), device=self._positions.device)
        return lanes * places + self._positions % places

    def seen(self, layer: LaneLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that the lanes hold."""
        return layer.first_places(len(self._positions), self._span)

    def mask(self, window: int | None, capacity: int) -> Tensor:
        """The places that were written: in a ring buffer, those whose latest position is not negative."""
        places = capacity if window is None else min(window, capacity)
        place = torch.arange(min(self._span, places), device=self._positions.device)
        positions = self._positions[:, None]
        return (positions - (positions - place) % places >= 0)[:, None, None]


class LaneLayer(StaticLayer):  # type: ignore[no-untyped-call]  # transformers has no types for it
    """One layer's keys and values, (lane x place, head, size): of each lane the last `max_cache_len` tokens."""

    def __init__(self, lanes: int, capacity: int, window: int | None, state: LaneState) -> None:
        """Memory is allocated with the first keys, whose shape and dtype it takes; one more lane is spare."""
        super().__init__(max_cache_len=capacity if window is None else min(window, capacity))
        self._lanes, self._state = lanes + 1, state
        self._memory: list[Tensor] = []
        """Keys and values."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take memory like these, which may differ in dtype: under autocast, positions turn keys into float32."""
        rows = self._lanes * self.max_cache_len
        self._memory = [
            torch.zeros(rows, states.shape[1], states.shape[-1], dtype=states.dtype, device=states.device)
            for states in (key_states, value_states)
        ]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the tokens of the pass, (row, head, token, size); returns the keys and values that they attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = self._state.tokens
        assert tokens is not None
        rows = tokens.rows(self.max_cache_len)
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory.index_copy_(0, rows, states.transpose(1, 2).flatten(0, 1))
        return tokens.seen(self, key_states, value_states)

    def first_places(self, lanes: int, span: int) -> tuple[Tensor, Tensor]:
        """Keys and values (lane, head, place, size) of the first lanes and places."""
        keys, values = (self._by_lane(memory)[:lanes, :span].transpose(1, 2) for memory in self._memory)
        return keys, values

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy lanes (lane,) int64 to the place of others."""
        for memory in map(self._by_lane, self._memory):
            memory.index_copy_(0, targets, memory.index_select(0, sources))

    def _by_lane(self, memory: Tensor) -> Tensor:
        return memory.view(self._lanes, self.max_cache_len, *memory.shape[1:])

    def get_seq_length(self) -> int:
        """Zero: lanes have no common length, and every pass gets its positions as an input."""
        return 0


class LaneState:
    """State that all layers of a cache share."""

    tokens: TokensOfPass | None = None
    """The tokens of the pass that runs."""


class LaneCache(Cache):
    """The cache of one model."""

    def __init__(self, windows: Sequence[int | None], lanes: int, capacity: int) -> None:
        """A layer for each of `windows`, which is None for a layer without a window."""
        self.state = LaneState()
        self._own = [LaneLayer(lanes, capacity, window, self.state) for window in windows]
        super().__init__(layers=[*self._own])

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy lanes (lane,) int64 to the place of others."""
        for layer in self._own:
            layer.move(sources, targets)
