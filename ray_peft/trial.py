"""One trial's life, top to bottom; knows neither Ray nor MLflow."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import math
import platform
import shutil
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from ray_peft import measure
from ray_peft.errors import RayPeftError, TrialFailed, first_line
from ray_peft.methods.base import Dtype, Stage
from ray_peft.result import Provenance, Scores, Status, TrialResult, Usage
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.tasks.base import Bench, MemberModel, Report, Scored, Trained

logger = logging.getLogger(__name__)

RESULT_FILE = "result.json"
"""The trial's row, in its own folder."""

STAGE_FILE = "stage.json"
"""In a stage's kept adapter: what the stages up to it took, for a trial that goes on from there."""


class Tracker(Protocol):
    """Where a trial's metrics and results go."""

    def start(self, spec: TrialSpec) -> str:
        """Open the trial's run and return its id. Raises: a configured tracker must work."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep metrics of one step. Never raises."""

    def artifact(self, path: Path, folder: str) -> None:
        """Keep a file, or all files of a folder."""

    def table(self, rows: list[dict[str, object]], artifact_file: str) -> None:
        """Keep a table that the tracker can show."""

    def fetch(self, run_id: str, folder: str, to: Path) -> Path:
        """Another run's artifacts in `folder`, brought below `to`. Raises if they are not there."""

    def record(self, result: TrialResult) -> None:
        """Keep the result and close the run. Raises: the result is the product."""


@dataclass(frozen=True)
class Place:
    """Where a trial runs."""

    folder: Path
    """The trial's own folder: metrics.jsonl, samples.jsonl, answers.jsonl, checkpoints."""
    device: str
    """"cpu" or "cuda:N"."""
    rank: int = 0
    num_workers: int = 1
    gpus_per_worker: float = 0.0
    threads: int | None = None
    """CPU threads of torch; null leaves them as they are."""
    members: tuple[TrialResult, ...] = ()
    """Of an ensemble, the rows of its members that have one; their folders are beside `folder`."""


def run(spec: TrialSpec, place: Place, tracker: Tracker, progress: Report) -> TrialResult | None:
    """Run a trial and record its result, whatever happens.

    Args:
        spec: the trial.
        place: its folder, device and rank.
        tracker: used by rank 0 alone.
        progress: called with every logged metric, by every rank.

    Returns:
        The recorded result, failed trials included; null on ranks above 0 once they are done.

    Raises:
        TrackingError: the result could not be stored.
        KeyboardInterrupt, SystemExit: passed on after the trial is recorded as cancelled.
        Exception: on ranks above 0 a failure is raised, so that rank 0 does not wait for a lost worker.
    """
    if place.rank > 0:
        _run(_Life(spec, place, None, progress))
        return None
    life = _Life(spec, place, tracker, progress)
    life.run_id = tracker.start(spec)
    try:
        result = _run(life)
    except Exception as error:
        result = life.failed(error)
        logger.warning("%s: %s: %s", spec.trial_id, result.status, first_line(result.error))
    except BaseException:
        _record(life.result("cancelled", error="stopped before the end"), place, tracker)
        raise
    finally:
        _release(place)
    _record(result, place, tracker)
    return result


def _record(result: TrialResult, place: Place, tracker: Tracker) -> None:
    """Keep the row in the trial's folder first: the tracker may be out of reach."""
    place.folder.mkdir(parents=True, exist_ok=True)
    partial = place.folder / f"{RESULT_FILE}.partial"
    partial.write_text(result.model_dump_json(indent=2), encoding="utf-8")
    partial.replace(place.folder / RESULT_FILE)
    tracker.record(result)


class _Life:
    """What is known of a trial so far, so that a failed one leaves a row with what it had."""

    def __init__(self, spec: TrialSpec, place: Place, tracker: Tracker | None, progress: Report) -> None:
        self.spec = spec
        self.place = place
        self.tracker = tracker
        self.run_id: str | None = None
        self.clock = measure.Clock()
        self.memory = measure.MemoryWatch(place.device)
        self.trained = Trained()
        self.parameters = (0, 0)
        self.scored = Scored(Scores())
        self.adapter_bytes = 0
        self.boundaries: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.provenance = Provenance(
            num_workers=place.num_workers,
            gpus_per_worker=place.gpus_per_worker,
            hostname=platform.node(),
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._progress = progress
        self._log = place.folder / "metrics.jsonl"

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep metrics in the trial's log and the tracker, and pass them on."""
        if self.place.rank == 0:
            line = {"step": step, "time_s": round(self.clock.total(), 3), **metrics}
            with self._log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            text = ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())
            logger.info("%s: step %d: %s", self.spec.trial_id, step, text)
        if self.tracker is not None:
            self.tracker.log(metrics, step)
        self._progress(metrics, step)

    def failed(self, error: Exception) -> TrialResult:
        """The row of a trial that raised."""
        import torch

        status: Status = "out_of_memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
        text = str(error).strip() or type(error).__name__
        if not isinstance(error, RayPeftError):
            text = f"{type(error).__name__}: {text}\n\n{''.join(traceback.format_exception(error))}"
        return self.result(status, error=text)

    def result(self, status: Status, error: str | None = None) -> TrialResult:
        """The trial's row, with what is known by now."""
        self.memory.stop()
        if self.memory.peaks.spilled_gib:
            logger.warning(
                "%s: %.2f GiB more than the GPU has were in use: they lie in the host's memory, and the trial is slow",
                self.spec.trial_id,
                self.memory.peaks.spilled_gib,
            )
        seconds, trained, peaks = self.clock.seconds, self.trained, self.memory.peaks
        speed = 1 / trained.seconds if trained.seconds > 0 else None
        known = [loss for loss in (*trained.eval_losses, self.scored.scores.eval_loss) if loss is not None]
        return TrialResult(
            trial_id=self.spec.trial_id,
            status=status,
            spec=self.spec,
            scores=self.scored.scores,
            usage=Usage(
                peak_allocated_gib=peaks.allocated_gib,
                peak_reserved_gib=peaks.reserved_gib,
                device_used_gib=peaks.device_used_gib,
                spilled_gib=peaks.spilled_gib,
                peak_rss_gib=peaks.rss_gib,
                wall_time_s=self.clock.total(),
                load_s=seconds.get("load", 0.0),
                train_s=seconds.get("train", 0.0),
                evaluate_s=seconds.get("evaluate", 0.0),
                save_s=seconds.get("save", 0.0),
                tokens_per_s=trained.tokens * speed if speed else None,
                steps_per_s=trained.timed_steps * speed if speed else None,
                train_tokens=trained.tokens,
            ),
            train_loss_final=trained.losses[-1] if trained.losses else None,
            eval_loss_best=min(known, default=None),
            boundary_losses=self.boundaries,
            steps=trained.steps,
            resumed_from_step=trained.resumed_from_step,
            members=self.weights,
            arithmetic=self.spec.method.arithmetic(self.spec.model.dtype),
            trainable_parameters=self.parameters[0],
            total_parameters=self.parameters[1],
            adapter_bytes=self.adapter_bytes,
            mlflow_run_id=self.run_id,
            error=error,
            provenance=self.provenance,
        )


def _run(life: _Life) -> TrialResult:
    spec, place = life.spec, life.place
    place.folder.mkdir(parents=True, exist_ok=True)
    if place.rank == 0 and not [*place.folder.glob("stage*/checkpoint-*"), *place.folder.glob(f"stage*/{STAGE_FILE}")]:
        (place.folder / "metrics.jsonl").unlink(missing_ok=True)  # of an earlier try, which is not gone on with
    if place.threads is not None:
        import torch

        torch.set_num_threads(place.threads)
    if spec.members():
        return _run_ensemble(life)
    with life.clock.phase("load"):
        bench = TASKS[spec.task].load(spec, place.device)
    life.provenance = life.provenance.model_copy(update=_provenance(bench, place))
    life.parameters = (0, bench.parameters()[1])
    stages = spec.method.stages(bench.total_steps())
    if not stages:  # the weights alone
        life.memory.start()
        life.memory.stop()
    _train_all(life, bench, stages)
    if place.rank > 0:
        return life.result("finished")
    if stages:
        with life.clock.phase("save"):
            _save(life, bench)
    with life.clock.phase("evaluate"):
        _evaluate(life, bench)
    for index in range(len(stages)):
        shutil.rmtree(place.folder / f"stage{index + 1}", ignore_errors=True)
        (_stage_folder(place, index) / STAGE_FILE).unlink(missing_ok=True)  # the next run of the trial is a new one
    return life.result("finished")


def _train_all(life: _Life, bench: Bench, stages: list[tuple[Stage, int]]) -> None:
    for index, (stage, steps) in enumerate(stages):
        life.memory.start()
        if not _taken_up(life, bench, index, stage):
            with life.clock.phase("train"):
                _train(life, bench, index, stage, steps)
        life.memory.stop()
        if index + 1 < len(stages):
            _cross(life, bench, index, stage)


def _run_ensemble(life: _Life) -> TrialResult:
    """Bring the members together, tune their weights, and answer; its cost is theirs and its own."""
    spec, place = life.spec, life.place
    rows = _member_rows(spec, place)
    life.memory.start()  # before loading: that all members are held at once is what an ensemble costs
    with tempfile.TemporaryDirectory(prefix="ray_peft_members_") as scratch:
        with life.clock.phase("load"):
            models = [MemberModel(row.spec, _weights(life, row, Path(scratch) / row.trial_id)) for row in rows]
            bench = TASKS[spec.task].load_ensemble(spec, models, place.device)
        life.provenance = life.provenance.model_copy(update=_provenance(bench, place))
        _check_same_rows(rows, bench)
        life.parameters = (sum(row.trainable_parameters for row in rows), bench.parameters()[1])
        life.adapter_bytes = sum(row.adapter_bytes for row in rows)
        with life.clock.phase("evaluate"):
            weights = bench.tune()
            life.weights = {row.trial_id: weight for row, weight in zip(rows, weights, strict=True)}
            life.report({f"weight.{trial}": weight for trial, weight in life.weights.items()}, 0)
            _evaluate(life, bench)
    life.memory.stop()
    result = life.result("finished")
    return result.model_copy(update={"usage": _with_members(result.usage, [row.usage for row in rows])})


def _member_rows(spec: TrialSpec, place: Place) -> list[TrialResult]:
    """The members' rows in the ensemble's order.

    Raises:
        TrialFailed: one has no finished row.
    """
    known = {row.trial_id: row for row in place.members}
    found = []
    for member in spec.members():
        row = known.get(member.trial_id)
        if row is None or row.status != "finished":
            why = f"is {row.status}" if row is not None else "has no row in this sweep's folder"
            raise TrialFailed(f"member {member.trial_id} {why}; an ensemble needs all its members finished")
        found.append(row)
    return found


def _check_same_rows(rows: list[TrialResult], bench: Bench) -> None:
    """Raise TrialFailed if a member was trained on other rows: a trial's id names files, which may have changed."""
    for row in rows:
        if row.provenance.data_key != bench.data_key:
            raise TrialFailed(
                f"member {row.trial_id} was trained on other rows (prepared data {row.provenance.data_key}) than those "
                f"of now ({bench.data_key}), so its training rows may be test rows; run the sweep again with --fresh"
            )


def _weights(life: _Life, row: TrialResult, scratch: Path) -> Path | None:
    """The folder with what a member trained: its own, or brought from the tracker; null if nothing was trained."""
    if not row.adapter_bytes:
        return None
    beside = life.place.folder.parent / row.trial_id / "adapter"
    if beside.is_dir():
        return beside
    assert life.tracker is not None
    assert row.mlflow_run_id is not None
    return life.tracker.fetch(row.mlflow_run_id, "adapter", scratch)


def _with_members(own: Usage, members: list[Usage]) -> Usage:
    """What an ensemble costs: training all members in turn, then holding and asking them together."""

    def largest(name: str) -> float | None:
        return max((value for usage in (own, *members) if (value := getattr(usage, name)) is not None), default=None)

    peaks = {name: largest(name) for name in Usage.model_fields if name.startswith(("peak_", "device_", "spilled_"))}
    return own.model_copy(update={**peaks, "train_s": sum(usage.train_s for usage in members)})


def _train(life: _Life, bench: Bench, index: int, stage: Stage, steps: int) -> None:
    bench.attach(stage)
    life.parameters = bench.parameters()
    done = life.trained
    more = bench.train(stage, steps, done.steps, life.place.folder / f"stage{index + 1}", life.report)
    life.trained = Trained(
        steps=done.steps + more.steps,
        tokens=done.tokens + more.tokens,
        seconds=done.seconds + more.seconds,
        timed_steps=done.timed_steps + more.timed_steps,
        losses=done.losses + more.losses,
        eval_losses=done.eval_losses + more.eval_losses,
        resumed_from_step=more.resumed_from_step if more.resumed_from_step is not None else done.resumed_from_step,
    )


def _stage_folder(place: Place, index: int) -> Path:
    return place.folder / f"stage{index + 1}_adapter"


def _write_stage(life: _Life, folder: Path) -> None:
    """Note that all stages up to this one are done; written last, so that its file vouches for the adapter."""
    done = {"trained": asdict(life.trained), "peaks": asdict(life.memory.peaks), "train_s": life.clock.seconds["train"]}
    partial = folder / f"{STAGE_FILE}.partial"
    partial.write_text(json.dumps(done), encoding="utf-8")
    partial.replace(folder / STAGE_FILE)


def _taken_up(life: _Life, bench: Bench, index: int, stage: Stage) -> bool:
    """Go on from the end of a stage that an interrupted run of the trial left; false if there is none."""
    folder = _stage_folder(life.place, index)
    if not (folder / STAGE_FILE).is_file():
        return False
    done = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
    bench.attach(stage)
    bench.restore(folder)
    life.parameters = bench.parameters()
    life.trained = Trained(**done["trained"])
    life.trained.resumed_from_step = life.trained.steps
    life.memory.peaks = measure.Peaks(**done["peaks"])
    life.clock.seconds["train"] = done["train_s"]
    return True


def _cross(life: _Life, bench: Bench, index: int, stage: Stage) -> None:
    """From one stage to the next: keep what the stage trained, merge it, and measure the loss on both sides."""
    first = life.place.rank == 0
    folder = _stage_folder(life.place, index)
    if first:
        with life.clock.phase("save"):
            if not (folder / STAGE_FILE).is_file():
                _keep(life, bench, folder.name, "float32")  # as it is: the trial may go on from here
                _write_stage(life, folder)
            elif life.tracker is not None:  # taken up: other workers may still read it, and this run has none yet
                life.tracker.artifact(folder, folder.name)
    for moment in (f"after stage {index + 1}", f"after merge {index + 1}"):
        if moment.startswith("after merge"):
            with life.clock.phase("train"):
                bench.merge(stage)
        if first:
            with life.clock.phase("evaluate"):
                life.boundaries[moment] = bench.eval_loss()
            life.report({f"boundary_loss.{moment.replace(' ', '_')}": life.boundaries[moment]}, life.trained.steps)


def _save(life: _Life, bench: Bench) -> None:
    """Save before the evaluation, so that nothing that fails there loses what was trained."""
    life.adapter_bytes = _keep(life, bench, "adapter")


def _keep(life: _Life, bench: Bench, name: str, dtype: Dtype | None = None) -> int:
    """Write what is trained so far into the trial's folder and the tracker; returns its bytes."""
    folder = life.place.folder / name
    bench.save(folder, dtype)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    if life.tracker is not None:
        life.tracker.artifact(folder, name)
        if not (folder / "adapter_config.json").is_file():
            shutil.rmtree(folder)  # full weights are large, and the tracker holds them now
    return size


def _evaluate(life: _Life, bench: Bench) -> None:
    life.scored = bench.evaluate()
    loss = life.scored.scores.eval_loss
    if loss is not None and not math.isfinite(loss):
        raise TrialFailed(f"the held-out loss is {loss} after {life.trained.steps} steps; lower method.lr")
    folder = life.place.folder
    samples = [sample.plain() for sample in life.scored.samples]
    _write_lines(folder / "samples.jsonl", samples)
    answers = [
        {"row": row, "prediction": prediction, "reference": reference}
        for row, (prediction, reference) in enumerate(life.scored.answers)
    ]
    _write_lines(folder / "answers.jsonl", answers)
    scores = {name: value for name, value in life.scored.scores.plain().items() if isinstance(value, float)}
    if scores:
        life.report(scores, life.trained.steps)
    if life.tracker is not None and samples:
        life.tracker.table(samples, "samples.json")
        life.tracker.artifact(folder / "answers.jsonl", "evaluation")
    # Last, so that a benchmark that fails leaves a row with the scores above.
    life.scored = replace(life.scored, scores=bench.benchmark(life.scored.scores))


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _provenance(bench: Bench, place: Place) -> dict[str, Any]:
    return {
        "versions": measure.versions(),
        "device": measure.device_name(place.device),
        "git_commit": measure.git_commit(),
        "model_fingerprint": bench.model_fingerprint,
        "data_key": bench.data_key,
    }


def _release(place: Place) -> None:
    """Give memory back, so that the next trial in this process starts from nothing."""
    gc.collect()
    if place.device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)  # else the next trial's peak would hold this one's freed memory
