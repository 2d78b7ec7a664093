"""Greedy answers to many prompts: continuous batching, where a lane whose answer is complete takes the next prompt.

All shapes are static, so that a GPU can replay recorded passes: there are few sizes of a group of new prompts, few
numbers of lanes, and few lengths of the cache that attention reads.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ray_peft.engine.replays import Replays
from ray_peft.tasks.llm_sft.lane_cache import LaneCache, NextTokens, TokensOfPass, WholePrompts
from ray_peft.tasks.llm_sft.lanes import CAPACITIES, LANES, largest_capacity
from ray_peft.tasks.llm_sft.masks import for_model, windows, windows_of_layers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT_TOKENS = 4096
"""Tokens, padding included, of one pass that reads prompts."""
STEPS = 8
"""Tokens that are added to each answer before the host looks which answers are complete."""
FEWEST_LANES = 8
"""A pass with fewer lanes takes a GPU as long."""


@dataclass(frozen=True)
class Voice:
    """A model that chooses the next token, alone or with others."""

    model: PreTrainedModel
    at_work: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    """The context in which it runs: of several adapters on one base, this switches on its own."""
    log_weight: float = 0.0
    """Logarithm of its weight in the mixture, if there are several models."""
    begin: Callable[[Tensor], None] | None = None
    """Told the slot of each row of a pass (row,) int64, where rows have different adapters on one base."""


@dataclass(frozen=True)
class Ends:
    """What ends an answer."""

    new_tokens: int
    """Largest number of tokens of an answer."""
    tokens: Sequence[int]
    """Tokens each of which ends an answer."""
    text: str | None = None
    """Text that ends an answer as soon as it is complete; None if there is none."""


class Lanes:
    """The lanes on the device, with the two passes that change them: one reads prompts, one adds a token."""

    def __init__(self, voices: Sequence[Voice], lanes: int, capacity: int, ends: Ends, dtype: Any) -> None:
        """Allocate empty lanes.

        Args:
            voices: the models, in evaluation mode, on one device.
            lanes: number of prompts that are answered at a time.
            capacity: largest number of tokens of a prompt with its answer.
            ends: what ends an answer; its `text` is not looked for here, the caller must do that.
            dtype: of attention masks that are added to scores.
        """
        device = voices[0].model.device
        self.count, self.capacity, self._ends, self._dtype = lanes, capacity, ends, dtype
        self._voices = [
            _Reading(voice, LaneCache(windows_of_layers(voice.model.config.get_text_config()), lanes, capacity))
            for voice in voices
        ]
        # The last lane is spare: it takes the empty prompts that fill up a group.
        self.tokens, self.positions, self.written = (
            torch.zeros(lanes + 1, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.slots = torch.zeros(lanes + 1, dtype=torch.int64, device=device)
        """Of the adapter of each lane's prompt, where they have different ones."""
        self.ended = torch.ones(lanes + 1, dtype=torch.bool, device=device)
        self.answers = torch.zeros(lanes + 1, ends.new_tokens, dtype=torch.int64, device=device)
        self._stops = torch.tensor(list(ends.tokens), dtype=torch.int64, device=device)

    def read(self, ids: Tensor, lengths: Tensor, lanes: Tensor, slots: Tensor | None = None) -> Tensor:
        """Put prompts into lanes and choose the first token of each answer; returns its scores (prompt, vocabulary).

        Args:
            ids: (prompt, longest) int64, padded on the left.
            lengths: (prompt,) int64.
            lanes: (prompt,) int64, the lane of each; `count` for an empty prompt.
            slots: (prompt,) int64, that of each one's adapter; None where they have the same.
        """
        tokens = WholePrompts(lengths, lanes, ids.shape[1], spare=self.count)
        if slots is not None:
            self.slots.index_copy_(0, lanes, slots)
        scores = self._scores(tokens, ids, tokens.positions.clamp(min=0), slots)
        first = scores.argmax(dim=-1)
        self.tokens.index_copy_(0, lanes, first)
        self.positions.index_copy_(0, lanes, lengths)
        self.written.index_copy_(0, lanes, torch.ones_like(lengths))
        self.answers.index_copy_(0, lanes, first[:, None].expand(-1, self._ends.new_tokens))
        self.ended.index_copy_(0, lanes, self._stop(first) | (self._ends.new_tokens == 1))
        return scores

    def add(self, lanes: int, span: int) -> Tensor:
        """Add a token to each of the first lanes whose answer has not ended; returns its scores (lane, vocabulary)."""
        ended, written = self.ended[:lanes], self.written[:lanes]
        positions = self.positions[:lanes]
        tokens = NextTokens(positions, span)
        scores = self._scores(tokens, self.tokens[:lanes, None], positions[:, None], self.slots[:lanes])
        following = torch.where(ended, self.tokens[:lanes], scores.argmax(dim=-1))
        place = written.clamp(max=self._ends.new_tokens - 1)[:, None]  # an ended answer keeps its last token
        self.answers[:lanes].scatter_(
            1, place, torch.where(ended[:, None], self.answers[:lanes].gather(1, place), following[:, None])
        )
        self.tokens[:lanes].copy_(following)
        positions.add_(~ended)
        written.add_(~ended)
        ended.logical_or_(self._stop(following) | (written >= self._ends.new_tokens))
        return scores

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the content of some lanes into others."""
        device = self.tokens.device
        source, target = (torch.tensor(list(lanes), device=device) for lanes in (sources, targets))
        for voice in self._voices:
            voice.cache.move(source, target)
        for state in (self.tokens, self.positions, self.written, self.slots, self.ended, self.answers):
            state.index_copy_(0, target, state.index_select(0, source))

    def _stop(self, tokens: Tensor) -> Tensor:
        """Which of `tokens` (row,) end an answer. `torch.isin` would wait for the GPU if many do (torch 2.11)."""
        return (tokens[:, None] == self._stops).any(dim=-1)

    def _scores(self, tokens: TokensOfPass, ids: Tensor, positions: Tensor, slots: Tensor | None) -> Tensor:
        """Scores (row, vocabulary) float32 of the token after `ids`: logits of one model, or log-probabilities."""
        for reading in self._voices:
            if reading.voice.begin is not None and slots is not None:
                reading.voice.begin(slots)
        scores = [voice.scores(tokens, ids, positions, self.capacity, self._dtype) for voice in self._voices]
        if len(scores) == 1:
            return scores[0]
        weights = [voice.voice.log_weight for voice in self._voices]
        logs = [torch.log_softmax(logits, dim=-1) + weight for logits, weight in zip(scores, weights, strict=True)]
        return torch.logsumexp(torch.stack(logs), dim=0)


@dataclass(frozen=True)
class _Reading:
    """A model with the keys and values of what it has read."""

    voice: Voice
    cache: LaneCache

    def scores(self, tokens: TokensOfPass, ids: Tensor, positions: Tensor, capacity: int, dtype: Any) -> Tensor:
        """Logits (row, vocabulary) float32 of the token after `ids`."""
        model: Any = self.voice.model
        config = model.config.get_text_config()
        masks = {kind: tokens.mask(window, capacity) for kind, window in windows(config).items()}
        self.cache.state.tokens = tokens
        with self.voice.at_work():
            output = model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=for_model(masks, config, dtype),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.cache.state.tokens = None
        logits: Tensor = output.logits[:, -1].float()
        return logits


@dataclass
class _Prompt:
    """A prompt in a lane."""

    row: int
    length: int
    written: int = 1
    """Tokens of the answer; too many once it has ended and the host has not seen that yet."""
    searched: int = 0
    """How many of these were searched for the text that ends an answer."""


@dataclass
class Answering:
    """Answers prompts, the longest first."""

    lanes: Lanes
    pad: int
    """The padding token."""
    replays: Replays
    static: bool
    """True: passes have few shapes, so that they can be recorded. False: the smallest shapes, which suits the CPU."""
    stop: Callable[[Sequence[int], int], int | None] | None = None
    """Given tokens and how many of them were searched: after how many tokens the text that ends an answer is complete;
    None if it is not."""
    slots: Sequence[int] | None = None
    """Of each prompt's adapter; None where they have the same."""
    _prompts: dict[int, _Prompt] = field(default_factory=dict)
    """The prompt in each lane that has one."""
    _buffers: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)

    def answers(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """(row, tokens of its answer with the end token) of each of `rows`, in the order in which answers end.

        Args:
            prompts: token ids.
            rows: places of the prompts to answer.
        """
        waiting = deque(sorted(rows, key=lambda row: len(prompts[row]), reverse=True))
        self._largest = largest_capacity(len(prompts[waiting[0]])) if waiting else 0
        while waiting or self._prompts:
            self._read(prompts, waiting)
            yield from self._ended(prompts)
            if not self._prompts:
                continue
            lanes, steps = self._close_up(bool(waiting)), self._steps()
            span = self._span(max(prompt.length + prompt.written for prompt in self._prompts.values()) + steps)
            for _ in range(steps):
                self.replays((lanes, span), partial(self.lanes.add, lanes, span))
            for prompt in self._prompts.values():
                prompt.written += steps
            yield from self._ended(prompts)

    def _steps(self) -> int:
        """Tokens to add before the host looks again; on the CPU it can look after each."""
        most = self.lanes.answers.shape[1]
        left = max(most - prompt.written for prompt in self._prompts.values())
        return min(STEPS, left) if self.static else 1

    def _span(self, tokens: int) -> int:
        """How many places of the cache to read for `tokens` tokens."""
        if not self.static:
            return min(tokens, self.lanes.capacity)
        return next((size for size in _SPANS if tokens <= size < self.lanes.capacity), self.lanes.capacity)

    def _read(self, prompts: Sequence[Sequence[int]], waiting: deque[int]) -> None:
        """Put waiting prompts into free lanes, once an eighth of the lanes is free."""
        free = [lane for lane in range(self.lanes.count) if lane not in self._prompts]
        enough = max(1, self.lanes.count // 8) if self.static and self._prompts else 1
        while waiting and len(free) >= min(enough, len(waiting)):
            capacity = self._capacity(len(prompts[waiting[0]]))
            most = min(len(waiting), group_of(len(free), capacity))
            rows = [waiting.popleft() for _ in range(most)]
            slots = [self.slots[row] for row in rows] if self.slots is not None else None
            self._begin([prompts[row] for row in rows], free[:most], capacity, slots)
            for row, lane in zip(rows, free, strict=False):
                self._prompts[lane] = _Prompt(row, len(prompts[row]))
            free = free[most:]

    def _capacity(self, tokens: int) -> int:
        if not self.static:
            return tokens
        return next((size for size in CAPACITIES if tokens <= size < self._largest), self._largest)

    def _begin(
        self, prompts: Sequence[Sequence[int]], lanes: Sequence[int], capacity: int, slots: Sequence[int] | None
    ) -> None:
        """Read a group of prompts; empty prompts fill it up to one of few sizes."""
        size = next(count for count in LANES if count >= len(prompts)) if self.static else len(prompts)
        ids = torch.full((size, capacity), self.pad)
        lengths, targets = torch.ones(size, dtype=torch.int64), torch.full((size,), self.lanes.count)
        for place, (prompt, lane) in enumerate(zip(prompts, lanes, strict=True)):
            ids[place, capacity - len(prompt) :] = torch.tensor(prompt)
            lengths[place], targets[place] = len(prompt), lane
        inputs = [ids, lengths, targets]
        if slots is not None:
            inputs.append(torch.tensor([*slots, *[slots[0]] * (size - len(slots))]))
        if not self.static:
            self.lanes.read(*inputs)
            return
        device = self.lanes.tokens.device
        buffers = self._buffers.setdefault(
            (size, capacity), [torch.empty_like(value, device=device) for value in inputs]
        )
        for buffer, value in zip(buffers, inputs, strict=True):
            buffer.copy_(value)
        self.replays(("read", size, capacity), partial(self.lanes.read, *buffers))

    def _ended(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
        """(row, answer) of the answers that have ended since the last call; their lanes become free."""
        if not self._prompts:
            return
        lanes = self.lanes
        last = max(self._prompts) + 1
        state = torch.stack([lanes.ended[:last].long(), lanes.written[:last]]).tolist()
        ended = {lane: state[1][lane] for lane in self._prompts if state[0][lane]}
        if self.stop is not None:
            texts = lanes.answers[:last].tolist()
            for lane, prompt in self._prompts.items():
                written = state[1][lane]
                tokens = [*prompts[prompt.row], *texts[lane][:written]]
                end = self.stop(tokens, prompt.length + prompt.searched)
                prompt.searched = written
                if end is not None:
                    ended[lane] = end - prompt.length
                    lanes.ended[lane] = True
        if not ended:
            return
        answers = lanes.answers[torch.tensor(list(ended), device=lanes.answers.device)].tolist()
        for (lane, written), answer in zip(ended.items(), answers, strict=True):
            yield self._prompts.pop(lane).row, answer[:written]

    def _close_up(self, more: bool) -> int:
        """Move prompts to the first lanes if no prompt waits; returns how many lanes the next passes compute."""
        if more:
            return self.lanes.count
        count = self._fewest(len(self._prompts))
        beyond = sorted(lane for lane in self._prompts if lane >= count)
        free = [lane for lane in range(count) if lane not in self._prompts][: len(beyond)]
        if beyond:
            self.lanes.move(beyond, free)
            for source, target in zip(beyond, free, strict=True):
                self._prompts[target] = self._prompts.pop(source)
        return count

    def _fewest(self, used: int) -> int:
        """The fewest lanes for `used` prompts, of the sizes that are recorded."""
        if not self.static:
            return used
        count = self.lanes.count
        while count // 2 >= max(used, FEWEST_LANES):
            count //= 2
        return count


def group_of(prompts: int, capacity: int) -> int:
    """How many of `prompts` prompts one pass reads, if its rows have `capacity` tokens."""
    return min(prompts, max(1, PROMPT_TOKENS // capacity))


_SPANS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def text_stop(tokenizer: PreTrainedTokenizerBase, text: str) -> Callable[[Sequence[int], int], int | None]:
    """The function for `Answering.stop`, with the rule that `generate` uses."""
    from transformers import StopStringCriteria

    criteria = StopStringCriteria(tokenizer, [text])
    width, pad = criteria.maximum_token_len, tokenizer.pad_token_id

    def stop(tokens: Sequence[int], searched: int) -> int | None:
        ends = range(searched + 1, len(tokens) + 1)
        if not ends:
            return None
        lasts = [list(tokens[max(0, end - width) : end]) for end in ends]
        windows = torch.tensor([[pad] * (width - len(last)) + last for last in lasts])
        complete = criteria(windows, None).tolist()
        return next((end for end, complete_here in zip(ends, complete, strict=True) if complete_here), None)

    return stop
