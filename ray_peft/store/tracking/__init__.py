"""The only package that imports mlflow: sweeps and trials become runs, and a run gives its trial's spec back.

Every call names its store through `MlflowClient`, so threads and several stores live in one process. Importing this
package does not import mlflow.
"""

from ray_peft.store.tracking.closed import is_closed
from ray_peft.store.tracking.runs import RunStatus, close_orphan, fetch, finish_sweep, load_spec, start_sweep
from ray_peft.store.tracking.store import Store, default_uri, open_store
from ray_peft.store.tracking.trial_run import TrialTracker
from ray_peft.store.tracking.ui import ui_command, ui_environment

__all__ = [
    "RunStatus",
    "Store",
    "TrialTracker",
    "close_orphan",
    "default_uri",
    "fetch",
    "finish_sweep",
    "is_closed",
    "load_spec",
    "open_store",
    "start_sweep",
    "ui_command",
    "ui_environment",
]
