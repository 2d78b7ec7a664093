"""A trial on images: what is filled in, and what cannot mean what it says."""

from __future__ import annotations

import json

import pytest
import tiny_diffusion
import yaml
from pydantic import ValidationError

from ray_peft.errors import SearchSpaceError
from ray_peft.space import read as space
from ray_peft.spec import ImageTrialSpec, TrialSpec
from ray_peft.spec.text_to_image import ATTENTION

FULL_BF16 = {"name": "full", "weights": "bfloat16_stochastic"}


def spec(method=None, **changes):
    return TrialSpec.from_plain(tiny_diffusion.plain_spec("model", "images", method, **changes))


def refused(plain):
    """The lines with which a search space of one trial is refused."""
    with pytest.raises(SearchSpaceError) as caught:
        space.parse(yaml.safe_dump(plain), "space.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_an_adapter_without_targets_gets_the_attention_of_a_unet(name):
    found = spec({"name": name}, model__dtype="bfloat16", train__precision="bf16")
    assert isinstance(found, ImageTrialSpec)
    assert found.method.targets == ATTENTION == ("to_k", "to_q", "to_v", "to_out.0")


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_given_targets_stay_and_are_another_trial(name):
    found = spec({"name": name, "targets": ["to_q", "ff.net.2"]})
    assert found.method.targets == ("to_q", "ff.net.2")
    assert found.trial_id != spec({"name": name}).trial_id
    assert spec({"name": name, "targets": list(ATTENTION)}).trial_id == spec({"name": name}).trial_id


@pytest.mark.parametrize("method", [{"name": "none"}, {"name": "lora"}, {"name": "qlora"}, {"name": "full"}])
def test_a_trial_round_trips_with_the_same_id(method):
    one = spec(method, train__precision="bf16", evaluation__seeds=[3, 4])
    for again in (TrialSpec.from_plain(one.plain()), TrialSpec.from_plain(json.loads(one.model_dump_json()))):
        assert again == one
        assert again.trial_id == one.trial_id
    assert one.plain()["task"] == "text_to_image"


def test_local_paths_are_made_absolute_and_hub_ids_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paintings").mkdir()
    found = TrialSpec.from_plain(tiny_diffusion.plain_spec("someone/some-diffusion", "paintings")).located()
    assert found.model.name == "someone/some-diffusion"
    assert found.data.path == str(tmp_path / "paintings")


@pytest.mark.parametrize("name", ["galore", "qlora_galore"])
def test_methods_of_language_models_do_not_serve_the_task(name):
    with pytest.raises(ValidationError, match=f"method {name} does not serve task text_to_image"):
        spec({"name": name})


def test_an_ensemble_does_not_serve_the_task():
    members = [{"method": {"name": "lora", "rank": rank}} for rank in (2, 4)]
    with pytest.raises(ValidationError, match="method ensemble does not serve task text_to_image"):
        spec({"name": "ensemble", "members": members})


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        (None, {"model__attention": "sdpa"}, r"model.attention \(sdpa\) is for language models; leave it out"),
        (None, {"data__crop": "random"}, "need several views, .* set views to 4 or more"),
        (None, {"data__flip": True}, "crop: random and flip: true need several views"),
        (None, {"data__views": 4}, r"views \(4\) without crop: random or flip: true .* use views: 1"),
        (None, {"data__resolution": 60}, r"resolution \(60\) must be a multiple of 8"),
        (None, {"data__train": 1.5}, r"train \(1.5\) is a fraction above 1"),
        (None, {"data__test": 1.0}, r"test \(1.0\) is a fraction that leaves nothing to train on"),
        (None, {"model__dtype": "bfloat16"}, "train.precision: fp32 needs model.dtype: float32 here"),
        (FULL_BF16, {}, "train.precision: fp32 needs method.weights: float32 here"),
        (None, {"model__dtype": "float16", "train__precision": "bf16"}, "float16 overflows .* use bfloat16"),
        (None, {"train__precision": "fp16"}, "no range for gradients"),
        (FULL_BF16, {"train__ema_decay": 0.9, "train__precision": "bf16"}, "ema_decay .* needs method.weights: float3"),
        ({"name": "none"}, {"model__quantization": {}}, "a UNet in 4 bits is method qlora"),
        (None, {"model__quantization": {}}, "a UNet in 4 bits is method qlora"),
        ({"name": "full"}, {"model__quantization": {}}, "use method qlora"),
        (None, {"train__micro_batch_size": 3}, r"batch_size \(4\) must be a multiple"),
        (None, {"evaluation__prompts": ["a", "a"]}, "'a' is there twice; name each once"),
        (None, {"evaluation__seeds": [1, 1]}, "1 is there twice; name each once"),
        (None, {"evaluation__seeds": []}, "at least 1 item"),
        (None, {"evaluation__guidance_scale": 0.5}, "greater than or equal to 1"),
        (None, {"train__ema_decay": 1.0}, "less than 1"),
        (None, {"train__prediction": "sample"}, "'epsilon' or 'v_prediction'"),
    ],
)
def test_what_cannot_mean_what_it_says_is_refused_with_the_way_out(method, changes, words):
    with pytest.raises(ValidationError, match=words):
        spec(method, **changes)


def test_views_that_differ_are_legal():
    assert spec(data__views=4, data__crop="random").data.views == 4
    assert spec(data__views=2, data__flip=True).data.views == 2


def test_an_average_of_float32_weights_is_legal():
    assert spec({"name": "full", "weights": "float32"}, train__ema_decay=0.9).train.ema_decay == 0.9
    assert spec(train__ema_decay=0.9).train.ema_decay == 0.9


def test_an_average_of_bf16_adapters_would_stand_still():
    with pytest.raises(ValidationError, match="ema_decay .* needs method.adapter_dtype: float32"):
        spec({"name": "lora", "adapter_dtype": "bfloat16"}, train__ema_decay=0.999)


def test_an_unknown_task_is_one_clear_line():
    plain = tiny_diffusion.plain_spec("model", "images") | {"task": "text_to_video"}
    (line,) = refused(plain)
    assert line.startswith("space.yaml: task: must be one of llm_sft, text_to_image (found 'text_to_video')")


def test_a_misspelt_key_gets_a_suggestion():
    plain = tiny_diffusion.plain_spec("model", "images")
    plain["evaluation"]["guidence_scale"] = 5.0
    (line,) = refused(plain)
    assert "evaluation.guidence_scale: unknown key, did you mean guidance_scale? (found 5.0)" in line


def test_all_problems_of_a_trial_are_named_at_once():
    plain = tiny_diffusion.plain_spec("model", "images", model__attention="sdpa", model__dtype="float16")
    text = "\n".join(refused(plain))
    assert "model.attention" in text
    assert "model.dtype: float16" in text


def test_reports_say_what_is_seen_and_what_is_predicted():
    found = spec(data__views=4, data__flip=True, train__snr_gamma=5.0, train__noise_offset=0.05)
    assert found.data_lines() == ["images: all others for training, 2 held out, 64 px; 4 views of each"]
    assert found.loss_line() == (
        "squared error of the predicted noise or v, as the model does, min-SNR 5, noise offset 0.05"
    )
