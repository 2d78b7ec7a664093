"""A check that passed is not made again on the same content, and is on any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import judged
import pytest
import tiny

from ray_peft.checks import rehearsal
from ray_peft.checks.inspector import Inspector
from ray_peft.checks.trials import inspect_trials
from ray_peft.console import Console
from ray_peft.errors import DataError, ModelError
from ray_peft.spec import TrialSpec
from ray_peft.tasks import remembered
from ray_peft.tasks.files import _bytes as files_of_this_process
from ray_peft.tasks.llm_sft.task import LlmSft


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A model, rows and a chat template, and a cache in which a trial on them is remembered."""
    folder = tmp_path_factory.mktemp("remembered")
    tiny.build_model(folder / "model")
    tiny.write_rows(folder / "rows.jsonl", tiny.QUESTIONS)
    (folder / "chat.jinja").write_text(tiny.CHATML)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_PEFT_CACHE", str(folder / "cache"))
        inspect_trials([trial(folder)], Console(quiet=True))
    return folder


@pytest.fixture
def files(planned, tmp_path, monkeypatch):
    """The files of `planned`, to be changed: they are put back afterwards, with their times."""
    shutil.copytree(planned, tmp_path / "kept")
    monkeypatch.setenv("RAY_PEFT_CACHE", str(planned / "cache"))
    files_of_this_process.cache_clear()  # within one, a file of the same size and time is not read again
    yield planned
    files_of_this_process.cache_clear()
    shutil.rmtree(planned)
    shutil.copytree(tmp_path / "kept", planned)


@pytest.fixture
def looked(monkeypatch):
    """What was really looked at, in order."""
    calls = []
    inspect, tried = LlmSft.inspect, rehearsal._tried
    monkeypatch.setattr(LlmSft, "inspect", lambda task, spec: calls.append("inspected") or inspect(task, spec))
    monkeypatch.setattr(rehearsal, "_tried", lambda spec: calls.append("rehearsed") or tried(spec))
    return calls


def trial(folder: Path, **changes) -> TrialSpec:
    plain = tiny.plain_spec(folder / "model", folder / "rows.jsonl", **changes)
    plain["data"]["chat_template"] = str(folder / "chat.jinja")
    return TrialSpec.from_plain(plain)


def check(folder: Path, **changes) -> list[str]:
    return inspect_trials([trial(folder, **changes)], Console(quiet=True)).notes


def test_the_same_content_is_not_looked_at_again(files, looked):
    first, again = Inspector(), Inspector()
    assert again.inspect(trial(files)) == first.inspect(trial(files))
    assert check(files) == check(files, method={"name": "lora", "rank": 4, "lr": 0.02})
    assert looked == []


def test_a_setting_that_decides_a_check_is_looked_at(files, looked):
    check(files, method={"name": "lora", "rank": 4, "targets": ["q_proj"]})
    assert looked == ["inspected", "rehearsed"]


def test_an_objective_that_takes_pairs_apart_is_inspected_by_itself(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path / "cache"))
    rows = tiny.write_rows(tmp_path / "pairs.jsonl", judged.PAIRS)
    heavier = {"train__objective": "kto", "train__preference": {"desirable_weight": 3.0}}
    of_pairs = [{"train__objective": "dpo"}, {"train__objective": "kto"}, heavier]
    trials = [TrialSpec.from_plain(judged.plain_spec(tiny_model, rows, **changes)) for changes in of_pairs]
    for inspector in (Inspector(), Inspector()):  # the second reads what the first has kept
        dpo, kto, weighed = map(inspector.inspect, trials)
        assert [dpo.train_rows, kto.train_rows, weighed.train_rows] == [40, 80, 80]
        assert dpo.data_key == kto.data_key  # prepared rows are pairs
        assert any("weigh 3.00 times" in note for note in weighed.notes)
        assert not any("weigh" in note for note in kto.notes)


def same_size_and_time(file: Path, old: bytes, new: bytes) -> None:
    stat, content = file.stat(), file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("rows.jsonl", b"After one", b"After ONE"),
        ("chat.jinja", b"'<|im_end|>' ", b"'<|IM_end|>' "),
        ("model/config.json", b'"bos_token_id": 256', b'"bos_token_id": 255'),
        ("model/tokenizer_config.json", b"<|pad|>", b"<|PAD|>"),
        ("model/generation_config.json", b"257", b"258"),
        ("model/model.safetensors", b'"format":"pt"', b'"Format":"pt"'),
    ],
)
def test_a_changed_file_is_looked_at(files, looked, name, old, new):
    same_size_and_time(files / name, old, new)
    Inspector().inspect(trial(files))
    assert looked == ["inspected"]


def test_a_new_file_beside_the_model_is_looked_at(files, looked):
    (files / "model" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "other"}))
    with pytest.raises(ModelError, match="is an adapter"):
        check(files)
    assert looked == ["inspected"]


def test_what_was_found_bad_is_found_bad_again(files):
    (files / "rows.jsonl").write_text('{"prompt": "Why?"}\n')
    for _ in range(2):
        with pytest.raises(DataError, match="completion"):
            check(files)


def test_rows_that_the_cache_lost_are_prepared_again(files, looked, monkeypatch):
    monkeypatch.setattr("ray_peft.tasks.llm_sft.task._recent_rows", {})  # as in a process of its own
    shutil.rmtree(files / "cache" / "prepared")
    check(files)
    assert looked == ["inspected"]
    assert list((files / "cache" / "prepared").glob("*/counts.json"))


def test_another_program_looks_again(files, looked, monkeypatch):
    monkeypatch.setattr(remembered, "program", lambda: "of the next release")
    check(files)
    assert looked == ["inspected", "rehearsed"]


def test_a_program_is_its_code_and_what_is_installed(tmp_path, monkeypatch):
    shutil.copytree(remembered.PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(remembered, "PACKAGE", tmp_path / "package")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for change in (
        lambda: None,
        lambda: (tmp_path / "package" / "tasks" / "files.py").write_text("changed = True"),
        lambda: (tmp_path / "torch-9.9.9.dist-info").mkdir(),
    ):
        change()
        remembered.program.cache_clear()
        found.append(remembered.program())
    remembered.program.cache_clear()
    assert len(set(found)) == 3


def test_code_of_a_model_and_benchmarks_are_looked_at_each_time(files):
    assert LlmSft().content(trial(files)) is not None
    assert LlmSft().content(trial(files, model__trust_remote_code=True)) is None
    assert LlmSft().content(trial(files, evaluation__benchmarks={"tasks": ["arc_easy"]})) is None


HEAVY = ("torch", "transformers", "datasets", "peft", "trl", "mlflow", "ray", "matplotlib", "pandas", "scipy")


def test_a_remembered_plan_imports_no_large_library(files):
    space = {"name": "again", **trial(files).plain()}
    (files / "space.yaml").write_text(json.dumps(space))
    code = (
        "import sys; from ray_peft.cli import main; main(['plan', sys.argv[1]]); "
        "print(*sorted(set(sys.argv[2:]) & set(sys.modules)), sep=',')"
    )
    command = [sys.executable, "-c", code, str(files / "space.yaml"), *HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=files)
    assert done.stdout.splitlines()[-2:] == ["1 trials, checked: no weights were loaded", ""], done.stderr
