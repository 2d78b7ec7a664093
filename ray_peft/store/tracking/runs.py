"""Runs of a store: sweeps and what can be done to any run. Every call may be repeated without harm."""

from __future__ import annotations

import contextlib
import json
import posixpath
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Container, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ray_peft.errors import TrackingError, first_line
from ray_peft.foundation.masking import mask, masked_keys
from ray_peft.spec import TrialSpec
from ray_peft.store.tracking.inputs import DataSet, data_sets
from ray_peft.store.tracking.store import (
    FIRST_CONTACT_S,
    PATIENCE_S,
    MissingError,
    Store,
    connect,
    first_contact,
    insist,
    is_server,
)
from ray_peft.trial.result import TrialResult

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run, RunTag

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

_MAX_TAG_CHARACTERS = 5000
_MAX_NAME_CHARACTERS = 250


def start_sweep(store: Store, name: str, *, tags: Mapping[str, str], files: Mapping[str, str]) -> str:
    """Create the run above a sweep's trials and return its id.

    Args:
        store: Where.
        name: The sweep's name.
        tags: Further tags.
        files: Artifact path -> text.

    Raises:
        TrackingError: the store does not take it.
    """
    client = connect(store.uri)
    run_id = create_run(client, store, name, {"ray_peft.sweep": name, **tags})
    for artifact_file, content in files.items():
        insist(store, f"store {artifact_file}", partial(client.log_text, run_id, content, artifact_file))
    return run_id


def is_there(store: Store, run_id: str) -> bool:
    """True if a run exists and is not deleted.

    Raises:
        TrackingError: the store does not answer.
    """
    client = connect(store.uri)
    try:
        run = insist(store, f"read run {run_id}", partial(client.get_run, run_id))
    except MissingError:
        return False
    return bool(run.info.lifecycle_stage == "active" and run.info.experiment_id == store.experiment_id)


def close_open(store: Store, parent_run_id: str, why: str, but: Container[str]) -> int:
    """Close runs below a sweep's run that nobody writes to any more, as KILLED; returns how many.

    Args:
        store: Where.
        parent_run_id: The sweep's run.
        why: The reason.
        but: Ids of runs to leave open.

    Raises:
        TrackingError: the store does not answer.
    """
    client = connect(store.uri)
    query = f"attributes.status = 'RUNNING' and tags.`mlflow.parentRunId` = '{parent_run_id}'"
    search = partial(client.search_runs, [store.experiment_id], query, max_results=1000)
    left = [run for run in insist(store, "find open runs", search) if run.info.run_id not in but]
    for run in left:
        close(client, store, run, "KILLED", why)
    return len(left)


def close_if_open(store: Store, run_id: str, why: str) -> None:
    """Close a run as KILLED, if it is still open.

    Raises:
        TrackingError: the store does not answer, or has no such run.
    """
    client = connect(store.uri)
    run = insist(store, f"read run {run_id}", partial(client.get_run, run_id))
    if run.info.status == "RUNNING":
        close(client, store, run, "KILLED", why)


def move_below(store: Store, run_ids: Iterable[str], parent_run_id: str) -> None:
    """Put runs, those of them that are there, below another run.

    Raises:
        TrackingError: the store does not answer.
    """
    client = connect(store.uri)
    for run_id in run_ids:
        if is_there(store, run_id):
            move = partial(client.set_tag, run_id, "mlflow.parentRunId", parent_run_id)
            insist(store, f"move run {run_id}", move)


def store_of(uri: str, run_id: str) -> Store:
    """The store and experiment that hold a run.

    Raises:
        TrackingError: the store does not answer, or has no such run.
    """
    if is_server(uri):
        first_contact(uri)
    until = time.monotonic() + FIRST_CONTACT_S
    client = connect(uri, until)
    run = insist(uri, f"read run {run_id}", partial(client.get_run, run_id), until)
    experiment = insist(uri, "read its experiment", partial(client.get_experiment, run.info.experiment_id), until)
    return Store(uri, str(experiment.experiment_id), experiment.name, str(experiment.artifact_location))


def finish_sweep(
    store: Store,
    run_id: str,
    status: RunStatus,
    *,
    metrics: Mapping[str, float],
    files: Mapping[str, Path],
    results: Iterable[TrialResult] = (),
    patience_s: float = PATIENCE_S,
) -> None:
    """Store a sweep's summary and close its run.

    Args:
        store: Where.
        run_id: What `start_sweep` returned.
        status: How it ended.
        metrics: Numbers of the whole sweep.
        files: Artifact path -> a file, or a folder whose content goes there.
        results: Of the trials, whose data sets are the sweep's, too.
        patience_s: How long all of it is tried while the store is away.

    Raises:
        TrackingError: a file is missing, or the store does not take it.
    """
    until = time.monotonic() + patience_s
    client = connect(store.uri, until)
    log = partial(client.log_batch, run_id, metrics=points(metrics, 0))
    insist(store, "store the sweep's metrics", log, until)
    log_data_sets(client, store, run_id, [data for result in results for data in data_sets(result)], until)
    for artifact_path, path in files.items():
        upload(client, store, run_id, path, artifact_path, until)
    insist(store, "close the sweep", partial(client.set_terminated, run_id, status), until)


def log_data_sets(
    client: MlflowClient, store: Store, run_id: str, sets: Iterable[DataSet], until: float | None = None
) -> None:
    """Say which data a run was trained and scored on; equal ones once.

    Raises:
        TrackingError: the store does not take it.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(data.name, data.digest, data.source_type, data.source, profile=data.profile),
            [InputTag("mlflow.data.context", data.context)],
        )
        for data in dict.fromkeys(sets)
    ]
    if inputs:
        insist(store, "store the data sets", partial(client.log_inputs, run_id, datasets=inputs), until)


def load_spec(uri: str, run_id: str) -> TrialSpec:
    """The spec of the trial that a run recorded, under the id that it had there.

    Raises:
        TrackingError: the store, the run or its spec.json is missing, the spec does not fit this version, or it cannot
            be run again, since its credentials are masked.
    """
    with tempfile.TemporaryDirectory() as folder:
        text = fetch(uri, run_id, "spec.json", Path(folder)).read_text(encoding="utf-8")
    run = insist(uri, f"read run {run_id}", partial(connect(uri).get_run, run_id))
    try:
        plain = json.loads(text)
        spec = TrialSpec.from_plain(plain)
    except ValueError as error:
        raise TrackingError(f"spec.json of run {run_id} is no trial of this version of ray_peft: {error}") from None
    if masked := masked_keys(plain):
        keys = ", ".join(f"{key} ({value})" for key, value in masked.items())
        raise TrackingError(
            f"run {run_id} cannot be run again or exported: its spec.json has credentials masked, in {keys}; "
            "run it from the YAML file that holds them"
        )
    members = _member_ids(uri, run_id) if spec.members() else ()
    return spec.under(run.data.tags.get("ray_peft.trial_id", spec.trial_id), members)


def _member_ids(uri: str, run_id: str) -> tuple[str, ...]:
    """The ids of what an ensemble's run is made of, in order; none if it left no row, or failed before."""
    with contextlib.suppress(TrackingError), tempfile.TemporaryDirectory() as folder:
        row = json.loads(fetch(uri, run_id, "result.json", Path(folder)).read_text(encoding="utf-8"))
        return tuple(row.get("members", ()))
    return ()


def fetch(uri: str, run_id: str, artifact: str, to: Path) -> Path:
    """Bring an artifact, or a folder of them, of a trial's run below `to` and return its path there.

    Raises:
        TrackingError: the store, the run or the artifact is missing.
    """
    if is_server(uri):
        first_contact(uri)
    client = connect(uri)
    what = f"read run {run_id}"
    names = [entry.path for entry in insist(uri, what, partial(client.list_artifacts, run_id), time.monotonic() + 5)]
    if artifact not in names:
        raise TrackingError(
            f"run {run_id} in {mask(uri)} has no {artifact} (found: {', '.join(names) or 'no artifacts'}); "
            "give the run of a trial, not of a sweep, on a machine that sees the artifacts"
        )
    to.mkdir(parents=True, exist_ok=True)
    return Path(insist(uri, what, partial(client.download_artifacts, run_id, artifact, str(to))))


def create_run(
    client: MlflowClient,
    store: Store,
    name: str,
    tags: Mapping[str, str],
    *,
    token: str | None = None,
    again: bool = False,
    until: float | None = None,
) -> str:
    """Create one run, also if an answer of the store gets lost and the call is repeated; returns its id.

    Args:
        client: Of the store.
        store: Where.
        name: The run's.
        tags: Its own.
        token: By which the run is known if the call must be repeated; None makes one.
        again: True if an earlier call with this token may have created it.
        until: Last moment of a repetition, as for `insist`.

    Raises:
        TrackingError: the store does not take it.
    """
    start, attempts = token or uuid.uuid4().hex, int(again)
    source = {"mlflow.source.name": f"ray-peft: {tags.get('ray_peft.sweep', name)}", "mlflow.source.type": "LOCAL"}
    all_tags = {tag.key: tag.value for tag in run_tags({**source, **tags, "ray_peft.start": start})}

    def create() -> str:
        nonlocal attempts
        attempts += 1
        if attempts > 1:
            for run in client.search_runs([store.experiment_id], f"tags.`ray_peft.start` = '{start}'"):
                return str(run.info.run_id)
        return str(client.create_run(store.experiment_id, tags=all_tags, run_name=name).info.run_id)

    return insist(store, f"create run {name!r}", create, until)


def running(
    client: MlflowClient,
    store: Store,
    parent_run_id: str | None,
    trial_id: str,
    sweep: str | None,
    until: float | None = None,
) -> list[Run]:
    """The open runs of a trial, the newest first.

    Args:
        client: Of the store.
        store: Where.
        parent_run_id: The sweep's run; None asks for runs without one.
        trial_id: The trial.
        sweep: Only runs with this sweep's name; None does not ask.
        until: Last moment of a repetition, as for `insist`.

    Raises:
        TrackingError: the store does not answer.
    """
    query = f"attributes.status = 'RUNNING' and tags.`ray_peft.trial_id` = '{trial_id}'"
    if parent_run_id is not None:
        query += f" and tags.`mlflow.parentRunId` = '{parent_run_id}'"
    search = partial(client.search_runs, [store.experiment_id], query, max_results=1000)
    runs = insist(store, f"find runs of trial {trial_id}", search, until)
    return [
        run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent_run_id
        and sweep in (None, run.data.tags.get("ray_peft.sweep"))
    ]


def close(
    client: MlflowClient, store: Store, run: Run, status: RunStatus, why: str, until: float | None = None
) -> None:
    """End a run that its own process cannot end any more.

    Raises:
        TrackingError: the store does not take it.
    """
    run_id, what = run.info.run_id, f"close run {run.info.run_id}"
    state = {"FINISHED": "finished", "KILLED": "cancelled"}.get(status, "failed")
    tags = run_tags({"ray_peft.status": state, "ray_peft.error": first_line(why)})
    insist(store, what, partial(client.log_batch, run_id, tags=tags), until)
    insist(store, what, partial(client.log_text, run_id, mask(why), "error.txt"), until)
    insist(store, what, partial(client.set_terminated, run_id, status), until)


def upload(
    client: MlflowClient, store: Store, run_id: str, path: Path, artifact_path: str, until: float | None = None
) -> None:
    """Store a file as `artifact_path`, or a folder's content in the artifact folder `artifact_path`.

    Raises:
        TrackingError: nothing is at `path`, or the store does not take it.
    """
    what = f"store {path}"
    if path.is_dir():
        insist(store, what, partial(client.log_artifacts, run_id, str(path), artifact_path or None), until)
        return
    if not path.is_file():
        raise TrackingError(f"cannot store {path} as {artifact_path!r} in MLflow: no such file or folder")
    folder, name = posixpath.split(artifact_path.lstrip("/"))
    with tempfile.TemporaryDirectory() as scratch:
        if name != path.name:
            path = Path(shutil.copy(path, Path(scratch) / name))
        insist(store, what, partial(client.log_artifact, run_id, str(path), folder or None), until)


def points(metrics: Mapping[str, float], step: int, at_ms: int | None = None) -> list[Metric]:
    """Metrics as MLflow takes them, of a moment (None: of now); characters that it refuses in names become `_`."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000) if at_ms is None else at_ms
    return [Metric(_metric_name(name), float(value), now, int(step)) for name, value in metrics.items()]


def run_tags(tags: Mapping[str, str]) -> list[RunTag]:
    """Tags as MLflow takes them: masked, cut to its limit, without empty ones."""
    from mlflow.entities import RunTag

    return [RunTag(name, mask(value)[:_MAX_TAG_CHARACTERS]) for name, value in tags.items() if value]


def _metric_name(name: str) -> str:
    name = re.sub(r"[^\w\-. :/]", "_", name)[:_MAX_NAME_CHARACTERS]
    if posixpath.normpath(name) != name or name.startswith(("/", "..")) or name == ".":
        name = ("_" + name.replace("/", "_"))[:_MAX_NAME_CHARACTERS]
    return name
