"""The end of a sweep: its report is in the folder and in MLflow."""

import json
import shutil

import example_sweep
from mlflow import MlflowClient

from ray_peft.console import Console
from ray_peft.report.files import Sweep
from ray_peft.schedule.experiment import open_experiment
from ray_peft.space.read import ReportSpec
from ray_peft.store.ledger import Ledger
from ray_peft.store.tracking import default_uri, open_store


def test_the_report_is_kept_with_the_sweeps_run(tmp_path, empty_database):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    store = open_store(default_uri(tmp_path), "which_method", tmp_path / "artifacts")
    folder = example_sweep.build(tmp_path / "out", seeds=(1,), rows=5)
    (folder / "sweep.json").unlink()
    report = ReportSpec(loss_steps=(10, 300))
    ledger = Ledger(folder)
    planned = [result.trial_id for result in ledger.results()]
    opened = open_experiment(
        "which_method",
        "Which?",
        ledger,
        store=store,
        planned=planned,
        notes=[],
        console=Console(quiet=True),
        report=report,
    )
    assert Sweep.model_validate_json((folder / "sweep.json").read_bytes()).report == report
    assert ledger.read_record() == opened.record
    assert len(opened.finish(planned, interrupted=False)) == len(planned)
    client = MlflowClient(store.uri)
    kept = {found.path for found in client.list_artifacts(opened.parent_run_id)}
    assert kept == {"report.md", "report.html", "report.csv", "results.jsonl", "plots"}
    plots = {found.path for found in client.list_artifacts(opened.parent_run_id, "plots")}
    assert plots == {f"plots/{path.name}" for path in (folder / "plots").iterdir()}
    assert "plots/losses.svg" in plots
    assert "| Step 10 | Step 300 |" in (folder / "report.md").read_text()


def test_records_of_sweeps_without_a_report_setting_can_be_read(tmp_path):
    old = {"name": "n", "description": "", "notes": [], "planned": ["a"], "parent_run_id": None, "tracking_uri": ""}
    (tmp_path / "sweep.json").write_text(json.dumps(old))
    record = Ledger(tmp_path).read_record()
    assert record is not None
    assert record.report == {}
    assert Sweep.model_validate_json((tmp_path / "sweep.json").read_bytes()).report == ReportSpec()


def test_another_sweep_in_the_same_folder_gets_a_run_of_its_own(tmp_path, empty_database):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    store = open_store(default_uri(tmp_path), "one", tmp_path / "artifacts")
    ledger = Ledger(tmp_path / "out")
    ledger.folder.mkdir()

    def parent(name):
        quiet = Console(quiet=True)
        return open_experiment(name, "", ledger, store=store, planned=[], notes=[], console=quiet).parent_run_id

    first = parent("one")
    assert parent("one") == first  # the same command again
    assert parent("two") != first
