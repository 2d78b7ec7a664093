"""One trial's life, top to bottom; knows neither Ray nor MLflow."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import shutil
import sys

from ray_peft.engine.recovery import divisor, free_memory
from ray_peft.engine.trained import Report
from ray_peft.errors import first_line
from ray_peft.foundation.seal import SEAL_FILE
from ray_peft.foundation.storage import error_line
from ray_peft.foundation.units import GIB
from ray_peft.foundation.whole import write_text
from ray_peft.spec import TrialSpec
from ray_peft.spec.keys import MICRO_BATCH
from ray_peft.tasks import TASKS, kept_base
from ray_peft.tasks.base import Bench
from ray_peft.trial import warm
from ray_peft.trial.ensembles import run_ensemble
from ray_peft.trial.life import Life, Place, Tracker, evaluate, keep, predict, provenance
from ray_peft.trial.result import DONE, RESULT_FILE, TrialResult
from ray_peft.trial.stages import STAGE_FILE, train_all
from ray_peft.trial.timing import predict_time, remember_time
from ray_peft.trial.waiting import wait_for_memory
from ray_peft.vram.cards import here
from ray_peft.vram.fit import ways

__all__ = ["RESULT_FILE", "STAGE_FILE", "Place", "Tracker", "run"]

logger = logging.getLogger(__name__)

MOST_ADVICE = 3
"""Ways to take less memory that a row names."""

GPU_TRIAL_THREADS = 4
"""CPU threads of torch in a trial on a GPU: its work on the CPU is small, and more threads wait for each other."""


def run(spec: TrialSpec, place: Place, tracker: Tracker, progress: Report) -> TrialResult | None:
    """Run a trial and record its result, whatever happens.

    Args:
        spec: the trial.
        place: its folder, device and rank.
        tracker: used by rank 0 alone.
        progress: called with every logged metric, by every rank.

    Returns:
        The result, failed trials included; None on ranks above 0 once they are done. `untracked` says why the tracker
        lacks it, if it does: a tracker that is away changes nothing else.

    Raises:
        KeyboardInterrupt, SystemExit: passed on after the trial is recorded as cancelled.
        Exception: on ranks above 0 a failure is raised, so that rank 0 does not wait for a lost worker.
    """
    if place.rank > 0:
        _run(Life(spec, place, None, progress))
        return None
    life = Life(spec, place, tracker, progress)
    life.run_id = tracker.start(spec)
    return run_started(life, tracker)


def run_started(life: Life, tracker: Tracker) -> TrialResult:
    """Run a trial whose tracker has its run, and record its result, whatever happens."""
    place = life.place
    try:
        result = _run(life)
    except Exception as error:
        result = life.failed(error)
        logger.warning("%s: %s: %s", life.spec.trial_id, result.status, first_line(result.error))
        kept_base.drop()  # who knows what it has done
    except BaseException:
        _record(life.result("cancelled", error="stopped before the end"), place, tracker)
        raise
    finally:
        release(place)
    if result.status == "out_of_memory":
        result = result.model_copy(update={"error": _with_advice(life, result.error or "")})
    return end(result, place, tracker)


def end(result: TrialResult, place: Place, tracker: Tracker) -> TrialResult:
    """Record a trial's row, and drop the checkpoints of one that is done; returns the row as it was recorded."""
    result = _record(result, place, tracker)
    if result.status in DONE:
        _forget_checkpoints(place)
    return result


def _forget_checkpoints(place: Place) -> None:
    """Remove what a trial would resume or start from. Its row is stored, so the next run of the trial is a new one."""
    warm.forget(place.folder)
    for folder in place.folder.glob("stage*"):
        if folder.name.endswith("_adapter"):
            (folder / STAGE_FILE).unlink(missing_ok=True)
            (folder / SEAL_FILE).unlink(missing_ok=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _with_advice(life: Life, error: str) -> str:
    """Why a trial ran out of memory, and the nearest settings that take less."""
    spec, place = life.runs, life.place
    if place.device == "cpu":
        return error
    import torch

    gpu = here(place.device)
    room = place.gpu_memory_gib or torch.cuda.get_device_properties(place.device).total_memory / GIB
    summary = f"ran out of {room:.1f} GiB of GPU memory"
    if life.process.clock.last == "evaluate":
        return f"{summary} in the evaluation{'' if spec.sharded else ', one row at a time'}\n\n{error}"
    rows = life.lowered.get(MICRO_BATCH)
    share = spec.train.batch_size // spec.resources.num_workers
    try:
        lowest = spec.changed({MICRO_BATCH: divisor(share, rows)}) if rows is not None else spec
        predictor = TASKS[spec.task].predictor(lowest)
        too_much = predictor(lowest, gpu) if predictor is not None else None
        suggestions = ways(lowest, predictor, gpu, room, below=too_much.peak_reserved if too_much is not None else None)
    except Exception as failure:  # the row does not depend on the advice
        logger.warning("%s: no advice: %s: %s", spec.trial_id, type(failure).__name__, failure)
        suggestions = ()
    fitting = [way for way in suggestions if way.fits][:MOST_ADVICE] or suggestions[:1]
    advice = "; ".join(way.line() for way in fitting) or "a smaller model or a larger GPU"
    return f"{summary}{f' with {rows} rows a pass' if rows is not None else ''}; what takes less: {advice}\n\n{error}"


def _record(result: TrialResult, place: Place, tracker: Tracker) -> TrialResult:
    """Write the row into the trial's folder and the tracker; the returned row says why the tracker lacks it, if so."""
    return _written(tracker.record(_written(result, place)), place)


def _written(result: TrialResult, place: Place) -> TrialResult:
    """Write the row into the trial's folder, and return it; a full disk does not keep it from the driver."""
    try:
        place.folder.mkdir(parents=True, exist_ok=True)
        write_text(place.folder / RESULT_FILE, result.model_dump_json(indent=2))
    except OSError as error:
        logger.warning("%s: %s", result.trial_id, error_line(error, place.folder))
    return result


def _run(life: Life) -> TrialResult:
    spec, place = life.spec, life.place
    prepare_folder(place)
    task = TASKS[spec.task]
    kept_base.drop(unless=task.base_key(life.runs, place.device))
    take_place(place)
    if spec.members():
        return run_ensemble(life)
    if life.live is not None:
        life.live.check()
    with life.process.clock.phase("load"):
        bench = task.load(life.runs, place.device)
    loaded(life, bench)
    if place.rank == 0:
        predict_time(life, bench)
    stages = spec.method.stages(bench.total_steps())
    if not stages:  # the weights alone
        life.process.memory.start()
        life.process.memory.stop()
    train_all(life, bench, stages)
    if place.rank > 0:
        if bench.shared:
            bench.follow(saves=bool(stages))
        return life.result("finished")
    if stages:
        with life.process.clock.phase("save"):
            save(life, bench)
    if place.device != "cpu":
        life.process.evaluation_memory.start()
    with life.process.clock.phase("evaluate"):
        evaluate(life, bench)
    result = life.result("finished")
    remember_time(life, bench, result)
    return result


def prepare_folder(place: Place) -> None:
    """Make the trial's folder, without the log of an earlier attempt that it does not go on from."""
    place.folder.mkdir(parents=True, exist_ok=True)
    if place.rank == 0 and not [*place.folder.glob("stage*/checkpoint-*"), *place.folder.glob(f"stage*/{STAGE_FILE}")]:
        (place.folder / "metrics.jsonl").unlink(missing_ok=True)


def loaded(life: Life, bench: Bench) -> None:
    """Note what is known of a trial once its model and its rows are there."""
    place = life.place
    life.provenance = life.provenance.model_copy(update=provenance(bench, place))
    life.parameters = (0, bench.parameters()[1])
    life.storage, life.four_bit_share = bench.storage(), bench.four_bit_share()
    life.lowered = bench.lowered
    bench.costs = life.costs
    if life.live is not None:
        life.live.steps = bench.total_steps()
    if place.rank == 0 and place.device != "cpu":
        predict(life, bench)


def take_place(place: Place) -> None:
    """Use as many threads as the trial holds cores, and wait until its memory is free."""
    if place.threads is not None:
        import torch

        torch.set_num_threads(place.threads if place.device == "cpu" else min(place.threads, GPU_TRIAL_THREADS))
    if place.needed_gib is not None and place.device != "cpu":
        context = here(place.device).context / GIB
        wait_for_memory(place.device, place.needed_gib, context)


def save(life: Life, bench: Bench) -> None:
    """Save before the evaluation, so that nothing that fails there loses what was trained."""
    life.adapter_bytes = keep(life, bench, "adapter")


def release(place: Place) -> None:
    """Give memory back, so that the next trial in this process starts from nothing."""
    try:
        _free(place)
    except Exception as error:  # a broken CUDA context fails here once more; the row says what broke it
        logger.warning("memory could not be given back: %s: %s", type(error).__name__, first_line(error))


def _free(place: Place) -> None:
    if place.device != "cpu":
        import torch

        torch._C._cuda_clearCublasWorkspaces()  # one a stream, which would stay for ever
    free_memory(place.device)
    if place.device == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)  # else the next trial's peak would hold this one's freed memory
