"""Several LoRA trials that train together on one frozen base: they share its passes, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ray_peft.engine.crew import Crew
from ray_peft.engine.loop import Engine
from ray_peft.engine.member import Job, Member
from ray_peft.engine.passes import Pass, RecordedPasses
from ray_peft.engine.trained import Report
from ray_peft.methods.lora import LowRankAdapter
from ray_peft.tasks.base import PackEnded
from ray_peft.tasks.llm_sft import train
from ray_peft.tasks.llm_sft.bench import LlmBench
from ray_peft.tasks.llm_sft.steps import TextRows
from ray_peft.tasks.llm_sft.together import LossTogether, RowsTogether

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ray_peft.engine.slots import Slots

Ended = Callable[[LlmBench, Member, Exception | None], None]
"""Takes a member that has done its steps, with its adapter in its bench's model, or that has failed."""


class Pack(Crew):
    """Trials of one base, some of them at a time; whoever waits follows one that ends."""

    def __init__(self, benches: Sequence[LlmBench], jobs: Sequence[Job], places: int, ended: Ended) -> None:
        """Prepare.

        Args:
            benches: of the trials, all on the same model object, without adapters; in the order of starting.
            jobs: of each, its only stage.
            places: most members at a time.
            ended: told of every member that ends.
        """
        self._benches, self._ended = list(benches), ended
        self._base = benches[0].model
        self._waiting = list(zip(benches, jobs, strict=True))
        self._places = min(places, len(benches))
        self._stages = [cast(LowRankAdapter, job.stage) for job in jobs]
        self._rows = [TextRows(bench.spec, bench.data.train) for bench in benches]
        self._together = RowsTogether(self._rows)
        self._slots = self._make_slots()
        self._seats: dict[int, tuple[LlmBench, Member]] = {}
        self.passes = ""
        """How passes ran."""

    def run(self) -> None:
        """Train them all."""
        spec, job = self._benches[0].spec, self._waiting[0][1]
        if any(bench.spec.train.gradient_checkpointing for bench in self._benches):
            train.recompute_activations(self._base, random=False)
        recorded = job.device.startswith("cuda") and spec.train.cuda_graphs
        members = [self._member(slot) for slot in range(self._places)]
        computation = LossTogether(spec, self._base, self._slots)
        make_pass = RecordedPasses if recorded else Pass
        try:
            Engine(members, self._base, self._together, computation, make_pass, crew=self, rehearse=recorded).run()
        finally:
            self._slots.remove()

    def seat(self, member: Member, number: int) -> None:
        """The member's rows are passed from round `number` on."""
        assert member.slot is not None
        self._together.seat(member.slot, cast(TextRows, member.rows), member.number - number)

    def leave(self, member: Member, error: Exception | None) -> Member | None:
        """Tell of a member's end, and give its place to the next that waits."""
        slot = cast(int, member.slot)
        bench, _ = self._seats.pop(slot)
        self._together.free(slot)
        if error is not None:
            self._ended(bench, member, error)
        else:
            with self._worn(bench, member):
                self._ended(bench, member, None)
        self._slots.clear(slot)
        return self._member(slot) if self._waiting else None

    def _member(self, slot: int) -> Member:
        """The next trial that waits, with its own initial adapter in a slot."""
        from ray_peft.engine.slot_member import SlotMember

        bench, job = self._waiting.pop(0)
        stage = cast(LowRankAdapter, job.stage)
        bench.attach(stage)
        train.start_as_trl(bench.spec, bench.model)
        pieces = self._slots.fill(slot, bench.model, stage.alpha / stage.rank)
        bench.model = unwrapped(bench.model)
        rows = self._rows[self._benches.index(bench)]
        member = SlotMember(job, self._slots, slot, pieces, rows)
        self._seats[slot] = (bench, member)
        return member

    @contextlib.contextmanager
    def _worn(self, bench: LlmBench, member: Member) -> Iterator[None]:
        """The bench's model has the member's adapter in PEFT's own layers inside, as that of a trial alone."""
        import torch

        with torch.random.fork_rng(), self._slots.away():
            bench.attach(member.job.stage)
            self._slots.read(cast(int, member.slot), bench.model)
            try:
                yield
            finally:
                bench.model = unwrapped(bench.model)
                if self._benches[0].spec.train.gradient_checkpointing:  # an evaluation has set its own way
                    train.recompute_activations(self._base, random=False)

    def evaluation(self, bench: LlmBench) -> Callable[[], float]:
        """Measures the held-out loss of a bench's member while it trains."""

        def loss() -> float:
            member = next(member for other, member in self._seats.values() if other is bench)
            with self._worn(bench, member):
                return bench.eval_loss()

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


def unwrapped(adapted: Any) -> PreTrainedModel:
    """The base of a model in PEFT's wrapper, without adapters and their marks."""
    base = adapted.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    return cast("PreTrainedModel", base)


def train_together(
    benches: Sequence[LlmBench], folders: Sequence[Path], reports: Sequence[Report], ended: PackEnded
) -> None:
    """Train the only stage of each trial, all at once; arguments as those of `TaskType.train_pack`."""

    def told(bench: LlmBench, member: Member, error: Exception | None) -> None:
        ended(benches.index(bench), bench, member.trained, error)

    def job(bench: LlmBench, folder: Path, report: Report) -> Job:
        ((stage, steps),) = bench.spec.method.stages(bench.total_steps())
        return Job(
            bench.spec, stage, steps, 0, folder, bench.device, report, lambda: pack.evaluation(bench)(),
            lowered=bench.lowered, costs=bench.costs,
        )  # fmt: skip

    jobs = [job(*given) for given in zip(benches, folders, reports, strict=True)]
    pack = Pack(benches, jobs, len(benches), told)
    pack.run()
