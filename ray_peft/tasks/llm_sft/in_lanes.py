"""A trial's answers in lanes: whether its models can, and as many prompts at a time as memory holds."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ray_peft.engine.recovery import free_memory, is_out_of_memory
from ray_peft.engine.replays import Replays
from ray_peft.engine.shards import is_sharded
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.continuous import Answering, Ends, Lanes, Voice, text_stop
from ray_peft.tasks.llm_sft.decodable import why_not

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InLanes:
    """Prompts to answer."""

    spec: LlmTrialSpec
    voices: Sequence[Voice]
    """The models, in the mode and under the autocast in which they answer."""
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Sequence[int]]
    settings: GenerationConfig
    """Decides what ends an answer."""
    slots: Sequence[int] | None = None
    """Of each prompt's adapter, where prompts have different ones on one base."""

    def why_not(self) -> str | None:
        """Why answers must be generated batch by batch; None if lanes give the same.

        Raises:
            torch.OutOfMemoryError: memory ran out.
        """
        if any(is_sharded(voice.model) for voice in self.voices):
            return "its weights are spread over workers, which take every token together"
        reasons = (why_not(voice, self.prompts, self._pad, self._dtype) for voice in self.voices)
        return next((reason for reason in reasons if reason is not None), None)

    def answers(self, size: int) -> tuple[dict[int, list[int]], int]:
        """The tokens of every prompt's answer, by its place, and how many were answered at a time at the end.

        Args:
            size: prompts that are answered at a time; halved whenever memory runs out.

        Raises:
            torch.OutOfMemoryError: a single prompt does not fit.
        """
        answered: dict[int, list[int]] = {}
        while len(answered) < len(self.prompts):
            left = [row for row in range(len(self.prompts)) if row not in answered]
            try:
                for row, tokens in self._some(left, min(size, len(left))):
                    answered[row] = tokens
                continue
            except RuntimeError as error:
                size = min(size, len(left))
                if size == 1 or not is_out_of_memory(error):
                    raise
            free_memory(str(self._device))
            logger.warning("%d prompts at a time ran out of memory; going on with %d", size, size // 2)
            size //= 2
        return answered, size

    def _some(self, rows: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
        """(row, answer) of some prompts, as answers end; their memory is freed with the iterator."""
        settings, on_gpu = self.settings, self._device.type == "cuda"
        ends = Ends(settings.max_new_tokens, settings.eos_token_id)
        capacity = max(len(self.prompts[row]) for row in rows) + ends.new_tokens
        stop = text_stop(self.tokenizer, settings.stop_strings[0]) if settings.stop_strings else None
        lanes = Lanes(self.voices, size, capacity, ends, self._dtype)
        replays = Replays(records=on_gpu and self.spec.train.cuda_graphs)
        answering = Answering(lanes, self._pad, replays, static=on_gpu, stop=stop, slots=self.slots)
        yield from answering.answers(self.prompts, rows)

    @property
    def _device(self) -> torch.device:
        return self.voices[0].model.device

    @property
    def _pad(self) -> int:
        return self.settings.pad_token_id or 0

    @property
    def _dtype(self) -> torch.dtype:
        """Dtype of attention masks."""
        return torch.bfloat16 if self.spec.train.precision == "bf16" else self.voices[0].model.dtype
