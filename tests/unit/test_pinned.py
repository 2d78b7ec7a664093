"""A hub model is loaded at the commit that the driver saw, whatever its branch names by then."""

from __future__ import annotations

import json
import shutil

import huggingface_hub.constants
import pytest
import tiny
import torch

from ray_peft.checks.inspector import Inspector
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.deciding import model_content
from ray_peft.tasks.llm_sft.model import fingerprint, load_config, load_model
from ray_peft.tasks.llm_sft.tokenizer import load_tokenizer

OLD, NEW = "a" * 40, "b" * 40
RANGES = {OLD: 0.5, NEW: 0.25}
"""A setting of the config that tells the commits apart."""


@pytest.fixture
def hub(tiny_model, tmp_path, monkeypatch):
    """The local copy of a hub model with two commits; gives the file that names the commit of its main branch."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, commits in (("tiny", (OLD, NEW)), ("words", (NEW,))):
        repository = tmp_path / "hub" / f"models--org--{name}"
        for commit in commits:
            shutil.copytree(tiny_model, repository / "snapshots" / commit)
            config = repository / "snapshots" / commit / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"initializer_range": RANGES[commit]}))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commits[0])
    return tmp_path / "hub" / "models--org--tiny" / "refs" / "main"


def test_a_hub_model_is_pinned_to_the_commit_that_was_checked(hub, questions):
    trial = TrialSpec.from_plain(tiny.plain_spec("org/tiny", questions))
    settled = Inspector().settled(trial)
    assert settled.model.revision == OLD
    hub.write_text(NEW)
    assert fingerprint(trial.model) == NEW
    assert fingerprint(settled.model) == OLD
    assert load_config(settled.model).initializer_range == RANGES[OLD]
    assert load_config(trial.model).initializer_range == RANGES[NEW]
    later = Inspector().settled(trial)
    assert later.model.revision == NEW
    assert later.trial_id != settled.trial_id
    assert TrialSpec.from_plain(settled.plain()).model.revision == OLD  # as its row keeps it


def test_a_branch_that_moves_between_two_trials_gives_both_one_commit(hub, questions):
    plain = tiny.plain_spec("org/tiny", questions)
    trials = [TrialSpec.from_plain(plain | {"seed": seed}) for seed in (1, 2)]
    inspector = Inspector()
    first = inspector.settled(trials[0])
    hub.write_text(NEW)
    second = inspector.settled(trials[1])
    assert [trial.model.revision for trial in (first, second)] == [OLD, OLD]
    assert second.trial_id == Inspector().settled(second).trial_id  # the id of the commit that is loaded


def test_a_tokenizer_of_another_repository_has_no_commit_of_the_model(hub, questions):
    plain = tiny.plain_spec("org/tiny", questions)
    plain["model"] |= {"revision": OLD, "tokenizer": "org/words"}
    trial = TrialSpec.from_plain(plain)
    assert len(load_tokenizer(trial)) > 0
    assert model_content(trial.model) is not None


def test_loftq_starts_from_the_weights_of_the_commit(hub, questions):
    folder = hub.parents[1] / "snapshots" / NEW
    tiny.build_model(folder, seed=1)
    method = {"name": "loftq", "rank": 4, "iterations": None}
    starts = []
    for name, revision in (("org/tiny", NEW), (str(folder), None)):
        plain = tiny.plain_spec(name, questions, method, model__quantization="nf4", model__revision=revision)
        trial = TrialSpec.from_plain(plain)
        ((stage, _),) = trial.method.stages(4)
        adapted = stage.attach(load_model(trial, "cpu"))
        starts.append([weight for name, weight in adapted.named_parameters() if "lora_B" in name])
    assert starts[0]
    assert all(map(torch.equal, *starts))
