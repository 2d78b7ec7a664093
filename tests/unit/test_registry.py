"""A trial's weights become a version of a registered model; runs name their data sets, their source and their group."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tracked import client_of, result_of, settle, spec_of, tracker_of

from ray_peft.errors import TrackingError
from ray_peft.metrics.scores import Scores
from ray_peft.store.tracking import Store, default_uri, finish_sweep, open_store, promote, start_sweep
from ray_peft.store.tracking.inputs import data_sets, group_of
from ray_peft.trial.result import Provenance


@pytest.fixture
def store(empty_database: Path, tmp_path: Path) -> Store:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return open_store(default_uri(tmp_path), "comparison", tmp_path / "artifacts")


def test_trained_weights_are_registered_once_and_found_by_their_alias(store, tmp_path):
    import mlflow

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 4}')
    runs = {}
    for seed in (1, 2):
        spec = spec_of(seed)
        tracker = tracker_of(tmp_path, store, None)
        runs[spec.trial_id] = tracker.start(spec)
        if seed == 1:
            tracker.artifact(tmp_path / "adapter", "adapter")
        tracker.record(result_of(spec))
        settle(tracker)
    first, second = runs
    promoted = promote(store.uri, first, "answers")
    assert (promoted.version, promoted.run_id, promoted.trial_id) == ("1", runs[first], first)
    assert promote(store.uri, runs[first], "answers") == promoted  # by its run, and no second version
    mlflow.set_tracking_uri(store.uri)
    fetched = Path(mlflow.artifacts.download_artifacts(promoted.uri, dst_path=str(tmp_path / "back")))
    assert json.loads((fetched / "adapter_config.json").read_text()) == {"r": 4}
    with pytest.raises(TrackingError, match=f"trial {second} .* has no adapter"):
        promote(store.uri, second, "answers")
    with pytest.raises(TrackingError, match="no run and no finished trial 'lora-nothere'"):
        promote(store.uri, "lora-nothere", "answers")


def test_runs_name_their_data_sets_source_and_group(store, tmp_path):
    parent = start_sweep(store, "which", tags={}, files={})
    spec = spec_of(1)
    tracker = tracker_of(tmp_path, store, parent)
    run_id = tracker.start(spec)
    commit = "a" * 40
    result = result_of(spec, scores=Scores(rouge_l=0.5), provenance=Provenance(git_commit=f"{commit}+dirty"))
    tracker.record(result)
    settle(tracker)
    finish_sweep(store, parent, "FINISHED", metrics={}, files={}, results=[result, result])
    client = client_of(store)
    run, sweep = client.get_run(run_id), client.get_run(parent)
    contexts = [[entry.tags[0].value for entry in mlflow_run.inputs.dataset_inputs] for mlflow_run in (run, sweep)]
    assert [sorted(context) for context in contexts] == [["testing", "training"]] * 2
    assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == {"dolly"}
    assert run.data.tags["mlflow.source.name"].startswith("ray-peft: ")
    assert run.data.tags["mlflow.source.git.commit"] == commit
    assert run.data.tags["group"] == group_of(spec)
    assert sweep.data.tags["mlflow.source.name"] == "ray-peft: which"


def test_seeds_share_a_group_and_other_rows_are_another_data_set():
    assert group_of(spec_of(1)) == group_of(spec_of(2)) != group_of(spec_of(1, path="other.jsonl"))
    result = result_of(spec_of(1))
    changed = result.model_copy(update={"provenance": Provenance(data_key="other")})
    assert [data.context for data in data_sets(result)] == ["training", "testing"]
    assert not {data.digest for data in data_sets(result)} & {data.digest for data in data_sets(changed)}
