"""Trials that train together on one base have the numbers of the same trials alone."""

import math

import pytest
import tiny
import tiny_architectures
import torch
from packs import UNEQUAL, alone, check_equal, specs_of, together
from transformers import AutoConfig, AutoModelForCausalLM

from ray_peft.errors import ModelError, TrialFailed
from ray_peft.tasks.llm_sft.bench import LlmBench
from ray_peft.tasks.llm_sft.together import LossTogether


def test_unequal_trials(talkative, questions, tmp_path):
    specs = specs_of(talkative, questions, UNEQUAL)
    for ours, spec in zip(together(specs, tmp_path, 4), specs, strict=True):
        check_equal(ours, alone(spec, tmp_path / spec.trial_id))


def test_who_waits_takes_a_place_that_becomes_free(talkative, questions, tmp_path):
    specs = specs_of(talkative, questions, UNEQUAL)
    for ours, spec in zip(together(specs, tmp_path, 2), specs, strict=True):
        check_equal(ours, alone(spec, tmp_path / spec.trial_id))


def test_one_lane_of_each_in_order(talkative, questions, tmp_path, monkeypatch):
    """What sweeps over learning rates and ranks mostly are."""
    settings = [
        ({"rank": rank, "lr": 0.0002 * rank}, {"train__steps": steps}) for rank, steps in ((4, 4), (8, 6), (2, 5))
    ]
    specs = specs_of(talkative, questions, settings, train__batch_size=1, train__micro_batch_size=1)
    lanes, whole = [], LossTogether.loss
    monkeypatch.setattr(LossTogether, "loss", lambda self, *given: lanes.append(len(given[-1])) or whole(self, *given))
    for ours, spec in zip(together(specs, tmp_path, 3), specs, strict=True):
        check_equal(ours, alone(spec, tmp_path / spec.trial_id))
    assert lanes == [0, 0, 0, 0, 3, 1], "two members pass in the shape of three, which is there"


def test_trials_of_one_form_are_attached_once(talkative, questions, tmp_path, monkeypatch):
    settings = [
        ({"rank": rank, "alpha": 8, "lr": lr, "weight_decay": lr}, {"train__steps": 3})
        for rank, lr in ((4, 0.001), (8, 0.001), (4, 0.002), (8, 0.0005))
    ]
    specs = specs_of(talkative, questions, settings)
    theirs = [alone(spec, tmp_path / spec.trial_id) for spec in specs]
    attached, attach = [], LlmBench.attach
    monkeypatch.setattr(LlmBench, "attach", lambda self, stage: attached.append(stage.rank) or attach(self, stage))
    for ours, own in zip(together(specs, tmp_path, 4), theirs, strict=True):
        check_equal(ours, own)
    assert attached == [4, 8, 4, 8]


def test_a_failed_member_leaves_the_others_unchanged_to_the_bit(talkative, questions, tmp_path):
    specs = specs_of(talkative, questions, [UNEQUAL[0], UNEQUAL[1], ({"rank": 4}, {"seed": 5, "train__steps": 5})])

    def break_the_second(pack):
        def poison(module, inputs):
            if 1 in pack._seats and pack._seats[1][1].steps_done == 1:  # its second step begins
                pack._slots.weights[1].fill_(math.nan)

        pack._base.base_model.register_forward_pre_hook(poison)

    usual = together(specs, tmp_path / "usual", 3)
    broken = together(specs, tmp_path / "broken", 3, break_the_second)
    assert isinstance(broken[1].error, TrialFailed)
    assert "the training loss is nan at step 2" in str(broken[1].error)
    assert [step for step, _ in broken[1].log] == [1]
    for ours, theirs in zip(broken[::2], usual[::2], strict=True):
        assert ours.log[:2] == theirs.log[:2], "beside what is no number"
        check_equal(ours, theirs)


def test_a_pack_that_is_stopped_goes_on_from_its_members_checkpoints(talkative, questions, tmp_path):
    specs = specs_of(talkative, questions, UNEQUAL[:3], train__checkpoint_every=2)

    def stop(pack):
        def interrupt(module, inputs):
            if 0 in pack._seats and pack._seats[0][1].steps_done == 4:  # its last step begins
                raise KeyboardInterrupt

        pack._base.base_model.register_forward_pre_hook(interrupt)

    with pytest.raises(KeyboardInterrupt):
        together(specs, tmp_path, 2, stop)
    told = together(specs, tmp_path, 2)
    assert [ours.log[0][0] for ours in told] == [5, 3, 1]  # the third had just begun
    for ours, spec in zip(told, specs, strict=True):
        theirs = alone(spec, tmp_path / spec.trial_id)
        ours.log = [line for line in theirs.log if line[0] < ours.log[0][0]] + ours.log
        check_equal(ours, theirs)


def test_one_without_rows_of_its_own_follows_one_that_failed(talkative, questions, tmp_path):
    specs = specs_of(talkative, questions, [UNEQUAL[0], ({"rank": 8, "lr": 1e30}, {"train__steps": 9}), UNEQUAL[2]])
    told = together(specs, tmp_path, 2)
    assert isinstance(told[1].error, TrialFailed)
    for place in (0, 2):
        check_equal(told[place], alone(specs[place], tmp_path / specs[place].trial_id))


def test_memory_that_runs_out_halves_the_passes_of_all(talkative, questions, tmp_path, monkeypatch):
    specs = specs_of(talkative, questions, UNEQUAL[:3])
    sizes, whole = [], LossTogether.loss

    def cramped(self, *inputs):
        sizes.append(inputs[0].numel())
        if len(sizes) > 3 and inputs[0].numel() > 400:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, *inputs)

    monkeypatch.setattr(LossTogether, "loss", cramped)
    told = together(specs, tmp_path, 3)
    assert max(sizes[:3]) > 400
    assert max(sizes[-4:]) <= 400
    for ours, spec in zip(told, specs, strict=True):
        check_equal(ours, alone(spec, tmp_path / spec.trial_id))


def test_recomputed_activations(talkative, questions, tmp_path):
    specs = specs_of(talkative, questions, UNEQUAL[:3], train__gradient_checkpointing=True)
    for ours, spec in zip(together(specs, tmp_path, 2), specs, strict=True):
        check_equal(ours, alone(spec, tmp_path / spec.trial_id))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_that_of_the_trial_alone(checkpointing, talkative, questions, tmp_path):
    shares = [0.1, 0.0, 0.5, 0.3]
    settings = [(method | {"dropout": p}, changes) for p, (method, changes) in zip(shares, UNEQUAL, strict=True)]
    specs = specs_of(talkative, questions, settings, train__gradient_checkpointing=checkpointing)
    without = together(specs_of(talkative, questions, UNEQUAL[:1]), tmp_path / "without", 1)[0]
    told = together(specs, tmp_path, 3)
    assert told[0].log[0][1] != without.log[0][1], "nothing was dropped"
    for ours, spec in zip(told, specs, strict=True):
        check_equal(ours, alone(spec, tmp_path / spec.trial_id))


WINDOWS = {"num_hidden_layers": 2, "head_dim": 16, "sliding_window": 16, "num_key_value_heads": 2}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 512}
OTHERS = {
    "gemma2": {**SMALL, **WINDOWS, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**SMALL, **WINDOWS, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name, questions, tmp_path):
    folder = tmp_path / "model"
    tiny.build_tokenizer(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name,
        vocab_size=272,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        **OTHERS[name],
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    settings = [
        ({"rank": 4, "lr": 0.01}, {"seed": 1}),
        ({"rank": 8, "lr": 0.003, "alpha": 5}, {"seed": 2, "train__steps": 3, "train__batch_size": 4}),
    ]
    specs = specs_of(folder, questions, settings)
    for ours, spec in zip(together(specs, tmp_path, 2), specs, strict=True):
        check_equal(ours, alone(spec, tmp_path / spec.trial_id))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_base_in_4_bits(kind, talkative, questions, tmp_path):
    folder = talkative
    if kind == "gpt2":
        folder = tiny_architectures.build("gpt2", tmp_path / "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    settings = [
        ({"name": "qlora", "rank": 4, "lr": 0.001, "compute_dtype": "float32"}, {"seed": 1}),
        (
            {"name": "qlora", "rank": 8, "lr": 0.002, "compute_dtype": "float32", "dropout": 0.2},
            {"seed": 2, "train__steps": 3},
        ),
    ]
    specs = specs_of(folder, questions, settings)
    for ours, spec in zip(together(specs, tmp_path, 2), specs, strict=True):
        check_equal(ours, alone(spec, tmp_path / spec.trial_id))


class Killed(BaseException):
    """Not an error: nothing catches it."""


def killed_at(step):
    def report(metrics, number):
        if number == step:
            raise Killed

    return report


@pytest.mark.parametrize("before", ["alone", "together"])
def test_a_member_goes_on_from_its_checkpoint_alone_or_beside_others(before, talkative, questions, tmp_path):
    settings = [
        (method, {**changes, "train__steps": 6, "train__checkpoint_every": 2}) for method, changes in UNEQUAL[:3]
    ]
    specs = specs_of(talkative, questions, settings)
    whole = [alone(spec, tmp_path / "whole") for spec in specs[:1]][0]
    folder = tmp_path / "member0"
    if before == "alone":
        with pytest.raises(Killed):
            alone(specs[0], folder, report=killed_at(5))
        resumed = together(specs, tmp_path, 3)[0]
    else:
        with pytest.raises(Killed):
            together(specs, tmp_path, 3, report=killed_at(5))
        resumed = alone(specs[0], folder)
    whole.log = whole.log[4:]
    check_equal(resumed, whole)


def test_seconds_are_divided_by_tokens(talkative, questions, tmp_path):
    specs = specs_of(
        talkative, questions, [({}, {"train__batch_size": 12, "train__log_every": 99}), ({}, {"train__batch_size": 4})]
    )
    many, few = together(specs, tmp_path, 2)
    assert many.seconds / few.seconds == pytest.approx(many.tokens / few.tokens, rel=0.5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", "the model has dropout; train them apart"),
        ("mixtral", "it is a mixture of experts"),
        ("mamba", "(cannot train together|carr)"),
    ],
)
def test_models_that_cannot_be_shared_are_refused(name, words, questions, tmp_path):
    folder = tiny_architectures.build(name, tmp_path / name)
    targets = {"mixtral": ["q_proj"], "mamba": ["in_proj"]}.get(name)
    settings = [({"rank": 4, **({"targets": targets} if targets else {})}, {"seed": seed}) for seed in (1, 2)]
    with pytest.raises(ModelError, match=words):
        together(specs_of(folder, questions, settings), tmp_path, 2)
