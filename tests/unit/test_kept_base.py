"""The base kept between trials is the one that was loaded, bit by bit; each trial has modules of its own."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import tiny
import torch
from gone_on import LORA, QLORA, attempt
from untracked import HYBRID

from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS, kept_base
from ray_peft.tasks.llm_sft import model as models


@pytest.fixture(autouse=True)
def nothing_is_kept():
    kept_base.drop()
    yield
    kept_base.drop()


def spec_of(model, rows, method=LORA, **changes):
    return TrialSpec.from_plain(tiny.plain_spec(model, rows, method, **changes))


def digest(model):
    """Of names and bits of all that a model holds, the constants of 4-bit weights included."""
    total = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        total.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            total.update(state.absmax.numpy().tobytes() + state.state2.absmax.numpy().tobytes())
    return total.hexdigest()


def load(spec):
    return TASKS["llm_sft"].load(spec, "cpu").model


@pytest.mark.parametrize("method", [LORA, LORA | {"dropout": 0.2}, QLORA], ids=["lora", "dropout", "qlora"])
def test_a_trial_leaves_the_base_as_it_was_loaded_and_the_next_takes_it_without_a_trace(
    tiny_model, questions, tmp_path, method
):
    spec = spec_of(tiny_model, questions, method, train__gradient_checkpointing=True)
    fresh = models.load_model(spec, "cpu")
    before, modules = digest(fresh), str(fresh)
    attempt(spec, tmp_path / "first")
    weights = {name: weight.data_ptr() for name, weight in kept_base._bases[0].model.named_parameters()}
    again = load(spec)
    assert {name: weight.data_ptr() for name, weight in again.named_parameters()} == weights  # nothing was loaded
    assert digest(again) == before
    assert str(again) == modules
    assert not again.training
    assert again.config.to_dict() == fresh.config.to_dict()
    assert set(vars(again)) == set(vars(fresh))
    for part, other in zip(again.modules(), fresh.modules(), strict=True):
        assert type(part) is type(other)
        assert not {**part._forward_hooks, **part._forward_pre_hooks, **part._backward_hooks}
        assert getattr(part, "gradient_checkpointing", False) == getattr(other, "gradient_checkpointing", False)


@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
def test_a_trial_on_the_kept_base_is_the_trial_alone_to_the_last_bit(tiny_model, questions, tmp_path, method):
    alone, expected = attempt(spec_of(tiny_model, questions, method), tmp_path / "alone")
    kept_base.drop()
    attempt(spec_of(tiny_model, questions, method | {"rank": 8, "lr": 0.1, "dropout": 0.3}, seed=5), tmp_path / "first")
    assert kept_base._bases
    second, points = attempt(spec_of(tiny_model, questions, method), tmp_path / "second")
    assert points == expected
    assert second.scores == alone.scores
    assert second.provenance.model_fingerprint == alone.provenance.model_fingerprint


def test_what_may_change_the_base_or_needs_another_one_gets_it_from_its_files(tiny_model, questions, tmp_path):
    def key(method=LORA, **changes):
        return TASKS["llm_sft"].base_key(spec_of(tiny_model, questions, method, **changes), "cpu")

    other = tiny.build_model(tmp_path / "other", seed=3)
    assert key() == key(LORA | {"rank": 8, "dropout": 0.1}, seed=7, train__steps=2)
    assert key() == key({"name": "none"})
    assert len({key(), key(QLORA), key(QLORA | {"quant_type": "fp4"}), key(model__dtype="bfloat16")}) == 4
    assert TASKS["llm_sft"].base_key(spec_of(other, questions), "cpu") != key()
    assert TASKS["llm_sft"].base_key(spec_of(tiny_model, questions), "cuda:0") != key()
    for method in ({"name": "full"}, {"name": "galore", "rank": 4}, HYBRID):
        assert key(method) is None
    assert key(train__engine="trl") is None
    assert TASKS["text_to_image"].base_key(None, "cpu") is None

    load(spec_of(tiny_model, questions))
    assert kept_base._bases
    load(spec_of(tiny_model, questions, {"name": "full"}))
    assert not kept_base._bases  # its memory is needed


def test_a_base_that_was_changed_or_whose_files_were_is_loaded_again(tiny_model, questions, tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    spec = spec_of(folder, questions)
    before = digest(load(spec))
    with torch.no_grad():
        load(spec).model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert digest(load(spec)) == before
    assert "have changed, so it is loaded again" in caplog.text
    tiny.build_model(folder, seed=9)
    assert digest(load(spec)) != before


def test_a_trial_that_fails_leaves_no_base(tiny_model, questions, tmp_path):
    row, _ = attempt(spec_of(tiny_model, questions, LORA | {"lr": 1e30}, train__steps=6), tmp_path)
    assert row.status == "failed"
    assert not kept_base._bases


def test_the_tokenizer_of_the_trial_before_is_as_it_was_loaded(tiny_model, questions, tmp_path):
    from ray_peft.tasks.llm_sft.tokenizer import load_tokenizer

    spec = spec_of(tiny_model, questions)
    attempt(spec, tmp_path)
    used, fresh = TASKS["llm_sft"].load(spec, "cpu").tokenizer, load_tokenizer(spec)
    assert used.backend_tokenizer.to_str() == fresh.backend_tokenizer.to_str()
    assert (used.padding_side, used.pad_token_id, used.chat_template) == (
        fresh.padding_side, fresh.pad_token_id, fresh.chat_template,
    )  # fmt: skip
