"""The outputs of a pack's trials on their held-out rows, computed together, are those of each alone."""

import pytest
import tiny
import tiny_architectures
import torch
from attention_kinds import ARCHITECTURES
from packs import alone, check_equal, specs_of, together
from transformers import AutoConfig, AutoModelForCausalLM

from ray_peft.engine.slots import Slots
from ray_peft.tasks.llm_sft import evaluate, in_lanes, shared_outputs

UNEQUAL = [
    ({"rank": 4, "lr": 0.01, "alpha": 8}, {"seed": 1, "evaluation__rows": 7, "evaluation__general_text": True}),
    ({"rank": 8, "lr": 0.02, "alpha": 4}, {"seed": 2, "evaluation__max_new_tokens": 5, "train__batch_size": 4}),
    (
        {"rank": 2, "lr": 0.005, "alpha": 4, "targets": ["q_proj", "down_proj"]},
        {"seed": 3, "evaluation__rows": None, "evaluation__batch_size": 1},
    ),
    ({"rank": 3, "lr": 0.01, "alpha": 9}, {"seed": 3, "evaluation__generate": False}),
]
"""Trials that end at the same step."""


@pytest.fixture(scope="module")
def apart(talkative, questions, tmp_path_factory):
    """The trials, each by itself."""
    folder = tmp_path_factory.mktemp("apart")
    specs = specs_of(talkative, questions, UNEQUAL)
    return [alone(spec, folder / spec.trial_id, outputs=True) for spec in specs]


def check_outputs(ours, theirs):
    check_equal(ours, theirs)
    assert ours.outputs is not None, "it was asked by itself"
    assert list(ours.outputs.answers) == list(theirs.outputs.answers)
    assert list(ours.outputs.ended) == list(theirs.outputs.ended)
    assert ours.outputs.log_probs == pytest.approx(theirs.outputs.log_probs, rel=1e-4, abs=1e-4)
    assert float(ours.outputs.log_probs.mean()) == pytest.approx(float(theirs.outputs.log_probs.mean()), rel=1e-5)
    assert ours.outputs.general_loss == (
        pytest.approx(theirs.outputs.general_loss, rel=1e-5) if theirs.outputs.general_loss else None
    )


def packed(monkeypatch):
    """As on a GPU: rows in lanes, and passes of few static shapes, in which prompts move to other lanes."""
    answering = in_lanes.Answering
    monkeypatch.setattr(evaluate, "packs", lambda *_: True)
    monkeypatch.setattr(in_lanes, "Answering", lambda *given, **how: answering(*given, **how | {"static": True}))


@pytest.mark.parametrize("shapes", ["smallest", "static"])
def test_unequal_trials(shapes, talkative, questions, apart, tmp_path, monkeypatch, caplog):
    if shapes == "static":
        packed(monkeypatch)
    specs = specs_of(talkative, questions, UNEQUAL)
    told = together(specs, tmp_path, 4)
    assert len({answer for theirs in apart for answer in theirs.outputs.answers}) > 9, "trials answer alike"
    assert "are padded" not in caplog.text
    for ours, theirs in zip(told, apart, strict=True):
        check_outputs(ours, theirs)


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2", "4 bits"])
def test_other_bases(name, talkative, questions, tmp_path, monkeypatch):
    packed(monkeypatch)
    method, folder = {}, talkative
    if name == "4 bits":
        method = {"name": "qlora", "compute_dtype": "float32"}
    elif name == "gpt2":
        folder = tiny_architectures.build(name, tmp_path / name, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    else:
        folder = tmp_path / name
        tiny.build_tokenizer(folder)
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **ARCHITECTURES[name] | {"tie_word_embeddings": False})
        AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    settings = [({"rank": rank, "lr": 0.01, **method}, {"seed": rank}) for rank in (4, 8)]
    specs = specs_of(folder, questions, settings, train__steps=2)
    for ours, spec in zip(together(specs, tmp_path, 2), specs, strict=True):
        check_outputs(ours, alone(spec, tmp_path / spec.trial_id, outputs=True))


def test_weights_that_are_no_numbers_reach_no_other_trial(talkative, questions, apart, tmp_path, monkeypatch):
    is_finite = Slots.is_finite

    def spoiled(self, slot):
        if slot == 1:  # after its last step, whose loss was a number
            self.weights[slot].fill_(torch.nan)
        return is_finite(self, slot)

    monkeypatch.setattr(Slots, "is_finite", spoiled)
    told = together(specs_of(talkative, questions, UNEQUAL), tmp_path, 4)
    assert told[1].outputs is None
    for place in (0, 2, 3):
        check_outputs(told[place], apart[place])


def test_memory_that_runs_out_halves_what_is_answered_at_a_time(
    talkative, questions, apart, tmp_path, monkeypatch, caplog
):
    lanes = in_lanes.Lanes

    def cramped(voices, count, *given):
        if count > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lanes(voices, count, *given)

    monkeypatch.setattr(in_lanes, "Lanes", cramped)
    told = together(specs_of(talkative, questions, UNEQUAL), tmp_path, 4)
    assert "going on with" in caplog.text
    for ours, theirs in zip(told, apart, strict=True):
        check_outputs(ours, theirs)


def test_each_group_is_answered_as_many_at_a_time_as_its_trials_ask_for(talkative, questions, tmp_path, monkeypatch):
    answers, sizes = in_lanes.InLanes.answers, []

    def noted(self, size):
        sizes.append(size)
        return answers(self, size)

    monkeypatch.setattr(in_lanes.InLanes, "answers", noted)
    settings = [({"rank": rank}, {"evaluation__batch_size": rank}) for rank in (1, 2, 3, 4)]
    together(specs_of(talkative, questions, settings, train__steps=1), tmp_path, 2)
    assert sizes == [1 + 2, 3 + 4]


def test_what_fails_together_is_tried_by_each_alone(talkative, questions, apart, tmp_path, monkeypatch, caplog):
    def fall(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(shared_outputs, "row_log_probs", fall)
    told = together(specs_of(talkative, questions, UNEQUAL), tmp_path, 4)
    assert "4 trials scored together: RuntimeError: no such kernel" in caplog.text
    for ours, theirs in zip(told, apart, strict=True):
        assert ours.outputs is None
        check_equal(ours, theirs)
