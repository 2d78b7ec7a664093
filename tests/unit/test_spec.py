"""A trial is one value, and what cannot mean what it says is refused."""

import json

import pytest
import tiny
from pydantic import ValidationError

from ray_peft.methods import METHODS
from ray_peft.spec import TrialSpec
from ray_peft.spec.identity import Content, trial_id


def spec(method=None, **changes):
    return TrialSpec.from_plain(tiny.plain_spec("model", "rows.jsonl", method, **changes))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.model_fields["name"].default)
def test_every_method_round_trips_through_json_with_the_same_id(method):
    plain, changes = {"name": method.model_fields["name"].default}, {}
    if "members" in method.model_fields:
        plain |= {"members": [{"method": {"name": "lora"}}, {"method": {"name": "full"}, "seed": 3}]}
        sources = [{"recipe": "dolly", "path": "rows.jsonl", "train": 8, "test": 2, "validation": 2}]
        changes = {"data__sources": sources}
    if "adapter" in method.model_fields:
        plain |= {"adapter": "lokr", "config": {"r": 4}}
    if plain["name"] == "loftq":
        changes = {"model__quantization": "nf4"}
    one = spec(plain, **changes)
    again = TrialSpec.from_plain(json.loads(one.model_dump_json()))
    assert again == one
    assert again.trial_id == one.trial_id


def test_any_changed_value_is_another_trial():
    ids = {spec().trial_id, spec(seed=2).trial_id, spec(train__steps=5).trial_id, spec({"name": "lora"}).trial_id}
    assert len(ids) == 4


def test_a_spec_cannot_be_edited():
    with pytest.raises(ValidationError):
        spec().seed = 3


def test_text_is_no_number():
    with pytest.raises(ValidationError, match="valid integer"):
        spec(train__batch_size="8")


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        (None, {"train__batch_size": 6}, r"batch_size \(6\) must be a multiple"),
        (None, {"train__epochs": 1.0}, "exactly one of epochs"),
        (None, {"train__steps": None}, "exactly one of epochs"),
        (None, {"train__warmup_steps": 2, "train__warmup_ratio": 0.1}, "one of warmup_steps"),
        ({"name": "lora", "optim": "galore_adamw"}, {}, "thin ones; use method galore"),
        ({"name": "galore", "layerwise": True, "max_grad_norm": None}, {}, "cannot accumulate"),
        (
            {"name": "galore", "layerwise": True, "max_grad_norm": None},
            {"resources__num_workers": 2},
            r"needs resources.num_workers: 1 \(found 2\)",
        ),
        ({"name": "galore", "layerwise": True}, {"train__micro_batch_size": 8}, "cannot clip"),
        (None, {"resources__num_workers": 2, "resources__gpus_per_worker": 0.5}, "share of a GPU"),
        (None, {"resources__gpus_per_worker": 2.0}, "a worker uses one GPU"),
        ({"name": "full"}, {"model__quantization": {}}, "use method qlora"),
        ({"name": "galore"}, {"model__quantization": {}}, "use method qlora"),
        ({"name": "qlora"}, {"model__quantization": "int8"}, "model.quantization says int8; use method lora"),
        (None, {"model__quantization": {"quant_type": "int8", "double_quant": False}}, "int8 has no double_quant"),
    ],
)
def test_what_cannot_mean_what_it_says_is_refused_with_the_way_out(method, changes, words):
    with pytest.raises(ValidationError, match=words):
        spec(method, **changes)


def test_answer_loss_on_text_without_turns_is_refused():
    source = {"recipe": "text", "path": "x.jsonl", "train": 1, "test": 1}
    with pytest.raises(ValidationError) as caught:
        spec(data__sources=[source])
    assert "train.loss: answers needs turns" in str(caught.value)
    assert "evaluation.generate: true needs prompts" in str(caught.value)
    assert spec(data__sources=[source], train__loss="all", evaluation__generate=False)


def test_the_untouched_base_may_be_quantised_as_a_reference():
    assert spec({"name": "none"}, model__quantization={}).quantization.quant_type == "nf4"


SPREAD = {"resources__num_workers": 2, "resources__strategy": "fsdp"}


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        (None, {"resources__num_workers": 1}, "num_workers is 1; use num_workers: 2 or more, or strategy: data"),
        ({"name": "galore"}, {}, "cannot spread method galore over workers: it needs whole weights"),
        ({"name": "dora"}, {}, "cannot spread method dora over workers: it was not tried there"),
        ({"name": "full", "optim": "adamw_8bit", "weights": "float32"}, {}, "adamw_8bit takes whole tensors"),
        ({"name": "qlora_galore"}, {}, "cannot merge adapters between the stages of method qlora_galore"),
        (None, {"model__quantization": "int8"}, "cannot spread a base in int8"),
        (None, {"train__engine": "trl"}, "served by our loop alone"),
        (None, {"model__new_tokens": ["<tool>"]}, "was not tried with model.new_tokens"),
        (None, {"evaluation__benchmarks": {"tasks": ["mmlu"]}}, "cannot run evaluation.benchmarks"),
    ],
)
def test_what_cannot_be_spread_over_workers_is_refused_before_anything_starts(method, changes, words):
    with pytest.raises(ValidationError, match=words) as refusal:
        spec(method, **SPREAD | changes)
    assert "use resources.strategy: data" in str(refusal.value) or "strategy: data" in words


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ({"name": "lora"}, {}),
        ({"name": "lora"}, {"model__quantization": "nf4"}),
        ({"name": "qlora"}, {}),
        ({"name": "full"}, {}),
        ({"name": "none"}, {}),
    ],
)
def test_what_can_be_spread_over_workers_is_the_same_trial(method, changes):
    assert spec(method, **SPREAD | changes).trial_id == spec(method, **changes).trial_id


def test_layerwise_galore_is_legal_without_accumulation_and_clipping():
    assert spec({"name": "galore", "layerwise": True, "max_grad_norm": None}, train__micro_batch_size=8)


def test_accumulation_is_what_is_left_of_the_batch():
    assert spec().accumulation == 2
    assert spec(resources__num_workers=2).accumulation == 1


def test_located_makes_local_paths_absolute_and_leaves_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    found = TrialSpec.from_plain(tiny.plain_spec("google/gemma-2-2b", "rows.jsonl")).located()
    assert found.model.name == "google/gemma-2-2b"
    assert found.data.sources[0].path == str(tmp_path / "rows.jsonl")


def test_benchmarks_are_off_and_their_folder_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert spec().evaluation.benchmarks is None
    assert spec().located().evaluation.benchmarks is None
    found = spec(evaluation__benchmarks={"tasks": ["mmlu"], "include_path": "own_tasks"})
    assert found.located().evaluation.benchmarks.include_path == str(tmp_path / "own_tasks")
    assert found.evaluation.benchmarks.batch_size == 8
    without = spec(evaluation__benchmarks={"tasks": ["mmlu"]})
    assert without.located() == without


@pytest.mark.parametrize(
    ("benchmarks", "words"),
    [
        ({"tasks": []}, "at least 1 item"),
        ({"tasks": ["mmlu", "mmlu"]}, "'mmlu' is there twice"),
        ({"tasks": ["mmlu"], "limit": 0}, "greater than or equal to 1"),
        ({"tasks": ["mmlu"], "shots": 5}, "Extra inputs"),
    ],
)
def test_benchmarks_that_make_no_sense_are_refused(benchmarks, words):
    with pytest.raises(ValidationError, match=words):
        spec(evaluation__benchmarks=benchmarks)


def test_a_validation_fraction_leaves_training_rows():
    source = {"recipe": "dolly", "path": "x.jsonl", "train": 1, "test": 1, "validation": 1.0}
    with pytest.raises(ValidationError, match=r"validation \(1.0\) is a fraction that leaves nothing to train on"):
        spec(data__sources=[source])


@pytest.mark.parametrize(
    ("members", "validation", "says"),
    [
        ([{"method": {"name": "lora"}}, {"method": {"name": "qlora"}}], 0, "tunes its weights on validation rows"),
        ([{"method": {"name": "lora"}}, {"method": {"name": "lora"}}], 2, "is there twice"),
        ([{"method": {"name": "lora"}}], 2, "at least two members"),
        ([{"method": {"name": "lora"}}, {"method": {"name": "ensemble"}}], 2, "'ensemble' found using 'name'"),
        (
            [{"method": {"name": "lora"}}, {"method": {"name": "galore", "layerwise": True}}],
            2,
            "method.members: layerwise GaLore",
        ),
    ],
)
def test_ensembles_that_make_no_sense_are_refused(members, validation, says):
    sources = [{"recipe": "dolly", "path": "rows.jsonl", "train": 8, "test": 2, "validation": validation}]
    with pytest.raises(ValidationError, match=says):
        spec({"name": "ensemble", "members": members}, data__sources=sources)


def test_an_ensemble_is_made_of_its_own_trial_with_other_methods():
    sources = [{"recipe": "dolly", "path": "rows.jsonl", "train": 8, "test": 2, "validation": 2}]
    members = [{"method": {"name": "lora"}}, {"method": {"name": "lora"}, "seed": 9, "model": "org/other"}]
    ensemble = spec({"name": "ensemble", "members": members}, data__sources=sources, seed=5)
    first, second = ensemble.members()
    assert first.trial_id == spec({"name": "lora"}, data__sources=sources, seed=5).trial_id
    assert (second.seed, second.model.name, second.train) == (9, "org/other", ensemble.train)


@pytest.mark.parametrize("every", [1, 100, "5 minutes", "90s", "1.5 hours", None])
def test_checkpoints_come_after_steps_or_a_time(every):
    found = spec(train__checkpoint_every=every)
    assert found.train.checkpoint_every == every
    assert TrialSpec.from_plain(found.plain()) == found
    assert found.trial_id == spec().trial_id  # whose default is a time
    assert spec().train.checkpoint_every == "5 minutes"


def test_fp16_is_refused_where_gradients_need_it_and_cautioned_where_not():
    with pytest.raises(ValidationError, match="fp16 has no range for gradients"):
        spec(train__precision="fp16")
    assert spec({"name": "qlora"}).cautions() == []
    (caution,) = spec({"name": "qlora", "compute_dtype": "float16"}).cautions()
    assert "qlora: the 4-bit base's compute_dtype is float16" in caution
    assert len(spec(model__dtype="float16").cautions()) == 1


def test_fit_auto_is_cautioned_where_another_gpu_would_give_other_digits():
    (caution,) = spec({"name": "lora"}, train__fit="auto", train__precision="bf16").cautions()
    assert "on another GPU losses differ in their last digits, in fp32 they do not" in caution
    assert spec({"name": "lora"}, train__fit="auto", train__precision="fp32").cautions() == []
    assert spec({"name": "none"}, train__fit="auto", train__precision="bf16").cautions() == []
    dropout = {"name": "lora", "dropout": 0.1}
    assert spec(dropout, train__fit="auto", train__precision="fp32").cautions() == []
    (caution,) = spec(dropout, train__fit="auto", train__precision="fp32", train__engine="trl").cautions()
    assert "with train.engine: trl the draws of dropout depend on them" in caution


def test_what_happens_to_unusable_rows_is_no_other_trial():
    data = spec().plain()["data"]
    skipping = type(spec()).from_plain({**spec().plain(), "data": {**data, "unusable": "skip"}})
    assert skipping.data.unusable == "skip"
    assert trial_id(skipping, Content("model", "rows")) == trial_id(spec(), Content("model", "rows"))
    with pytest.raises(ValidationError, match="unusable"):
        type(spec()).from_plain({**spec().plain(), "data": {**data, "unusable": "drop"}})
