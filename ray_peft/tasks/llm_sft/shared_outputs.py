"""Outputs of trials of one base on their held-out rows, in passes that they share: each row has its own adapter."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, cast

from ray_peft.tasks.llm_sft.bench import LlmBench
from ray_peft.tasks.llm_sft.decoding import End, end_of_answers, greedy
from ray_peft.tasks.llm_sft.evaluate import as_texts, inference, longest_first, row_log_probs
from ray_peft.tasks.llm_sft.general_text import general_rows
from ray_peft.tasks.llm_sft.packed_scores import Row
from ray_peft.tasks.llm_sft.scores import Outputs, answered_rows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ray_peft.engine.slots import Slots

logger = logging.getLogger(__name__)

_LANES = "lanes"
"""Key of the prompts that are answered at a time."""


@dataclass(frozen=True)
class TrialInSlot:
    """A trial whose adapter is in a slot."""

    bench: LlmBench
    """With the base, without adapters, as its model."""
    slot: int


class SharedOutputs:
    """Computes the outputs of a base with the adapters of several trials."""

    def __init__(self, base: PreTrainedModel, slots: Slots) -> None:
        self._base, self._slots = base, slots
        self._lowered: dict[str, int] = {}
        """Sizes of passes that memory has lowered: they are no settings of any trial."""

    def held_out_loss(self, trial: TrialInSlot) -> float:
        """Mean loss of a trial's held-out answers' tokens [nats]."""
        (log_probs,) = self._log_probs([trial], [longest_first(trial.bench.scored_rows, trial.slot)])
        return -float(log_probs.mean())

    def of(self, trials: Sequence[TrialInSlot]) -> list[Outputs] | None:
        """Those of each; None where a model must answer with its own `generate`, one trial after the other.

        Raises:
            torch.OutOfMemoryError: a single row does not fit.
        """
        import torch

        answers = self._answers([trial for trial in trials if trial.bench.spec.evaluation.generate])
        if answers is None:
            return None
        rows = [longest_first(trial.bench.scored_rows, trial.slot) for trial in trials]
        general = [self._general(trial) for trial in trials]
        log_probs = self._log_probs(trials, rows)
        general_log_probs = self._log_probs(trials, general) if any(general) else [torch.empty(0)] * len(trials)
        return [
            Outputs(own, -float(text.mean()) if text.numel() else None, *answers.get(trial.slot, ((), ())))
            for trial, own, text in zip(trials, log_probs, general_log_probs, strict=True)
        ]

    @staticmethod
    def _general(trial: TrialInSlot) -> list[Row]:
        """The rows of the general text; none if the trial does not ask for its loss."""
        spec = trial.bench.spec
        if not spec.evaluation.general_text:
            return []
        return longest_first(general_rows(trial.bench.tokenizer, spec.data.max_length), trial.slot)

    def _log_probs(self, trials: Sequence[TrialInSlot], rows: Sequence[Sequence[Row]]) -> list[Tensor]:
        """Log-probabilities (answer tokens,) float64 of each trial's rows, in their order."""
        import torch

        bench = trials[0].bench
        together = sorted((row for own in rows for row in own), key=lambda row: len(row.ids), reverse=True)
        scored = row_log_probs(
            bench.spec, self._base, together, cast(int, bench.tokenizer.pad_token_id), self._lowered, self._slots
        )
        by_slot: dict[int, list[Tensor]] = {trial.slot: [torch.empty(0, dtype=torch.float64)] for trial in trials}
        for row, log_probs in zip(
            together, scored, strict=True
        ):  # of one trial they keep their order: sorts are stable
            by_slot[row.slot].append(log_probs)
        return [torch.cat(by_slot[trial.slot]) for trial in trials]

    def _answers(self, trials: Sequence[TrialInSlot]) -> dict[int, tuple[list[str], list[bool]]] | None:
        """By slot, the answers and whether each ended; trials whose answers end alike are answered together."""
        answers: dict[int, tuple[list[str], list[bool]]] = {}
        ends = {trial.slot: end_of_answers(trial.bench.spec, trial.bench.tokenizer) for trial in trials}

        def how(trial: TrialInSlot) -> tuple[int, str]:
            return trial.bench.spec.evaluation.max_new_tokens, repr(ends[trial.slot])

        for _, group in groupby(sorted(trials, key=how), how):
            alike = list(group)
            answered = self._answered(alike, ends[alike[0].slot])
            if answered is None:
                return None
            answers |= answered
        return answers

    def _answered(self, trials: Sequence[TrialInSlot], end: End) -> dict[int, tuple[list[str], list[bool]]] | None:
        from ray_peft.tasks.llm_sft.continuous import Voice
        from ray_peft.tasks.llm_sft.in_lanes import InLanes

        bench = trials[0].bench
        spec, tokenizer, device = bench.spec, bench.tokenizer, bench.device
        by_slot = {
            trial.slot: list(answered_rows(trial.bench.spec, trial.bench.scored_rows)["prompt_ids"]) for trial in trials
        }
        prompts = [prompt for own in by_slot.values() for prompt in own]
        slots = [slot for slot, own in by_slot.items() for _ in own]
        if not prompts:
            return {}
        size = self._lowered.get(_LANES, sum(trial.bench.spec.evaluation.batch_size for trial in trials))
        with inference(spec, self._base), greedy(self._base, tokenizer, end) as settings:
            settings.stop_strings = [end.text] if end.text else None
            settings.max_new_tokens = spec.evaluation.max_new_tokens
            with self._slots.away():
                reason = InLanes(spec, [Voice(self._base)], tokenizer, prompts, settings).why_not()
            if reason is not None:
                logger.info("answers are generated one trial after the other: %s", reason)
                return None
            voice = Voice(self._base, begin=self._slots.begin)
            tokens, fitting = InLanes(spec, [voice], tokenizer, prompts, settings, slots).answers(size)
            stops = settings.eos_token_id
        if fitting < size:
            self._lowered[_LANES] = fitting
        logger.info("%d prompts of %d trials were answered together on %s", len(prompts), len(trials), device)
        answers: dict[int, tuple[list[str], list[bool]]] = {}
        for slot in by_slot:
            ended: list[bool] = []
            own = [tokens[place] for place, of in enumerate(slots) if of == slot]
            answers[slot] = as_texts(own, tokenizer, stops, end.text, ended), ended
        return answers
