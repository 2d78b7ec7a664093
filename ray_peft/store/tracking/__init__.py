"""The only package that imports mlflow: sweeps and trials become runs, and a run gives its trial's spec back.

Every call names its store through `MlflowClient`, so threads and several stores live in one process. Importing this
package does not import mlflow.
"""

from ray_peft.store.tracking.closed import is_closed
from ray_peft.store.tracking.registry import Promoted, find_run, promote
from ray_peft.store.tracking.runs import (
    RunStatus,
    close_if_open,
    close_open,
    fetch,
    finish_sweep,
    is_there,
    load_spec,
    move_below,
    start_sweep,
    store_of,
)
from ray_peft.store.tracking.sending import is_sent, send, sent_to
from ray_peft.store.tracking.store import (
    AwayError,
    MissingError,
    Store,
    default_uri,
    is_server,
    open_store,
    sqlite_file,
)
from ray_peft.store.tracking.trial_run import TrialTracker
from ray_peft.store.tracking.ui import ui_command, ui_environment

__all__ = [
    "AwayError",
    "MissingError",
    "Promoted",
    "RunStatus",
    "Store",
    "TrialTracker",
    "close_if_open",
    "close_open",
    "default_uri",
    "fetch",
    "find_run",
    "finish_sweep",
    "is_closed",
    "is_sent",
    "is_server",
    "is_there",
    "load_spec",
    "move_below",
    "open_store",
    "promote",
    "send",
    "sent_to",
    "sqlite_file",
    "start_sweep",
    "store_of",
    "ui_command",
    "ui_environment",
]
