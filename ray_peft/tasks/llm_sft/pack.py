"""Several LoRA trials that train together on one frozen base and share nothing but its passes."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ray_peft.engine.crew import Crew
from ray_peft.engine.loop import Engine
from ray_peft.engine.member import Job, Member
from ray_peft.engine.passes import Pass, RecordedPasses
from ray_peft.engine.recovery import free_memory
from ray_peft.errors import ModelError, first_line
from ray_peft.methods.base import OF_TRAINING
from ray_peft.methods.lora import LowRankAdapter
from ray_peft.spec.keys import MICRO_BATCH
from ray_peft.tasks.base import Further, PackEnded, PackTrial
from ray_peft.tasks.llm_sft import train
from ray_peft.tasks.llm_sft.bench import LlmBench
from ray_peft.tasks.llm_sft.lanes import largest_capacity, lay_out
from ray_peft.tasks.llm_sft.loss import TextLoss
from ray_peft.tasks.llm_sft.packed import PackedLoss, PackedPart
from ray_peft.tasks.llm_sft.shared_outputs import SharedOutputs, TrialInSlot
from ray_peft.tasks.llm_sft.steps import TextPart, TextRows
from ray_peft.tasks.llm_sft.together import LossTogether, RowsTogether

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ray_peft.engine.slots import Piece, Slots

logger = logging.getLogger(__name__)

FEW_ROWS = 4
"""Rows whose loss is computed both ways."""

Ended = Callable[[LlmBench, Member, Exception | None], None]
"""Called with a member that has finished, with its adapter in its bench's model, or that has failed."""


class Pack(Crew):
    """Trials on one base, some of them at a time: when one ends, the next takes its place."""

    def __init__(
        self,
        benches: Sequence[LlmBench],
        jobs: Sequence[Job],
        places: int,
        ended: Ended,
        further: Callable[[], tuple[LlmBench, Job] | None] = lambda: None,
    ) -> None:
        """Prepare.

        Args:
            benches: of the trials, all on the same model object, without adapters; in the order of starting.
            jobs: of each, its only stage.
            places: largest number of members at a time.
            ended: called for every member that ends.
            further: asked for a trial when none waits and a member ends before others.
        """
        self._benches, self._ended, self._further = list(benches), ended, further
        self._base = benches[0].model
        forms = [_form(cast(LowRankAdapter, job.stage)) for job in jobs]
        waiting = sorted(range(len(jobs)), key=lambda place: forms.index(forms[place]))  # equal adapters are neighbours
        self._waiting = [(benches[place], jobs[place]) for place in waiting]
        self._places = min(places, len(benches))
        self._stages = [cast(LowRankAdapter, job.stage) for job in jobs]
        self._drops = any(stage.dropout for stage in self._stages)
        self._rows = [TextRows(bench.spec, bench.data.train) for bench in benches]
        self._together = RowsTogether(self._rows)
        self._slots = self._make_slots()
        self._shared_outputs = SharedOutputs(self._base, self._slots)
        self._seats: dict[int, tuple[LlmBench, Member]] = {}
        self._initial: dict[str, _Initial] = {}
        """Initial adapters that a further trial begins with, by what decides them."""
        self._attached: tuple[str, Any] | None = None
        """The base with PEFT's adapter of trials that leave one after the other, and what decides its form."""
        self._leaving = 0
        """Trials that have finished together and have not left."""
        self.parameters = [(0, 0)] * len(benches)
        """`Bench.parameters` of each once it has started."""

    def run(self) -> None:
        """Train them all."""
        spec, job = self._benches[0].spec, self._waiting[0][1]
        reason = why_apart(self._benches[0], self._stages)
        if reason is not None:
            raise ModelError(f"trials on {spec.model.name} cannot train together: {reason}; train them apart")
        self._recompute_again()
        recorded = job.device.startswith("cuda") and spec.train.cuda_graphs
        members = [self._member(slot) for slot in range(self._places)]
        computation = LossTogether(spec, self._base, self._slots, drops=self._drops)
        make_pass = RecordedPasses if recorded else Pass
        try:
            Engine(members, self._base, self._together, computation, make_pass, crew=self, rehearse=recorded).run()
        finally:
            self._detach()
            self._slots.remove()

    def seat(self, member: Member, number: int) -> None:
        """Pass the member's rows from round `number` on."""
        assert member.slot is not None
        self._together.seat(member.slot, cast(TextRows, member.rows), member.number - number)

    def finished(self, members: Sequence[Member]) -> None:
        """Compute the outputs of several trained models in shared passes; else each computes them by itself, later."""
        self._leaving += len(members)
        slots = [cast(int, member.slot) for member in members]
        trials = [
            TrialInSlot(self._seats[slot][0], slot)
            for slot in slots
            if self._slots.is_finite(slot) and not self._seats[slot][0].judged  # whose rewards are computed alone
        ]
        if len(trials) < 2:
            return
        begin = time.perf_counter()
        try:
            outputs = self._shared_outputs.of(trials)
        except Exception as error:  # of the model's own code, or memory: each is tried by itself
            logger.warning("%d trials scored together: %s: %s", len(trials), type(error).__name__, first_line(error))
            outputs = None
        if outputs is None:
            free_memory(trials[0].bench.device)
        else:
            share = (time.perf_counter() - begin) / len(trials)
            for trial, of_trial in zip(trials, outputs, strict=True):
                trial.bench.outputs = of_trial
                trial.bench.costs.evaluated_for(share)
        self._recompute_again()

    def leave(self, member: Member, error: Exception | None) -> Member | None:
        """Report that a member has ended; returns the next trial's member, which takes its place."""
        slot = cast(int, member.slot)
        bench, _ = self._seats.pop(slot)
        self._together.free(slot)
        if error is not None:
            self._ended(bench, member, error)
        else:
            with self._with_adapter(bench, member):
                self._ended(bench, member, None)
        self._slots.clear(slot)
        self._leaving -= error is None
        if not self._waiting and len(self._seats) > self._leaving:
            self._take_further()
        if self._waiting or not self._leaving:
            self._detach()
        return self._member(slot) if self._waiting else None

    def _take_further(self) -> None:
        """Let a further trial wait, if there is one and the places are large enough for it; else it must run later."""
        joining = self._further()
        if joining is None:
            return
        self._detach()
        bench, job = joining
        rows, stage = TextRows(bench.spec, bench.data.train), cast(LowRankAdapter, job.stage)
        self._benches.append(bench)
        self._rows.append(rows)
        self.parameters.append((0, 0))
        placed = stage.placed(self._base)
        fits = set(placed.layers) <= self._slots.sizes.keys() and not placed.parameters
        fits = fits and stage.rank <= self._slots.rank and (self._drops or not stage.dropout)
        if fits and self._together.holds(rows):
            self._waiting.append((bench, job))
        else:
            logger.info("%s: needs a larger place, and waits for the end of this pack", bench.spec.trial_id)

    def _member(self, slot: int) -> Member:
        """The next trial that waits, with its own initial adapter in a slot."""
        from ray_peft.engine.slot_member import SlotMember

        bench, job = self._waiting.pop(0)
        stage, place = cast(LowRankAdapter, job.stage), self._benches.index(bench)
        key = _begins_with(bench, stage)
        initial = self._initial.get(key)
        if initial is not None:
            self._slots.fill_again(slot, initial.row, stage.alpha / stage.rank, stage.dropout)
        else:
            bench.attach(stage)
            parameters = bench.parameters()
            train.start_as_trl(bench.model)
            pieces = self._slots.fill(slot, bench.model, stage.alpha / stage.rank, stage.dropout)
            bench.model = unwrapped(bench.model)
            initial = _Initial(self._slots.weights[slot : slot + 1].clone(), pieces, parameters)
        waiting = (_begins_with(other, cast(LowRankAdapter, job.stage)) for other, job in self._waiting)
        if key in waiting:
            self._initial[key] = initial
        else:
            self._initial.pop(key, None)
        self.parameters[place] = initial.parameters
        member = SlotMember(job, self._slots, slot, initial.pieces, self._rows[place])
        self._seats[slot] = (bench, member)
        logger.info("%s: place %d of %d", bench.spec.trial_id, slot + 1, self._places)
        return member

    @contextlib.contextmanager
    def _with_adapter(self, bench: LlmBench, member: Member) -> Iterator[None]:
        """Inside this context, the bench's model has the member's adapter in PEFT's layers, as in a trial by itself."""
        import torch

        form = _form(cast(LowRankAdapter, member.job.stage))
        with torch.random.fork_rng(), self._slots.away():
            if self._attached is None or self._attached[0] != form:
                self._detach()
                bench.attach(member.job.stage)
                self._attached = form, bench.model
            bench.model = self._attached[1]
            self._slots.read(cast(int, member.slot), bench.model)
            try:
                yield
            finally:
                bench.model = self._base

    def _detach(self) -> None:
        """Take PEFT's adapter off the base, if it has one."""
        if self._attached is not None:
            unwrapped(self._attached[1])
            self._attached = None
            self._recompute_again()

    def _recompute_again(self) -> None:
        """Recompute activations as before an evaluation, which has changed that."""
        if any(bench.spec.train.gradient_checkpointing for bench in self._benches):
            train.recompute_activations(self._base, None, random=False)

    def evaluation(self, bench: LlmBench) -> Callable[[], float]:
        """A function that measures the held-out loss of a bench's member while it trains."""

        def loss() -> float:
            slot = next(slot for slot, (other, _) in self._seats.items() if other is bench)
            loss = self._shared_outputs.held_out_loss(TrialInSlot(bench, slot))
            self._recompute_again()
            return loss

        return loss

    def _make_slots(self) -> Slots:
        import torch

        from ray_peft.engine.slots import Slots

        layers: dict[str, None] = {}
        for stage in self._stages:
            layers |= dict.fromkeys(stage.placed(self._base).layers)
        spec, stage = self._benches[0].spec, self._stages[0]
        dtype = getattr(torch, stage.adapter_dtype)
        return Slots(
            self._base,
            layers,
            slots=self._places,
            rank=max(stage.rank for stage in self._stages),
            dtype=dtype,
            computed=torch.bfloat16 if spec.train.precision == "bf16" else dtype,
        )


@dataclass(frozen=True)
class _Initial:
    """An adapter before the first step, as trials of one seed and one form begin with."""

    row: Tensor
    """Its slot's content, (1, numbers)."""
    pieces: list[Piece]
    parameters: tuple[int, int]
    """`Bench.parameters` with it."""


def _form(stage: LowRankAdapter, without: Sequence[str] = ()) -> str:
    """What decides PEFT's adapter, but for its weights and the fields `without`."""
    left_out = {*OF_TRAINING, *without}
    return json.dumps({name: value for name, value in stage.plain().items() if name not in left_out})


def _begins_with(bench: LlmBench, stage: LowRankAdapter) -> str:
    """What decides the adapter that a trial begins with: scale and dropout do not."""
    return f"{bench.spec.seed} {_form(stage, ('alpha', 'dropout'))}"


def why_apart(bench: LlmBench, stages: Sequence[LowRankAdapter]) -> str | None:
    """Why trials cannot share a base; None if they can.

    Compares the loss of a few rows both ways, so that every trial trains on the numbers that it would have alone.

    Args:
        bench: that of any trial, with the base as its model.
        stages: of all trials.
    """
    import torch

    base, spec = bench.model, bench.spec
    experts = next((name for stage in stages for name in stage.placed(base).parameters), None)
    if experts is not None:
        return f"{experts} are fused experts, which mix up the rows of the trials"
    config: Any = base.config.get_text_config()
    if any(isinstance(layer, torch.nn.Dropout) and layer.p > 0 for layer in base.modules()):
        return "the model has dropout"
    if getattr(config, "attention_dropout", 0.0):
        return f"its attention_dropout is {config.attention_dropout:g}"
    plain = TextLoss(spec, base, cast(int, bench.tokenizer.pad_token_id))
    if plain.balances:
        return "it is a mixture of experts, where a row's path depends on its content"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation}, not sdpa or eager"
    rows = bench.data.train[: min(FEW_ROWS, len(bench.data.train))]
    ids, labels = rows["input_ids"], rows["input_ids"]
    tokens = sum(len(row) - 1 for row in ids)
    (plan, *_) = lay_out([len(row) for row in ids], 10**9, largest_capacity(max(map(len, ids))))
    lanes = [[(ids[row], labels[row]) for row in lane] for lane in plan.lanes]
    part = PackedPart(plan.bucket, lanes, [tokens] * len(lanes), 1.0)
    base.eval()  # type: ignore[no-untyped-call]
    return train.why_unlike(
        spec, bench.device, (plain, TextPart(ids, labels, tokens, 1)), (PackedLoss(spec, base), part)
    )


def unwrapped(adapted: Any) -> PreTrainedModel:
    """Take PEFT's wrapper and the adapters off a model; returns its base."""
    base = adapted.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    return cast("PreTrainedModel", base)


def train_together(trials: Sequence[PackTrial], ended: PackEnded, further: Further) -> None:
    """Train the only stage of each trial, all at once; arguments as those of `TaskType.train_pack`."""
    lowered: dict[str, int] = {}
    benches = [cast(LlmBench, trial.bench) for trial in trials]

    def report_end(bench: LlmBench, member: Member, error: Exception | None) -> None:
        if MICRO_BATCH in lowered:  # of the pack, and no setting of any trial
            member.trained.passes += f", at most {lowered[MICRO_BATCH]} rows of all trials a pass, since memory ran out"
        place = benches.index(bench)
        ended(place, bench, pack.parameters[place], member.trained, error)

    def job(bench: LlmBench, trial: PackTrial) -> Job:
        ((stage, steps),) = bench.spec.method.stages(bench.total_steps())
        return Job(
            bench.spec, stage, steps, 0, trial.folder, bench.device, trial.report, lambda: pack.evaluation(bench)(),
            lowered=lowered, costs=bench.costs, verdict=trial.verdict,
        )  # fmt: skip

    def take_further() -> tuple[LlmBench, Job] | None:
        trial = further()
        if trial is None:
            return None
        benches.append(cast(LlmBench, trial.bench))
        return benches[-1], job(benches[-1], trial)

    jobs = [job(*both) for both in zip(benches, trials, strict=True)]
    pack = Pack(benches, jobs, len(benches), report_end, take_further)
    pack.run()
