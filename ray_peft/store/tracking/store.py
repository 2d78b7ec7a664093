"""One MLflow store: its URI, its creation, and calls that are repeated until the store takes them.

SQLite keeps its default journal: three processes with 50 batches each lost nothing with it nor with a write-ahead
log and took equally long (mlflow 3.17 waits up to 20 s for a lock), and that log breaks on network file systems.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ray_peft.errors import TrackingError
from ray_peft.foundation.locks import locked
from ray_peft.foundation.masking import mask

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

PATIENCE_S = 60.0
"""How long a call is repeated before it counts as lost."""
FIRST_CONTACT_S = 4.0
"""How long a server may take for its first answer."""

# mlflow's own retries would wait for minutes and may create a run twice, so they are off; a user's setting wins.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    # It prints the run's address with the credentials in it.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_FINAL_CODES = {
    "CUSTOMER_UNAUTHORIZED",
    "ENDPOINT_NOT_FOUND",
    "INVALID_PARAMETER_VALUE",
    "PERMISSION_DENIED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
}
# The part of a long message that says what happened: the system's, the connection's or the database's words.
_CAUSE = re.compile(r"\[Errno -?\d+\] ([^'\")]+)|((?:Read|connect) timed? ?out)|\(sqlite3\.\w+\) (.+)")


class MissingError(TrackingError):
    """The store answers, and has no such run."""


class AwayError(TrackingError):
    """The store does not answer, or is busy for too long: it may take the same later."""


@dataclass(frozen=True, repr=False)
class Store:
    """One experiment of one tracking store; travels to Ray workers. Its text hides the URI's credentials."""

    uri: str
    experiment_id: str
    experiment: str
    artifact_location: str
    """Where the experiment's runs keep their artifacts, as the store answers."""

    def __repr__(self) -> str:
        return f"experiment {self.experiment!r} in {mask(self.uri)}"


def default_uri(outputs: Path) -> str:
    """The URI of a SQLite store inside the folder `outputs`."""
    return f"sqlite:///{(outputs.expanduser().absolute() / 'mlflow.db').as_posix()}"


def open_store(uri: str, experiment: str, artifact_root: Path | None) -> Store:
    """The experiment named `experiment`, created with its SQLite file if need be; call it before workers start.

    Args:
        uri: `sqlite:///FILE`, or the http(s) address of an MLflow server.
        experiment: Name of the experiment.
        artifact_root: Folder of the artifacts of a new experiment in SQLite, `mlartifacts` beside the file if None;
            a server decides for itself.

    Raises:
        TrackingError: the store cannot be used, or the experiment is deleted.
    """
    if is_server(uri):
        first_contact(uri)
        return _open_experiment(uri, experiment, None)
    path = sqlite_file(uri)
    root = (artifact_root or path.parent / "mlartifacts").expanduser().absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock")):
            if path.exists():
                _check_sqlite(path)
            else:
                _create_sqlite(path, root)
            return _open_experiment(f"sqlite:///{path}", experiment, root.as_uri())
    except OSError as error:
        raise TrackingError(f"cannot write the tracking store {path}: {error}; choose another folder") from None


def connect(uri: str, until: float | None = None) -> MlflowClient:
    """A client of an existing store.

    Args:
        uri: Of the store.
        until: Last moment of a repetition, as for `insist`.

    Raises:
        TrackingError: the SQLite file does not exist on this machine, is of another version of MLflow, or cannot be
            opened.
    """
    if not is_server(uri):
        path = sqlite_file(uri)
        # mlflow would create a second, empty store here.
        if not path.exists():
            raise AwayError(
                f"no tracking store at {path} on {socket.gethostname()}; put the outputs on a folder that all "
                "machines share, or use the http:// address of an MLflow server"
            )
        uri = f"sqlite:///{path}"
        _check_schema(path)
    import_mlflow()
    from mlflow import MlflowClient

    return insist(uri, "open it", partial(MlflowClient, tracking_uri=uri), until)


def insist(store: Store | str, what: str, call: Callable[[], T], until: float | None = None) -> T:
    """The result of `call`, repeated while the store is away or busy.

    Args:
        store: The store, or its URI, for messages.
        what: What the call does, as in "cannot <what>".
        call: Safe to repeat.
        until: Last moment of a repetition on the monotonic clock; None is `PATIENCE_S` from now.

    Raises:
        TrackingError: the store refused, or did not answer in time.
    """
    until = time.monotonic() + PATIENCE_S if until is None else until
    pause = 0.1
    while True:
        try:
            return call()
        except failures() as error:
            if "out-of-date database schema" in str(error):  # where a check at the start could not see it
                raise TrackingError(_other_schema(mask(store if isinstance(store, str) else store.uri))) from None
            if _is_final(error) or time.monotonic() + pause > until:
                where = mask(store) if isinstance(store, str) else repr(store)
                missing = getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"
                kind = MissingError if missing else TrackingError if _is_final(error) else AwayError
                raise kind(
                    f"cannot {what} in the tracking store ({where}): {reason(error)}. "
                    "Check that the store is there, may be written and has space left"
                ) from None
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def failures() -> tuple[type[Exception], ...]:
    """What a call of mlflow raises when a store fails; `requests` raises subclasses of OSError."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


def reason(error: Exception) -> str:
    """One masked line that says why a call failed."""
    text = str(error)
    cause = _CAUSE.search(text)
    line = next(filter(None, cause.groups())) if cause else (text.splitlines() or [type(error).__name__])[0]
    return mask(line)[:300].rstrip(". ")


def is_server(uri: str) -> bool:
    """True if a URI is the address of an MLflow server."""
    return uri.startswith(("http://", "https://"))


def sqlite_file(uri: str) -> Path:
    """The absolute path in a SQLite URI.

    Raises:
        TrackingError: the URI is of another kind, or MLflow cannot open such a path.
    """
    name = uri.removeprefix("sqlite:///")
    if name == uri or name in ("", ":memory:"):
        raise TrackingError(
            f"tracking URI {mask(uri)!r} is neither sqlite:///FILE nor http(s)://HOST:PORT; for another database, "
            "run `mlflow server --backend-store-uri ...` and give its address"
        )
    path = Path(name).expanduser().absolute()
    # SQLAlchemy 2.1 reads both as parts of a URI, and mlflow 3.17 makes folders by the text as it stands.
    if "%" in str(path) or "?" in str(path):
        raise TrackingError(f"MLflow cannot keep a SQLite file at {path}: choose a path without % and ?")
    return path


def first_contact(uri: str) -> None:
    """Check that an MLflow server answers, without waiting long.

    Raises:
        TrackingError: nothing answers, it refuses, or it is no MLflow server.
    """
    import_mlflow()
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    shown = mask(uri)
    way_out = "start the server, correct the address, or leave it out to use a local SQLite file"
    credentials: Callable[[str], object] = get_default_host_creds  # untyped in mlflow 3.17
    ask = partial(http_request, credentials(uri), "/api/2.0/mlflow/experiments/search", "POST")
    try:
        answer = ask(json={"max_results": 1}, max_retries=0, timeout=FIRST_CONTACT_S, raise_on_status=False)
        status, body = answer.status_code, answer.text
    except failures() as error:
        raise TrackingError(f"no MLflow server answers at {shown} ({reason(error)}); {way_out}") from None
    if status in (401, 403):
        raise TrackingError(
            f"the MLflow server at {shown} refuses access (HTTP {status}); set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, here and on the workers"
        )
    if status != 200 or not body.lstrip().startswith("{"):
        raise TrackingError(f"what answers at {shown} is not a working MLflow server (HTTP {status}); {way_out}")


def _open_experiment(uri: str, name: str, artifact_location: str | None) -> Store:
    from mlflow.exceptions import MlflowException

    client, what = connect(uri), f"open experiment {name!r}"
    find = partial(client.get_experiment_by_name, name)
    until = time.monotonic() + FIRST_CONTACT_S
    experiment = insist(uri, what, find, until)
    if experiment is None:
        try:
            client.create_experiment(name, artifact_location)
        except MlflowException as error:
            # Another process may have created it in between.
            if insist(uri, what, find, until) is None:
                raise TrackingError(f"cannot create experiment {name!r} in {mask(uri)}: {reason(error)}") from None
        experiment = insist(uri, what, find, until)
    assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {name!r} in {mask(uri)} is deleted; choose another name, or restore it: "
            f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        )
    return Store(uri, str(experiment.experiment_id), name, str(experiment.artifact_location))


def _check_sqlite(path: Path) -> None:
    try:
        with closing(sqlite3.connect(path, timeout=20)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        raise TrackingError(f"{path} cannot be used as a tracking store: {error}; choose another file") from None
    if not os.access(path, os.W_OK):
        raise TrackingError(f"the tracking store {path} may not be written by this user; choose another file")


def _check_schema(path: Path) -> None:
    """Compare the file's schema with that of the installed MLflow, which would not say which of the two is older.

    Raises:
        TrackingError: they differ.
    """
    with contextlib.suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        if row is not None and row[0] not in _known_schemas():
            raise TrackingError(
                f"the tracking store {path} was written by a newer version of MLflow (schema {row[0]}) than the "
                f"one here ({version('mlflow')}): update MLflow, or choose another store with --tracking-uri"
            )
        if row is not None and row[0] != _known_schemas()[0]:
            raise TrackingError(_other_schema(f"sqlite:///{path}"))


def _other_schema(uri: str) -> str:
    return (
        f"the tracking store {uri} has the schema of another version of MLflow than the one here "
        f"({version('mlflow')}). Make a backup of it, then run: mlflow db upgrade {uri}   "
        "(or choose another store with --tracking-uri)"
    )


@cache
def _known_schemas() -> tuple[str, ...]:
    """The schemas that the installed MLflow has had, its own first."""
    import_mlflow()
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from mlflow.store import db_migrations

    config = Config()
    config.set_main_option("script_location", str(Path(db_migrations.__file__).parent))
    return tuple(script.revision for script in ScriptDirectory.from_config(config).walk_revisions())


def _create_sqlite(path: Path, artifact_root: Path) -> None:
    """Build the schema beside `path` and move it there, so that a killed process leaves no half of it."""
    import_mlflow()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    fresh = path.with_name(path.name + ".new")
    for left in (fresh, fresh.with_name(fresh.name + "-journal")):
        left.unlink(missing_ok=True)
    create: Any = SqlAlchemyStore  # untyped in mlflow 3.17
    create(f"sqlite:///{fresh.as_posix()}", artifact_root.as_uri()).engine.dispose()
    fresh.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the system frees it if the process dies."""
    with ExitStack() as holding:
        try:
            holding.enter_context(locked(path, PATIENCE_S))
        except TimeoutError:
            raise TrackingError(f"another process has held {path} for {PATIENCE_S:.0f} s; end it") from None
        yield


def _is_final(error: Exception) -> bool:
    """True if a repetition cannot help."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    return getattr(error, "error_code", None) in _FINAL_CODES


def import_mlflow() -> None:
    """Import mlflow without telemetry, and keep its migrations and its own reports of errors off the console."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    logging.getLogger("alembic").setLevel(logging.WARNING)
    # It prints a traceback for every busy moment of a database; `insist` repeats the call and reports the last error.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
