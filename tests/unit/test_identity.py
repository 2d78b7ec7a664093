"""Which trials are the same one: settings that decide a result, and the content of files, wherever they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny

from ray_peft.checks.trials import inspect_trials
from ray_peft.console import Console
from ray_peft.errors import SpecError
from ray_peft.foundation.strict import Strict
from ray_peft.methods import METHODS
from ray_peft.methods.base import Method, Quantization
from ray_peft.methods.ensemble import Member
from ray_peft.methods.lora import LoRA
from ray_peft.spec import (
    BenchmarksSpec,
    ContaminationSpec,
    DataSpec,
    EvaluationSpec,
    ImageDataSpec,
    ImageEvaluationSpec,
    ImageTrainSpec,
    LlmTrainSpec,
    ModelSpec,
    ResourcesSpec,
    SourceSpec,
    TrialSpec,
)
from ray_peft.spec.defaults import DEFAULTS
from ray_peft.spec.identity import differing, settings

SPECS = [
    ModelSpec, SourceSpec, ContaminationSpec, DataSpec, BenchmarksSpec, EvaluationSpec, LlmTrainSpec, ResourcesSpec,
    ImageDataSpec, ImageTrainSpec, ImageEvaluationSpec, Quantization, Member, *METHODS,
]  # fmt: skip


def settled(model: Path, rows: Path, method=None, **changes) -> TrialSpec:
    """A trial under the id of its content."""
    trial = TrialSpec.from_plain(tiny.plain_spec(model, rows, method, **changes)).located()
    (found,) = inspect_trials([trial], Console(quiet=True)).trials
    return found


def named(**changes) -> TrialSpec:
    """A trial of which nothing was read."""
    return TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d", **changes))


@pytest.fixture
def moved(tiny_model, questions, tmp_path) -> tuple[Path, Path]:
    """The same model and rows in another folder, under other names."""
    shutil.copytree(tiny_model, tmp_path / "copied")
    shutil.copy(questions, tmp_path / "other.jsonl")
    return tmp_path / "copied", tmp_path / "other.jsonl"


def test_the_same_files_elsewhere_are_the_same_trial(tiny_model, questions, moved, tmp_path, monkeypatch):
    one = settled(tiny_model, questions)
    assert settled(*moved).trial_id == one.trial_id
    monkeypatch.chdir(tmp_path)
    assert settled(Path("copied"), Path("./other.jsonl")).trial_id == one.trial_id


FILES = {
    "other.jsonl": ("What comes after one", "What follows one"),
    "copied/tokenizer_config.json": ('"eos_token": "<|im_end|>"', '"eos_token": "<|im_start|>"'),
    "copied/config.json": ('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'),
    "template.jinja": ("<|im_start|>", "<<"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_changed_file_is_another_trial(moved, file):
    model, rows = moved
    template = rows.with_name("template.jinja")
    template.write_text(tiny.CHATML)
    before = settled(model, rows, data__chat_template=str(template))
    changed = rows.parent / file
    old, new = FILES[file]
    assert old in changed.read_text()
    changed.write_text(changed.read_text().replace(old, new))
    assert settled(model, rows, data__chat_template=str(template)).trial_id != before.trial_id


SAME = [
    {"resources__cpus_per_worker": 1},
    {"resources__gpus_per_worker": None},
    {"resources__num_workers": 2},
    {"train__checkpoint_every": 2},
    {"train__checkpoint_every": "90 seconds"},
    {"train__checkpoint_every": None},
    {"evaluation__samples": 1},
    {"train__fit": "auto"},
    {"train__schedule": "cosine"},  # a default that is written out
]
OTHER = [
    {"seed": 2},
    {"train__steps": 5},
    {"train__micro_batch_size": 8},
    {"train__gradient_checkpointing": True},
    {"train__log_every": 2},
    {"evaluation__rows": 3},
    {"data__max_length": 95},
    {"model__quantization": {"quant_type": "nf4"}, "method": {"name": "none"}},
    {"method": {"name": "lora", "rank": 4, "lr": 0.01, "dropout": 0.1}},
    {"method": {"name": "lora", "rank": 4, "lr": 0.02}},
]


@pytest.mark.parametrize("changes", SAME, ids=str)
def test_what_cannot_change_a_result_is_not_identity(changes):
    assert named(**changes).trial_id == named().trial_id


@pytest.mark.parametrize("changes", OTHER, ids=str)
def test_what_can_change_a_result_is(changes):
    assert named(**changes).trial_id != named().trial_id


@pytest.mark.parametrize(("engine", "same"), [("own", True), ("trl", False)])
def test_the_rows_that_fit_chooses_decide_the_draws_of_dropout_in_trl_s_loop_alone(engine, same):
    dropout = {"name": "lora", "rank": 4, "dropout": 0.1}
    one, other = (
        TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d", dropout, train__fit=fit, train__engine=engine))
        for fit in (None, "auto")
    )
    assert (one.trial_id == other.trial_id) == same


def test_a_new_setting_leaves_every_id_as_it_is():
    class Later(LoRA):
        novelty: int = 0
        part: Quantization = Quantization()

    known = LoRA(rank=4)
    assert differing(Later(rank=4)) == differing(known) == {"name": "lora", "rank": 4}
    assert differing(Later(rank=4, novelty=1)) == {"name": "lora", "rank": 4, "novelty": 1}
    assert differing(Later(rank=4, part=Quantization(quant_type="fp4")))["part"] == {"quant_type": "fp4"}


def test_a_new_default_makes_another_trial_of_new_specs_and_leaves_the_old_ones():
    class Later(LoRA):
        rank: int = 8

    assert differing(Later()) == {"name": "lora", "rank": 8}
    assert differing(Later(rank=16)) == differing(LoRA()) == {"name": "lora"}


@pytest.mark.parametrize("kind", SPECS, ids=lambda kind: kind.__name__)
def test_every_default_is_in_the_table(kind):
    """A setting whose default changes later must not make two trials one: the table keeps what it was."""
    table = {name for each in kind.__mro__ for name in DEFAULTS.get(each.__name__, {})}
    parts = {name for name, field in kind.model_fields.items() if isinstance(field.default, Strict)}
    open_ = {
        name
        for name, field in kind.model_fields.items()
        if not field.is_required() and name not in parts and (name != "name" or not issubclass(kind, Method))
    }
    assert open_ <= table, f"add the defaults of {sorted(open_ - table)} to spec/defaults.py, in the class they are of"
    entries = {name for each in kind.__mro__ for name in DEFAULTS.get(each.__name__, {}) if each.__name__ != "Stage"}
    assert entries <= set(kind.model_fields), "the table names settings that are gone"


def test_a_part_that_is_there_is_not_one_that_is_not():
    none, given = (
        TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d", {"name": "none"}, model__quantization=quantization))
        for quantization in (None, {})
    )
    assert none.trial_id != given.trial_id


def test_settings_hold_no_names(tiny_model, questions):
    text = json.dumps(settings(settled(tiny_model, questions)))
    assert str(tiny_model) not in text
    assert "questions" not in text


def test_trials_that_differ_in_cores_alone_run_once_and_that_is_said(tiny_model, questions, moved):
    class Said(Console):
        def __init__(self) -> None:
            super().__init__(quiet=True)
            self.lines: list[str] = []

        def say(self, text: str) -> None:
            self.lines.append(text)

    one = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions)).located()
    other = TrialSpec.from_plain(tiny.plain_spec(*moved, resources__cpus_per_worker=1)).located()
    console = Said()
    assert len(inspect_trials([one, other], console).trials) == 1
    assert console.lines[-1].startswith("1 of 2 trials run once with others")


def test_two_members_of_an_ensemble_with_the_same_weights_are_refused(tiny_model, questions, moved):
    sources = [{"recipe": "prompt_completion", "path": str(questions), "train": 24, "test": 8, "validation": 4}]
    lora = {"method": {"name": "lora", "rank": 2}}
    ensemble = {"name": "ensemble", "members": [lora, {**lora, "model": str(moved[0])}]}
    with pytest.raises(SpecError, match="two members of an ensemble are the same trial"):
        settled(tiny_model, questions, ensemble, data__sources=sources)


def test_an_id_goes_with_its_spec(tiny_model, questions, moved):
    import pickle

    from ray_peft.trial.result import TrialResult

    sources = [{"recipe": "prompt_completion", "path": str(questions), "train": 24, "test": 8, "validation": 4}]
    members = [{"method": {"name": "lora", "rank": 2}}, {"method": {"name": "lora", "rank": 1}}]
    trial = settled(tiny_model, questions, {"name": "ensemble", "members": members}, data__sources=sources)
    ids = [member.trial_id for member in trial.members()]
    alone = settled(tiny_model, questions, {"name": "lora", "rank": 2}, data__sources=sources)
    assert ids[0] == alone.trial_id
    again = pickle.loads(pickle.dumps(trial))
    assert (again, again.trial_id) == (trial, trial.trial_id)
    assert [member.trial_id for member in again.members()] == ids
    row = TrialResult(trial_id=trial.trial_id, status="finished", spec=trial, members=dict.fromkeys(ids, 0.5))
    read = TrialResult.model_validate_json(row.model_dump_json())
    assert (read.spec.trial_id, [member.trial_id for member in read.spec.members()]) == (trial.trial_id, ids)
