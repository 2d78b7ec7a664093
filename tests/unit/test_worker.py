"""What a worker process leaves for the next trial."""

import tiny

from ray_peft.schedule import worker
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import TrialResult


def test_a_process_goes_on_after_a_failed_trial():
    """A new one takes five seconds; only a GPU that no longer answers asks for it."""
    spec = TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d"))
    worker.raise_if_broken(TrialResult(trial_id=spec.trial_id, status="failed", spec=spec, error="diverged"))
