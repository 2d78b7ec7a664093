"""Code and names that come from elsewhere: asked for again, or refused before they become a path."""

from __future__ import annotations

import json

import pytest
import tiny
from pydantic import ValidationError

from ray_peft.cli import main
from ray_peft.errors import DataError, SpecError
from ray_peft.foundation.names import one_part
from ray_peft.metrics.scores import ImageFile
from ray_peft.report.files import write_report
from ray_peft.spec import TrialSpec
from ray_peft.store.consent import check_consent
from ray_peft.store.ledger import Ledger
from ray_peft.store.tracking import TrialTracker, default_uri, load_spec, open_store
from ray_peft.tasks.llm_sft.benchmarks import check
from ray_peft.trial.result import TrialResult

BAD = ["../../etc", "a/b", "a\\b", "", "..", ". .", "c:x", "a\0b", "a\nb", "x" * 300]


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_name_of_one_file_is_refused(name):
    with pytest.raises(ValueError, match="not a path"):
        one_part(name)


def test_names_of_our_own_and_of_people_pass():
    for name in ("lora-1a2b3c4d", "p00_s0.png", "..a", "画.png", "a b"):
        assert one_part(name) == name


def test_a_results_file_of_somebody_else_reads_no_file_outside(tmp_path):
    spec = TrialSpec.from_plain(tiny.plain_spec("org/tiny", "a.jsonl"))
    plain = TrialResult(trial_id=spec.trial_id, status="failed", spec=spec).plain()
    for changes in ({"trial_id": "../outside"}, {"members": {"../outside": 1.0}}):
        (tmp_path / "results.jsonl").write_text(json.dumps(plain | changes) + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"results.jsonl: line 1: .*must be the name of one file"):
            write_report(tmp_path)
    (tmp_path / "results.jsonl").write_text(json.dumps(plain) + "\n", encoding="utf-8")
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "x", "planned": ["../outside"]}), encoding="utf-8")
    with pytest.raises(DataError, match=r"sweep.json: planned.0: .*must be the name of one file"):
        write_report(tmp_path)
    with pytest.raises(ValidationError, match="must be the name of one file"):
        ImageFile(prompt="a", seed=0, file="../../secret.png")
    with pytest.raises(ValueError, match="must be the name of one file"):
        Ledger(tmp_path).trial_folder("../outside")


def test_a_record_of_somebody_else_is_one_error(tmp_path):
    from ray_peft.errors import SearchSpaceError

    (tmp_path / "sweep.json").write_text('{"title": "x"}', encoding="utf-8")
    with pytest.raises(SearchSpaceError, match=r"sweep.json: is no record of a sweep .* use --fresh"):
        Ledger(tmp_path).read_record()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__trust_remote_code": True}, "model.trust_remote_code: true, for org/tiny"),
        (
            {"evaluation__benchmarks": {"tasks": ["humaneval"], "allow_code_execution": True}},
            "evaluation.benchmarks.allow_code_execution: true",
        ),
    ],
)
def test_a_run_s_remote_code_is_asked_for_again(tmp_path, empty_database, capsys, changes, words):
    spec = TrialSpec.from_plain(tiny.plain_spec("org/tiny", "a.jsonl", **changes))
    with pytest.raises(SpecError) as caught:
        check_consent(spec, "r1", trust_remote_code=False)
    assert str(caught.value).startswith(f"run r1 says {words}: Python code from there")
    check_consent(spec, "r1", trust_remote_code=True)
    uri = stored(spec, empty_database, tmp_path)[0]
    run_id = stored(spec, empty_database, tmp_path)[1]
    for command in (["run", "--mlflow-run", run_id, "--out", str(tmp_path / "o")], ["export", run_id]):
        assert main([*command, "--tracking-uri", uri]) == 2
        assert "then give --trust-remote-code" in capsys.readouterr().err
    # With leave it goes on, to the next thing that is missing.
    assert main(["export", run_id, "--tracking-uri", uri, "--trust-remote-code", "--out", str(tmp_path / "e")]) == 2
    assert "trust-remote-code" not in capsys.readouterr().err


def stored(spec, empty_database, folder) -> tuple[str, str]:
    """A store with one run of the trial: its URI and the run's id."""
    if not (folder / "mlflow.db").exists():
        (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    store = open_store(default_uri(folder), "x", folder / "artifacts")
    tracker = TrialTracker(store, None, "x", folder / "trial")
    run_id = tracker.start(spec)
    tracker.record(TrialResult(trial_id=spec.trial_id, status="failed", spec=spec))
    return store.uri, run_id


def test_a_run_whose_credentials_are_masked_says_that_it_cannot_be_run_again(tmp_path, empty_database):
    from ray_peft.errors import TrackingError

    path = "https://me:secret@host/rows.jsonl"
    spec = TrialSpec.from_plain(tiny.plain_spec("org/tiny", path))
    uri, run_id = stored(spec, empty_database, tmp_path)
    with pytest.raises(
        TrackingError, match=r"masked, in data.sources.0.path \(https://\*\*\*@host/rows.jsonl\)"
    ) as told:
        load_spec(uri, run_id)
    assert "secret" not in str(told.value)


def test_task_files_that_run_python_ask_for_leave(tmp_path, tiny_model, questions):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "mine.yaml").write_text("task: mine\ninclude: base\n", encoding="utf-8")
    (tasks / "base").write_text("dataset_path: json\n# !function in a comment\n", encoding="utf-8")
    asked = {"tasks": ["mine"], "include_path": str(tasks)}
    spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, evaluation__benchmarks=asked))

    def told() -> str:
        with pytest.raises((SpecError, DataError)) as caught:
            check(spec)
        return str(caught.value)

    assert "allow_code_execution" not in told()  # it lacks other things
    (tasks / "base").write_text("dataset_path: json\nprocess_docs: !function mine.docs\n", encoding="utf-8")
    (tasks / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef docs(rows): return rows\n")
    assert "base: line 2: !function mine.docs runs Python code when the file is read" in told()
    assert "allow_code_execution: true (found false)" in told()
    assert not (tmp_path / "ran").exists()
    (tasks / "base").write_text("x: [\nprocess_docs: !function mine.docs\n", encoding="utf-8")  # no valid YAML
    assert "!function mine.docs runs Python code" in told()
