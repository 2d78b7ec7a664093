"""Which fine-tuning method for my model, my data and my GPU? Answered by experiment.

Three calls:

    ray_peft.plan("search_spaces/quickstart.yaml")     the trials, checked, without weights or GPU
    ray_peft.sweep("search_spaces/quickstart.yaml")    all trials, and one comparison
    ray_peft.run(spec)                                 one trial
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_peft.schedule.plan import plan
    from ray_peft.schedule.single import run
    from ray_peft.schedule.sweep import SweepOutcome, sweep
    from ray_peft.spec import TrialSpec
    from ray_peft.trial.result import TrialResult

__version__ = "0.2.0"
__all__ = ["SweepOutcome", "TrialResult", "TrialSpec", "__version__", "plan", "run", "sweep"]

_HOMES = {
    "run": "ray_peft.schedule.single",
    "sweep": "ray_peft.schedule.sweep",
    "plan": "ray_peft.schedule.plan",
    "SweepOutcome": "ray_peft.schedule.sweep",
    "TrialResult": "ray_peft.trial.result",
    "TrialSpec": "ray_peft.spec",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import ray_peft` alone is cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ray_peft' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
