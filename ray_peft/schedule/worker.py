"""One trial on the machine that Ray chose; the only module that imports ray.train."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray_peft.engine import stopping
from ray_peft.engine.recovery import answers
from ray_peft.engine.trained import Report
from ray_peft.errors import RayPeftError, TrialFailed, first_line
from ray_peft.foundation.quiet import quiet_libraries
from ray_peft.foundation.regularly import regularly
from ray_peft.foundation.storage import error_line
from ray_peft.foundation.units import GIB
from ray_peft.schedule.decide import Demand
from ray_peft.schedule.relay import Relay
from ray_peft.spec import TrialSpec
from ray_peft.store.adopted import left_row, restarts
from ray_peft.store.tracking import Store, TrialTracker
from ray_peft.trial import pack, trial
from ray_peft.trial.result import DONE, TrialResult
from ray_peft.vram.cards import known

logger = logging.getLogger(__name__)

ROW = "row"
"""The reported key that holds a trial's finished row, as JSON text."""
WANTS = "wants"
"""The key of a report in which a pack asks for a trial in the place of one that has ended."""

STOP_LOOK_S = 0.2
"""Between two looks for the file that stops a trial."""


@dataclass(frozen=True)
class Assignment:
    """A trial on its way to a worker."""

    spec: TrialSpec
    folder: Path
    """The trial's own folder, on storage that the driver reads."""
    store: Store
    parent_run_id: str | None
    sweep: str
    demand: Demand
    members: tuple[TrialResult, ...] = ()
    """Of an ensemble, its members' rows."""
    stop_file: Path | None = None
    """Once it is there, the trial ends at its next step, with a checkpoint."""
    sign: Path | None = None
    """A file in the sweep's folder that is there since before the trial: who does not see it has another folder."""


def run_here(assignment: Assignment, report: Report, rank: int = 0) -> TrialResult | None:
    """Run a trial in this process; returns its row, or None on ranks above 0.

    A trial that is told to stop writes a checkpoint, and has a row as a cancelled one.
    """
    check_shared(assignment.sign)
    demand = assignment.demand
    device = _device(demand)
    room = _room(demand, device)
    quiet_libraries()
    tracker = _tracker(assignment)
    assignment.folder.mkdir(parents=True, exist_ok=True)
    log = assignment.folder / "log.txt"
    with _log_file(log, rank), memory_limit(room, device), _stopped_by(assignment.stop_file):
        try:
            return trial.run(assignment.spec, _place(assignment, device, room, rank), tracker, report)
        except stopping.Stopped:
            return left_row(assignment.folder, assignment.spec.trial_id) if rank == 0 else None


def run_together(
    assignments: Sequence[Assignment],
    relay: Relay,
    further: Callable[[], Assignment | None] = lambda: None,
    *,
    judged: bool = False,
) -> None:
    """Run trials on one base in this process; what each reports, its row as the last, goes to the relay.

    Trials that have a row are those of a process that died before: they are not run again. One that died twice runs
    them one after the other.

    Args:
        assignments: of the trials.
        relay: to each one's Tune trial.
        further: asked for a trial that takes the place of one that has ended before others.
        judged: whether the driver compares what trials report of their evaluations, and may end them early.

    Raises:
        TrialFailed: the process must not be used again, and some have no row.
    """
    left = _without_row(assignments, relay)
    if not left:
        return
    device = _device(left[0].demand)
    room = _room(left[0].demand, device)
    quiet_libraries()

    def report(trial_id: str, metrics: Mapping[str, float], step: int) -> None:
        relay.put(trial_id, {"step": step, **metrics})

    with contextlib.ExitStack() as stack:

        def member(assignment: Assignment) -> pack.Member:
            trial_id = assignment.spec.trial_id
            assignment.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_log_file(assignment.folder / "log.txt", 0))
            return pack.Member(
                assignment.spec,
                _place(assignment, device, room),
                _tracker(assignment),
                partial(report, trial_id),
                partial(relay.wait_until_judged, trial_id) if judged else lambda step: None,
            )

        def joining() -> pack.Member | None:
            assignment = further()
            if assignment is None:
                return None
            relay.open(assignment.spec.trial_id)
            return member(assignment)

        stack.enter_context(memory_limit(room, device))
        stack.enter_context(_stopped_by(left[0].stop_file))
        stack.enter_context(contextlib.suppress(stopping.Stopped))  # its trials have rows as cancelled ones
        members = [member(assignment) for assignment in left]
        deaths = max(len(restarts(assignment.folder)) for assignment in left)
        parts = [members] if deaths < 2 else [[member] for member in members]
        for part in parts:
            rows = pack.run_pack(part, lambda row: relay.put(row.trial_id, final_report(row)), joining)
            for row in rows:
                raise_if_broken(row)


def _without_row(assignments: Sequence[Assignment], relay: Relay) -> list[Assignment]:
    """Open the relays of all; pass on the rows that there are, and return the others."""
    left: list[Assignment] = []
    for assignment in assignments:
        relay.open(assignment.spec.trial_id)
        row = left_row(assignment.folder, assignment.spec.trial_id)
        if row is not None:
            relay.put(assignment.spec.trial_id, final_report(row))
        else:
            left.append(assignment)
    return left


def check_shared(sign: Path | None) -> None:
    """Raise a TrialFailed on a node that has joined without the sweep's folder: its files would never be seen again.

    Args:
        sign: a file in that folder; None asks for nothing.
    """
    if sign is not None and not sign.exists():
        raise TrialFailed(
            f"{platform.node()} does not see {sign.parent}, where this trial has to write; mount it there, "
            "or take that machine out of the cluster: the same command then runs the trial"
        )


def _tracker(assignment: Assignment) -> TrialTracker:
    return TrialTracker(assignment.store, assignment.parent_run_id, assignment.sweep, assignment.folder)


def _place(assignment: Assignment, device: str, room: float | None, rank: int = 0) -> trial.Place:
    demand = assignment.demand
    return trial.Place(
        folder=assignment.folder,
        device=device,
        rank=rank,
        num_workers=demand.num_workers,
        gpus_per_worker=demand.gpus_per_worker,
        threads=demand.cpus_per_worker,
        members=assignment.members,
        chosen=demand.chosen,
        gpu_memory_gib=room,
        needed_gib=demand.needed_gib,
    )


def run_single(assignment: Assignment, report: Report, storage: Path) -> TrialResult:
    """Run a trial of one worker here, of several as a Ray Train job; returns its row.

    A finished row that is there is that of a worker that died before the driver had it.
    """
    left = left_row(assignment.folder, assignment.spec.trial_id)
    if left is not None and left.status in DONE:
        return left
    if assignment.demand.num_workers > 1:
        return run_in_trainer(assignment, storage)
    return run_alone(assignment, report)


def run_alone(assignment: Assignment, report: Report) -> TrialResult:
    """Run a trial of one worker in this process; returns its row, also if it could not begin.

    So only a process that dies leaves no row: a trial that fails by itself is not tried again.
    """
    try:
        result = run_here(assignment, report)
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if not isinstance(error, RayPeftError) else str(error)
        if isinstance(error, OSError) and error.errno is not None:
            text = f"cannot read or write {error_line(error, assignment.folder)}"
        spec = assignment.spec
        return TrialResult(trial_id=spec.trial_id, status="failed", spec=spec, error=text)
    assert result is not None
    return result


def run_in_trainer(assignment: Assignment, storage: Path) -> TrialResult:
    """Run a trial as a Ray Train TorchTrainer with its workers; returns its row, failed rows included.

    Args:
        assignment: the trial.
        storage: folder for Ray Train's own files.

    Raises:
        TrialFailed: the workers died before they could leave a row.
    """
    import ray.train
    import ray.train.torch

    demand = assignment.demand
    trainer = ray.train.torch.TorchTrainer(
        _train_function,  # type: ignore[arg-type]  # annotated as if it returned nothing
        train_loop_config={"assignment": assignment},
        scaling_config=ray.train.ScalingConfig(
            num_workers=demand.num_workers, use_gpu=demand.gpus_per_worker > 0, resources_per_worker=demand.per_worker()
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if demand.gpus_per_worker else "gloo"),
        run_config=ray.train.RunConfig(
            name=f"train-{assignment.spec.trial_id}-{os.urandom(3).hex()}",
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=0),
        ),
    )
    try:
        row: str | None = trainer.fit().return_value  # type: ignore[attr-defined]  # annotated as Train v1's Result
    except Exception as error:
        if (left := left_row(assignment.folder, assignment.spec.trial_id)) is not None:
            return left
        raise TrialFailed(f"the workers of {assignment.spec.trial_id} died: {error}") from error
    if row is None:
        raise TrialFailed(f"the workers of {assignment.spec.trial_id} ended without a row")
    return TrialResult.model_validate_json(row)


def _train_function(config: Mapping[str, Any]) -> str | None:
    """What every Train worker runs; rank 0 returns the trial's row as JSON text."""
    import ray.train

    assignment: Assignment = config["assignment"]
    alone = assignment.demand.num_workers == 1

    def report(metrics: Mapping[str, float], step: int) -> None:
        # Ray Train waits for every rank, but held-out losses are measured by rank 0 alone.
        if alone:
            ray.train.report({"step": step, **metrics})

    result = run_here(assignment, report, ray.train.get_context().get_world_rank())
    if result is not None and not alone and result.status != "finished":
        # The other ranks may wait in an all-reduce for ever: end them. The row is in the trial's folder.
        raise TrialFailed(first_line(result.error))
    return result.model_dump_json() if result is not None else None


def final_report(result: TrialResult) -> dict[str, Any]:
    """The last report of a trial: its row, and the scores that a search improves, of which NaN is none."""
    scores = {name: value for name, value in result.scores.plain().items() if isinstance(value, int | float)}
    return {"step": result.steps, **scores, ROW: result.model_dump_json()}


def raise_if_broken(result: TrialResult) -> None:
    """Raise for a failed row that left the GPU unusable, so that the process is not used again.

    Any other failed trial costs the next one nothing.
    """
    if result.status == "failed" and not answers("cuda"):
        raise TrialFailed(first_line(result.error))


def _device(demand: Demand) -> str:
    if not demand.gpus_per_worker:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise TrialFailed("Ray gave this trial a GPU, but torch sees none; run `ray-peft doctor` on this machine")
    return f"cuda:{torch.cuda.current_device()}"


def _room(demand: Demand, device: str) -> float | None:
    """GiB of the GPU that the trial may take; None if it has the GPU to itself."""
    if device == "cpu" or demand.gpu_memory_gib is not None or demand.gpus_per_worker >= 1:
        return demand.gpu_memory_gib
    import torch

    return demand.gpus_per_worker * torch.cuda.get_device_properties(device).total_memory / GIB


@contextlib.contextmanager
def memory_limit(room_gib: float | None, device: str) -> Iterator[None]:
    """Let the process take no more than `room_gib` GiB of the GPU: a trial beyond it runs out of memory alone.

    torch's allocator gets this less the CUDA context, which it does not count.
    """
    if room_gib is None or device == "cpu":
        yield
        return
    import torch

    gpu = torch.cuda.get_device_properties(device)
    share = (room_gib * GIB - known(gpu.name).context) / gpu.total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(share, 0.0)), device)
    try:
        yield
    finally:  # the process may run other trials
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextlib.contextmanager
def _stopped_by(file: Path | None) -> Iterator[None]:
    """Tell this process to stop as soon as `file` is there."""
    stopping.forget()

    def look() -> None:
        if file is not None and file.exists():
            stopping.tell()

    try:
        with regularly(look, STOP_LOOK_S, "stop"):
            yield
    finally:
        stopping.forget()


@contextlib.contextmanager
def _log_file(path: Path, rank: int) -> Iterator[None]:
    """Send this process's log to the trial's folder while the trial runs."""
    handler = logging.FileHandler(path if rank == 0 else path.with_suffix(f".rank{rank}.txt"), encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("ray_peft").setLevel(logging.INFO)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
