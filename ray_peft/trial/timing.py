"""A running trial and the cache of speeds: what it is predicted to take when it starts, what it took when it ends."""

from __future__ import annotations

import logging

from ray_peft.errors import first_line
from ray_peft.tasks.base import Bench
from ray_peft.trial import speed
from ray_peft.trial.life import Life
from ray_peft.trial.result import TrialResult

logger = logging.getLogger(__name__)


def _key(life: Life) -> str:
    return speed.key(life.runs, life.provenance.model_fingerprint, life.provenance.device)


def predict_time(life: Life, bench: Bench) -> None:
    """Keep what time the trial is predicted to take; a prediction that fails is said and stops nothing."""
    try:
        steps = bench.total_steps() if life.runs.method.stages(bench.total_steps()) else 0
        known, on_gpu = speed.read(_key(life)), life.place.device != "cpu"
        life.predicted_s = speed.predicted(life.runs, known, bench.workload(), steps, on_gpu=on_gpu)
    except Exception as error:  # a trial does not depend on its prediction
        logger.warning("%s: no prediction of its time: %s", life.spec.trial_id, first_line(error))


def remember_time(life: Life, bench: Bench, result: TrialResult) -> None:
    """Keep the trial's speed for others of its shape, unless others shared its GPU."""
    if 0 < life.place.gpus_per_worker < 1 or life.lowered:
        return
    try:
        workload = bench.workload()
        points = speed.points_of(life.place.folder / "metrics.jsonl")
        of_trial = speed.measured(result, points, workload) if workload is not None else None
        if of_trial is not None:
            speed.remember(_key(life), of_trial)
    except Exception as error:  # nor is a result lost for it
        logger.warning("%s: its speed is not kept: %s", life.spec.trial_id, first_line(error))
