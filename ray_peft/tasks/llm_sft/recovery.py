"""SFTTrainer's passes under scarce memory: repeated with fewer rows where it runs out, the longest tried first."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from trl import SFTTrainer  # type: ignore[attr-defined]  # not in __all__

from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.base import Trained
from ray_peft.tasks.llm_sft.data import IGNORED
from ray_peft.tasks.memory import MICRO_BATCH, free_memory, is_out_of_memory

if TYPE_CHECKING:
    from datasets import Dataset

    from ray_peft.tasks.llm_sft.train import StageJob

logger = logging.getLogger(__name__)

DoneT = TypeVar("DoneT")


def heaviest(micro_batches: Sequence[Sequence[int]], lengths: Mapping[int, int], rows: int) -> Sequence[int]:
    """The rows of the pass that needs the most memory: rows times the longest of them.

    Args:
        micro_batches: rows by number.
        lengths: tokens of each row.
        rows: how many of a micro-batch pass at a time.
    """
    passes = [batch[first : first + rows] for batch in micro_batches for first in range(0, len(batch), rows)]
    return max(passes, key=lambda found: len(found) * max(lengths[row] for row in found))


def parts(batch: Mapping[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    """A padded micro-batch in parts of at most `rows` rows, each as long as its own longest row.

    Args:
        batch: (row, token) each, padded on the right; `attention_mask` tells padding.
        rows: of a part.
    """
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    found = []
    for first in range(0, len(lengths), rows):
        span, longest = slice(first, first + rows), max(lengths[first : first + rows])
        found.append({name: values[span, :longest] for name, values in batch.items()})
    return found


class RecoveringTrainer(SFTTrainer):
    """SFTTrainer that goes on with half as many rows a pass where memory runs out.

    The step is done again from its first row, in passes of fewer rows: the loss of each is divided by the tokens of
    the whole step, so batch, order, logged losses and updates stay what they are. With dropout, the draws from there
    on are others, since random numbers were drawn for the passes that failed, and are drawn for other shapes.
    """

    _step: Sequence[dict[str, Tensor]] = ()
    """The micro-batches of the step that is trained."""
    _passing = 0
    """Rows of the pass that is running, or ran last."""

    def __init__(
        self,
        *,
        spec: LlmTrialSpec,
        job: StageJob,
        trained: Trained,
        micro_batches: Callable[[int], list[list[int]]],
        **settings: Any,
    ) -> None:
        """SFTTrainer's own, given the stage.

        Args:
            spec: the trial.
            job: its stage; `job.lowered` is updated.
            trained: its seconds will be without those of a rehearsal.
            micro_batches: the rows of every micro-batch from a step of the stage on, by their place in the dataset.
            settings: of SFTTrainer.
        """
        super().__init__(**settings)
        self._spec, self._job, self._trained, self._micro_batches = spec, job, trained, micro_batches
        self._rows = asked = spec.train.micro_batch_size
        # Other workers would wait for a worker's further passes; weights that are updated in the backward pass know no
        # second one; and a loss that is a mean over its pass does not add up.
        alone, summed = self.accelerator.num_processes == 1, self.model_accepts_loss_kwargs
        self._divisible = alone and summed and not job.stage.conflicts(accumulates=True, num_workers=1)
        if self._divisible:
            self._rows = min(job.lowered.get(MICRO_BATCH, asked), asked)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step and its tokens with loss."""
        self._step, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._step, items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Add a micro-batch's gradients, if need be those of its step before it once more; returns its loss."""
        place = next(place for place, batch in enumerate(self._step) if batch is inputs)
        if place == 0 and self._job.rehearse:
            self._rehearse(model, num_items_in_batch)
        counted = self._counted()

        def gradients(again: bool) -> Tensor:
            for batch in self._step[:place] if again else ():
                self._added(model, batch, num_items_in_batch)
            self._count_as(counted)  # it has those before `inputs` already, as has the running loss
            return self._added(model, inputs, num_items_in_batch)

        return self._fitting(model, gradients)

    def _fitting(self, model: Any, work: Callable[[bool], DoneT]) -> DoneT:
        """What `work` returns, which is done again, without gradients, with fewer rows while memory runs out."""
        counted, again = self._counted(), False
        while True:
            try:
                return work(again)
            except RuntimeError as error:
                if not self._divisible or self._passing < 2 or not is_out_of_memory(error):
                    raise
            model.zero_grad()
            free_memory(self._job.device)
            self._count_as(counted)
            self._rows, again = self._passing // 2, True
            self._job.lowered[MICRO_BATCH] = self._rows
            logger.warning(
                "a pass of %d rows ran out of memory at step %d; going on with %d rows a pass",
                self._passing, self._job.first_step + self.state.global_step + 1, self._rows,
            )  # fmt: skip

    def _added(self, model: Any, batch: Any, items: Any) -> Tensor:
        """Add a micro-batch's gradients, in parts where its rows are too many; returns its loss."""
        if len(batch["input_ids"]) <= self._rows:
            return self._pass(model, batch, items)
        pieces, before = parts(batch, self._rows), self._counted()[1]
        # Divides what a mixture of experts adds to the loss for balance, a mean over its pass.
        self.current_gradient_accumulation_steps *= len(pieces)
        try:
            losses = [self._pass(model, piece, items) for piece in pieces]
        finally:
            self.current_gradient_accumulation_steps //= len(pieces)
        self._average_metrics(before, [int(piece["labels"][:, 1:].ne(IGNORED).sum()) for piece in pieces])
        return torch.stack(losses).sum()

    def _pass(self, model: Any, batch: Any, items: Any) -> Tensor:
        """SFTTrainer's forward and backward pass; returns the loss."""
        self._passing = len(batch["input_ids"])
        return cast("Tensor", super().training_step(model, batch, items))  # type: ignore[no-untyped-call]

    def _average_metrics(self, before: Mapping[str, list[float]], tokens: list[int]) -> None:
        """Make one value of those that the parts added to each metric, by their tokens with loss."""
        for name, values in self._metrics["train"].items():
            added = values[len(before.get(name, ())) :]
            if len(added) == len(tokens):
                mean = sum(value * count for value, count in zip(added, tokens, strict=True)) / max(sum(tokens), 1)
                values[-len(added) :] = [mean]

    def _rehearse(self, model: Any, items: Any) -> None:
        """Try the heaviest pass of the steps to come, before the first and, with the optimizer's state, the second.

        Gradients, counts and random numbers are then as if it had not been.
        """
        begun = self._initial_global_step
        done = self.state.global_step - begun
        if done > 1 or self._job.steps - begun < 2 or self.accelerator.num_processes > 1:
            return
        self._wait()
        start, counted = time.perf_counter(), self._counted()
        devices = [torch.cuda.current_device()] if self._job.device.startswith("cuda") else []
        with torch.random.fork_rng(devices):
            self._fitting(model, lambda _: self._try_heaviest(model, items, with_state=done == 1))
        model.zero_grad()
        self._count_as(counted)
        self._wait()
        self._trained.seconds -= time.perf_counter() - start

    @property
    def _dataset(self) -> Dataset:
        """The stage's rows, as SFTTrainer keeps them."""
        return cast("Dataset", self.train_dataset)

    @cached_property
    def _to_come(self) -> tuple[list[list[int]], dict[int, int]]:
        """The rows of every micro-batch of this run, and the tokens of each row."""
        batches = self._micro_batches(self._initial_global_step)
        rows = sorted({row for batch in batches for row in batch})
        return batches, dict(zip(rows, map(len, self._dataset.select(rows)["input_ids"]), strict=True))

    def _try_heaviest(self, model: Any, items: Any, *, with_state: bool) -> None:
        """One pass, or two if a step has several: the second meets the gradients of the first."""
        rows = heaviest(*self._to_come, self._rows)
        batch = self.data_collator([self._dataset[row] for row in rows])
        if not self._divisible:
            # A backward pass would update weights.
            model.train()
            with self.compute_loss_context_manager():
                self.compute_loss(model, self._prepare_inputs(batch), num_items_in_batch=items)  # type: ignore[no-untyped-call]
            return
        accumulates = self._spec.accumulation > 1 or self._rows < self._spec.train.micro_batch_size
        for _ in range(2 if with_state and accumulates else 1):
            self._pass(model, batch, items)

    def _counted(self) -> tuple[int, dict[str, list[float]]]:
        """What TRL 1.16 counts in each pass: tokens, and metrics since the last log."""
        metrics = {name: list(values) for name, values in self._metrics["train"].items()}
        return self._total_train_tokens, metrics

    def _count_as(self, counted: tuple[int, dict[str, list[float]]]) -> None:
        """Set what was counted back."""
        self._total_train_tokens, metrics = counted
        self._metrics["train"].clear()
        self._metrics["train"].update({name: list(values) for name, values in metrics.items()})

    def _wait(self) -> None:
        """For the GPU to be done, so that seconds belong to what took them."""
        if self._job.device.startswith("cuda"):
            torch.cuda.synchronize()
