"""A trial's weights as a version of a registered model, under the alias `best`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ray_peft.errors import TrackingError
from ray_peft.foundation.masking import mask
from ray_peft.store.tracking.store import MissingError, connect, first_contact, insist, is_server

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ALIAS = "best"
WEIGHTS = "adapter"
"""The artifact folder that holds what a trial trained: its adapter, or all weights."""
_MOST = 1000


@dataclass(frozen=True, kw_only=True)
class Promoted:
    """A registered version."""

    name: str
    version: str
    run_id: str
    trial_id: str

    @property
    def uri(self) -> str:
        """By which MLflow finds it: `mlflow.artifacts.download_artifacts` takes it."""
        return f"models:/{self.name}@{ALIAS}"


def promote(uri: str, trial: str, name: str) -> Promoted:
    """Register what a trial trained as a new version of a model, and let the alias `best` name it.

    A trial that is the newest version already gets no second one.

    Args:
        uri: the tracking store, which holds the registry as well.
        trial: an MLflow run's id, or a trial's id; of several finished runs of a trial the newest is taken.
        name: of the registered model, which is created if it is not there.

    Raises:
        TrackingError: the store does not answer, or has no such finished trial with weights.
    """
    if is_server(uri):
        first_contact(uri)
    client = connect(uri)
    run = run_of(client, uri, trial)
    run_id, trial_id = run.info.run_id, run.data.tags.get("ray_peft.trial_id", trial)
    what = f"register {trial_id} as {name!r}"
    names = [entry.path for entry in insist(uri, what, partial(client.list_artifacts, run_id))]
    if WEIGHTS not in names:
        raise TrackingError(
            f"trial {trial_id} (run {run_id}) has no {WEIGHTS} in {mask(uri)}; the model without fine-tuning and "
            "ensembles have no weights of their own: give a trial that trained"
        )
    try:
        insist(uri, what, partial(client.get_registered_model, name))
    except MissingError:
        insist(uri, what, partial(client.create_registered_model, name))
    version = _version_of(client, uri, name, run_id)
    if version is None:
        tags = {"ray_peft.trial_id": trial_id, "ray_peft.method": run.data.tags.get("ray_peft.method", "")}
        source = f"{run.info.artifact_uri}/{WEIGHTS}"
        create = partial(client.create_model_version, name, source, run_id=run_id, tags=tags)
        version = str(insist(uri, what, create).version)
    insist(uri, what, partial(client.set_registered_model_alias, name, ALIAS, version))
    return Promoted(name=name, version=version, run_id=run_id, trial_id=trial_id)


def _version_of(client: MlflowClient, uri: str, name: str, run_id: str) -> str | None:
    """The version that a run has already; None if it has none."""
    search = partial(client.search_model_versions, f"name = '{name}'")
    versions = [entry for entry in insist(uri, f"read versions of {name!r}", search) if entry.run_id == run_id]
    return str(versions[0].version) if versions else None


def find_run(uri: str, trial: str) -> str:
    """The id of a trial's MLflow run.

    Args:
        uri: the tracking store.
        trial: a run's id, or a trial's id; of several finished runs of a trial the newest is taken.

    Raises:
        TrackingError: the store does not answer, or has no such finished trial.
    """
    if is_server(uri):
        first_contact(uri)
    return str(run_of(connect(uri), uri, trial).info.run_id)


def run_of(client: MlflowClient, uri: str, trial: str) -> Run:
    """The run of that id, or the newest finished run of the trial."""
    with contextlib.suppress(MissingError, TrackingError):
        return insist(uri, f"read run {trial}", partial(client.get_run, trial))
    experiments = [
        entry.experiment_id
        for entry in insist(uri, "list experiments", partial(client.search_experiments, max_results=_MOST))
    ]
    query = f"attributes.status = 'FINISHED' and tags.`ray_peft.trial_id` = '{trial}'"
    search = partial(client.search_runs, experiments, query, max_results=1, order_by=["attributes.start_time DESC"])
    runs = insist(uri, f"find trial {trial}", search)
    if not runs:
        raise TrackingError(
            f"{mask(uri)} has no run and no finished trial {trial!r}; give a trial's id from the report, or the id of "
            "its MLflow run"
        )
    return runs[0]
