"""What is known of a trial while it runs: its place, its tracker, its measurements, and the row they make."""

from __future__ import annotations

import json
import logging
import math
import platform
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from ray_peft.engine.finite import ways_out
from ray_peft.engine.recovery import is_out_of_memory
from ray_peft.engine.trained import Costs, Report, Trained
from ray_peft.errors import RayPeftError, TrialCancelled, TrialFailed, TrialStopped
from ray_peft.foundation.measured import to_json
from ray_peft.foundation.storage import error_line, is_full
from ray_peft.methods.base import ENOUGH_STEPS, Dtype
from ray_peft.metrics.scores import Scores
from ray_peft.spec import TrialSpec
from ray_peft.tasks.base import Bench, Scored
from ray_peft.tasks.image_files import IMAGES, write_images
from ray_peft.tasks.one_model import ADAPTER_CONFIG
from ray_peft.trial.clock import Clock, ShareClock
from ray_peft.trial.live import Live
from ray_peft.trial.log import MetricLog
from ray_peft.trial.peaks import MemoryWatch, Peaks, larger_peaks
from ray_peft.trial.provenance import device_name, git_commit, gpu_number, versions
from ray_peft.trial.result import RESTARTS_FILE, Provenance, Status, TrialResult, Usage

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where a trial's metrics and results go."""

    def start(self, spec: TrialSpec) -> str | None:
        """Open the trial's run and return its id; None if that must wait. Never raises."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep metrics of one step. Never raises."""

    def artifact(self, path: Path, folder: str, *, remove: bool = False) -> None:
        """Keep a file, or all files of a folder, which then goes if it is to `remove`; that may happen later."""

    def table(self, rows: list[dict[str, object]], artifact_file: str) -> None:
        """Keep a table that the tracker can show."""

    def fetch(self, run_id: str, folder: str, to: Path) -> Path:
        """Another run's artifacts in `folder`, brought below `to`. Raises if they are not there."""

    def record(self, result: TrialResult) -> TrialResult:
        """Keep the result and close the run; the row says its run, and why it is `untracked` if it is. Never raises."""


@dataclass(frozen=True)
class Place:
    """Where a trial runs."""

    folder: Path
    """The trial's own folder: metrics.jsonl, what is behind its scores (samples.jsonl, answers.jsonl, losses.jsonl,
    benchmarks.jsonl), images and checkpoints."""
    device: str
    """"cpu" or "cuda:N"."""
    rank: int = 0
    num_workers: int = 1
    gpus_per_worker: float = 0.0
    threads: int | None = None
    """CPU threads of torch; None leaves them as they are."""
    members: tuple[TrialResult, ...] = ()
    """Of an ensemble, the rows of its members that have one; their folders are beside `folder`."""
    chosen: Mapping[str, int | bool] = field(default_factory=dict)
    """What `train.fit: auto` chose for the trial, by key."""
    gpu_memory_gib: float | None = None
    """What the trial may take of its GPU, the CUDA context included; None is all of it."""
    needed_gib: float | None = None
    """What of the GPU must be free before it starts; None where nothing predicts it."""


class Process:
    """What belongs to the process that runs trials: its clock and its memory."""

    def __init__(self, device: str) -> None:
        self.clock = Clock()
        self.memory = MemoryWatch(device)
        self.evaluation_memory = MemoryWatch(device)

    def of_a_member(self) -> Process:
        """For one of several trials in this process: its share of the seconds, and the memory of them all."""
        own = Process(self.memory.device)
        own.clock = ShareClock()
        own.memory = SharedWatch(self.memory)
        return own


class SharedWatch(MemoryWatch):
    """The peaks of a process for one of its trials, which neither starts nor stops the watch."""

    def __init__(self, whole: MemoryWatch) -> None:
        super().__init__(whole.device)
        self._whole = whole

    def start(self) -> None:
        """The process has started it."""

    def stop(self) -> None:
        """The process goes on."""

    def so_far(self) -> Peaks:
        """The peaks of the process."""
        return replace(self._whole.so_far())


class LifeCosts(Costs):
    """A trial's seconds, peaks and logged points over all its attempts."""

    def __init__(self, process: Process, log: MetricLog | None, live: Live | None = None) -> None:
        self._clock, self._memory, self._log, self._live = process.clock, process.memory, log, live
        self._earlier: dict[str, Any] = {}
        self.tokens = 0
        """That the stage was trained on up to its last logged step."""
        self.complete = True
        """False if a checkpoint did not say what came before it."""

    def seconds(self) -> dict[str, float]:
        """By phase."""
        own, earlier = self._clock.so_far(), self._earlier.get("seconds", {})
        return {name: own.get(name, 0.0) + earlier.get(name, 0.0) for name in own | earlier}

    def trained_for(self, seconds: float) -> None:
        """Give the clock this attempt's part of them."""
        self._clock.note("train", seconds - float(self._earlier.get("seconds", {}).get("train", 0.0)))

    def evaluated_for(self, seconds: float) -> None:
        """Add them to the phase, which goes on after that."""
        self._clock.note("evaluate", self._clock.so_far().get("evaluate", 0.0) + seconds)

    def wall_s(self) -> float:
        """Seconds over all attempts, without what was done twice: from a checkpoint to the end of its attempt."""
        return self._clock.total() + float(self._earlier.get("wall_s", 0.0))

    def peaks(self) -> Peaks:
        """Of each kind, the largest peak of all attempts."""
        return larger_peaks(self._memory.so_far(), Peaks(**self._earlier.get("peaks", {})))

    def so_far(self) -> dict[str, Any]:
        """All of these as JSON-like data."""
        return {
            "seconds": self.seconds(),
            "wall_s": self.wall_s(),
            "peaks": asdict(self.peaks()),
            "complete": self.complete,
            "log": self._log.so_far() if self._log is not None else [],
        }

    def restore(self, earlier: dict[str, Any]) -> None:
        """Count from an earlier attempt's `so_far`; a later call replaces it."""
        self._earlier = earlier
        self.complete = bool(earlier.get("complete", True))
        if self._log is not None:
            self._log.restore(earlier.get("log"))

    def saving(self) -> AbstractContextManager[None]:
        """Counts as the phase "save"."""
        return self._clock.phase("save")

    def count(self, step: int, tokens: int) -> None:
        """Tell those who watch."""
        self.tokens = tokens
        if self._live is not None:
            self._live.count(step, tokens)

    def incomplete(self) -> None:
        """Note that a checkpoint does not say what the steps before it took."""
        self.complete = False
        if self._log is not None:
            self._log.restore(None)


class Life:
    """What is known of a trial so far, so that a failed trial leaves a row with what it had measured."""

    def __init__(
        self,
        spec: TrialSpec,
        place: Place,
        tracker: Tracker | None,
        progress: Report,
        process: Process | None = None,
    ) -> None:
        self.spec = spec
        self.runs = spec.changed(place.chosen) if place.chosen else spec
        """The trial with what was chosen for it; its row and its id are those of `spec`."""
        self.place = place
        self.tracker = tracker
        self.run_id: str | None = None
        self.process = process or Process(place.device)
        self._log: MetricLog | None = None
        """What rank 0 logs."""
        if place.rank == 0:
            self._log = MetricLog(place.folder / "metrics.jsonl", self._track)
        self.live: Live | None = None
        """What rank 0 tells while the trial runs."""
        if place.rank == 0:
            self.live = Live(place.folder, spec, place.device, place.gpu_memory_gib)
            self.live.phase = lambda: self.process.clock.last
        self.costs = LifeCosts(self.process, self._log, self.live)
        self.trained = Trained()
        self.parameters = (0, 0)
        self.scored = Scored(Scores())
        self.adapter_bytes = 0
        self.storage: dict[str, int] = {}
        self.four_bit_share: float | None = None
        self.boundaries: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.predicted: dict[str, float] = {}
        self.pack_size = 1
        self._reported: list[tuple[int, dict[str, float]]] = []
        """What this attempt has reported: step and metrics."""
        self.predicted_s: dict[str, float] = {}
        self.lowered: dict[str, int] = {}
        self.provenance = Provenance(
            num_workers=place.num_workers,
            gpus_per_worker=place.gpus_per_worker,
            hostname=platform.node(),
            gpu=gpu_number(place.device),
            started_at=_moment(),
        )
        self._progress = progress

    def begin_again(self, process: Process) -> None:
        """Start over from the last checkpoint, in the same run: what was measured since then counts no more."""
        self.process = process
        if self._log is not None:
            self._log.begin_again()
        self.costs = LifeCosts(process, self._log, self.live)
        self.trained, self.lowered, self.pack_size, self._reported = Trained(), {}, 1, []

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep metrics in the trial's log and the tracker, and pass them on."""
        if self._log is not None:
            self._log.add(metrics, step, self.costs.wall_s())
            text = ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())
            logger.info("%s: step %d: %s", self.spec.trial_id, step, text)
        if self.live is not None:
            self.live.log(metrics, step)
        self._reported.append((step, dict(metrics)))
        self._progress(metrics, step)
        self.check()

    def check(self) -> None:
        """End the trial if somebody wants that.

        Raises:
            TrialCancelled, TrialStopped: somebody does.
        """
        if self.live is not None:
            self.live.check()

    def _track(self, metrics: Mapping[str, float], step: int) -> None:
        if self.tracker is not None:
            self.tracker.log(metrics, step)

    def _restarts(self) -> list[str]:
        """Why earlier attempts ended, as whoever started this one has noted."""
        path = self.place.folder / RESTARTS_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def failed(self, error: Exception) -> TrialResult:
        """The row of a trial that raised."""
        status: Status = "out_of_memory" if is_out_of_memory(error) else "failed"
        if isinstance(error, TrialCancelled):
            status = "cancelled"
        if isinstance(error, TrialStopped):
            status, self.trained = "stopped_early", self._trained_so_far()
        text = str(error).strip() or type(error).__name__
        if isinstance(error, OSError) and error.errno is not None:
            text = f"cannot read or write {error_line(error, self.place.folder)}"
        elif is_full(error):
            text = f"cannot write into {self.place.folder}: no space left; free some space, or use another --out"
        elif not isinstance(error, RayPeftError):
            text = f"{type(error).__name__}: {text}"
        if not isinstance(error, RayPeftError):
            text += f"\n\n{''.join(traceback.format_exception(error))}"
        return self.result(status, error=text)

    def _trained_so_far(self) -> Trained:
        """What a trial that ends inside a stage has trained, as it has reported it."""
        losses = [metrics["train_loss"] for _, metrics in self._reported if "train_loss" in metrics]
        eval_losses = [metrics["eval_loss"] for _, metrics in self._reported if "eval_loss" in metrics]
        steps = max((step for step, _ in self._reported), default=0)
        tokens = self.trained.tokens + self.costs.tokens
        return Trained(steps=steps, tokens=tokens, losses=losses, eval_losses=eval_losses)

    def result(self, status: Status, error: str | None = None) -> TrialResult:
        """The trial's row, with what is known by now."""
        if self.live is not None:
            self.live.close()
        self.process.memory.stop()
        self.process.evaluation_memory.stop()
        seconds, trained, peaks = self.costs.seconds(), self.trained, self.costs.peaks()
        if peaks.spilled_gib:
            logger.warning(
                "%s: %.2f GiB more than the GPU has were in use: they lie in the host's memory, and the trial is slow",
                self.spec.trial_id,
                peaks.spilled_gib,
            )
        speed = 1 / trained.seconds if trained.seconds > 0 else None
        known = [loss for loss in (*trained.eval_losses, self.scored.scores.eval_loss) if loss is not None]
        finite = [loss for loss in known if math.isfinite(loss)]
        return TrialResult(
            trial_id=self.spec.trial_id,
            status=status,
            spec=self.spec,
            scores=self.scored.scores,
            usage=Usage(
                peak_allocated_gib=peaks.allocated_gib,
                peak_reserved_gib=peaks.reserved_gib,
                evaluation_allocated_gib=self.process.evaluation_memory.peaks.allocated_gib,
                device_used_gib=peaks.device_used_gib,
                spilled_gib=peaks.spilled_gib,
                peak_rss_gib=peaks.rss_gib,
                wall_time_s=self.costs.wall_s(),
                load_s=seconds.get("load", 0.0),
                train_s=seconds.get("train", 0.0),
                evaluate_s=seconds.get("evaluate", 0.0),
                save_s=seconds.get("save", 0.0),
                tokens_per_s=trained.tokens * speed if speed and trained.tokens else None,
                steps_per_s=trained.timed_steps * speed if speed else None,
                # Of all steps, those of this run were timed.
                images_per_s=trained.images * trained.timed_steps / trained.steps * speed
                if speed and trained.images
                else None,
                train_tokens=trained.tokens,
                train_images=trained.images,
                complete=self.costs.complete,
            ),
            train_loss_final=trained.losses[-1] if trained.losses else None,
            eval_loss_best=min(finite, default=None),
            boundary_losses=self.boundaries,
            steps=trained.steps,
            resumed_from_step=trained.resumed_from_step,
            restarts=self._restarts(),
            passes=trained.passes,
            pack_size=self.pack_size,
            members=self.weights,
            arithmetic=self.spec.method.arithmetic(self.spec.model.dtype, self.four_bit_share, self.spec.quantization),
            chosen=dict(self.place.chosen),
            lowered=dict(self.lowered),
            predicted=self.predicted,
            predicted_s=self.predicted_s,
            trainable_parameters=self.parameters[0],
            total_parameters=self.parameters[1],
            adapter_bytes=self.adapter_bytes,
            storage=self.storage,
            four_bit_share=self.four_bit_share,
            mlflow_run_id=self.run_id,
            error=error,
            provenance=self.provenance.model_copy(update={"ended_at": _moment()}),
        )


def predict(life: Life, bench: Bench) -> None:
    """Record the memory that the trial is predicted to take; a prediction that fails is logged and stops nothing."""
    try:
        prediction = bench.predicted()
    except Exception as error:  # a trial does not depend on its prediction
        logger.warning("%s: no memory prediction: %s: %s", life.spec.trial_id, type(error).__name__, error)
        return
    if prediction is not None:
        life.predicted = prediction.gib()
        if life.live is not None:
            life.live.predicted_gib = life.predicted["peak_reserved_gib"]
        logger.info("%s: predicted peak %.2f GiB", life.spec.trial_id, life.predicted["peak_allocated_gib"])


def keep(life: Life, bench: Bench, name: str, dtype: Dtype | None = None) -> int:
    """Write what is trained so far into the trial's folder and the tracker; returns its bytes."""
    folder = life.place.folder / name
    bench.save(folder, dtype)
    size = bench.stored_bytes(folder)
    if life.tracker is not None:
        # Full weights are large: they go once the tracker holds them.
        life.tracker.artifact(folder, name, remove=not (folder / ADAPTER_CONFIG).is_file())
    return size


def evaluate(life: Life, bench: Bench) -> None:
    """Score the model; keep scores and what is behind them in the trial's folder and the tracker.

    Raises:
        TrialFailed: the held-out loss is not finite.
    """
    life.scored = bench.evaluate()
    loss = life.scored.scores.eval_loss
    if loss is not None and not math.isfinite(loss):
        stages = life.runs.method.stages(max(life.trained.steps, ENOUGH_STEPS))
        last = stages[-1][0] if stages else None
        raise TrialFailed(f"the held-out loss is {loss} after {life.trained.steps} steps; {ways_out(life.runs, last)}")
    folder = life.place.folder
    samples = [sample.plain() for sample in life.scored.samples]
    _write_lines(folder / "samples.jsonl", samples)
    _write_lines(folder / "answers.jsonl", _answers(life.scored))
    if losses := _row_losses(life.scored):
        _write_lines(folder / "losses.jsonl", losses)
    if rewards := [entry.plain() for entry in life.scored.rewards]:
        _write_lines(folder / "rewards.jsonl", rewards)
    reported = _report_scores(life, {})
    if life.tracker is not None and samples:
        life.tracker.table(samples, "samples.json")
        life.tracker.artifact(folder / "answers.jsonl", "evaluation")
    if life.tracker is not None and losses:
        life.tracker.artifact(folder / "losses.jsonl", "evaluation")
    if life.tracker is not None and rewards:
        life.tracker.artifact(folder / "rewards.jsonl", "evaluation")
    # What follows comes last, so that images or a benchmark that fail leave a row with the scores above.
    life.scored = bench.illustrate(life.scored)
    if life.scored.images:
        write_images(life.scored.images, folder / IMAGES)
        _report_scores(life, reported)
        if life.tracker is not None:
            life.tracker.artifact(folder / IMAGES, IMAGES)
    life.scored = bench.benchmark(life.scored)
    _keep_questions(life)


def _keep_questions(life: Life) -> None:
    """Keep what the further benchmarks gave to each question."""
    file = life.place.folder / "benchmarks.jsonl"
    file.unlink(missing_ok=True)  # of an attempt before this one
    if not life.scored.questions:
        return
    _write_lines(file, [question.plain() for question in life.scored.questions])
    if life.tracker is not None:
        life.tracker.artifact(file, "evaluation")


def _answers(scored: Scored) -> list[dict[str, Any]]:
    """The lines of `answers.jsonl`: each answered row with what is known of its answer."""
    lines: list[dict[str, Any]] = []
    for row, (prediction, reference) in enumerate(scored.answers):
        line: dict[str, Any] = {"row": row, "prediction": prediction, "reference": reference}
        line |= {"prompt": scored.prompts[row]} if scored.prompts else {}
        line |= {"ended": scored.ended[row]} if scored.ended else {}
        line |= {"own": {name: values[row] for name, values in scored.own.items()}} if scored.own else {}
        lines.append(line)
    return lines


def _row_losses(scored: Scored) -> list[dict[str, Any]]:
    """The lines of `losses.jsonl`: `RowLoss` of every held-out row that has a loss."""
    rows: list[dict[str, Any]] = [{"row": row, "loss": loss} for row, loss in enumerate(scored.losses)]
    if not scored.loss_tokens:
        return rows
    weighed = zip(rows, scored.loss_tokens, strict=True)
    return [{**row, "tokens": tokens} for row, tokens in weighed if tokens]


def _report_scores(life: Life, known: Mapping[str, float]) -> dict[str, float]:
    """Report the scores that are not `known`; returns them all."""
    scores = {name: value for name, value in life.scored.scores.plain().items() if isinstance(value, float)}
    if new := {name: value for name, value in scores.items() if name not in known}:
        life.report(new, life.trained.steps)
    return scores


def _moment() -> str:
    """Now, as a row says it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(to_json(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def provenance(bench: Bench, place: Place) -> dict[str, Any]:
    """With what a result is made: the fields of `Provenance` that the bench and this machine know."""
    return {
        "versions": versions(),
        "device": device_name(place.device),
        "git_commit": git_commit(),
        "model_fingerprint": bench.model_fingerprint,
        "data_key": bench.data_key,
    }
