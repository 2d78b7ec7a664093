"""What every adapter of PEFT's must do, run over the registry on a plain base and on one in 4 bits."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
from pydantic import ValidationError
from torch.nn.utils import clip_grad_norm_

from ray_peft.errors import SpecError
from ray_peft.methods import METHODS
from ray_peft.methods.adapter import Adapter
from ray_peft.methods.lora import LoRA
from ray_peft.methods.optimizers import trainable
from ray_peft.methods.qlora import QLoRA
from ray_peft.spec import TrialSpec

ADAPTERS = [kind for kind in METHODS if issubclass(kind, Adapter) and kind is not QLoRA]
SMALL = {
    "adalora": {"target_rank": 2},
    "fourierft": {"frequencies": 50},
    "gralora": {"rank": 8},
    "oft": {"block_size": 16},
    "peft": {"adapter": "lokr", "config": {"r": 4}},
    "prefix_tuning": {"virtual_tokens": 3},
    "prompt_tuning": {"virtual_tokens": 3},
    "randlora": {"rank": 16},
    "vera": {"rank": 16},
}
"""Settings that fit a model 64 wide; all others have rank 4."""
NOT_QUANTISED = {"hra", "pissa", "olora", "peft"}
NOT_PLAIN = {"loftq"}
NOT_MERGED = {"prompt_tuning", "prefix_tuning"}
NF4 = {"quant_type": "nf4", "compute_dtype": "float32"}
STEPS = 3


def plain_method(kind, **settings):
    name = kind.model_fields["name"].default
    rank = {"rank": 4} if "rank" in kind.model_fields else {}
    return {"name": name, "lr": 0.01, **rank, **SMALL.get(name, {}), **settings}


def trial(model, method, storage=None):
    return TrialSpec.from_plain(tiny.plain_spec(model, "d/d", method, model__quantization=storage))


def stage_of(spec):
    ((stage, _),) = spec.method.stages(STEPS + 1)
    return stage


def loaded(spec):
    from ray_peft.tasks.llm_sft.model import load_model

    return load_model(spec, "cpu")


def attached(spec):
    from transformers import set_seed

    set_seed(spec.seed)
    return stage_of(spec).attach(loaded(spec))


def ids():
    return torch.arange(48).reshape(2, 24) * 5 % 256


def step(model, optimizer):
    """One optimizer step as the engine does it; the loss before it."""
    model.train()
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    clip = getattr(optimizer, "clip", None) or (lambda most: clip_grad_norm_(trainable(model), most))
    clip(1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids()).logits[:, -24:]


def on_meta(spec):
    from ray_peft.tasks.llm_sft.targets import on_meta as shapes

    return copy.deepcopy(shapes(spec.model))


def apart(one, other):
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("storage", [None, NF4], ids=["plain", "nf4"])
@pytest.mark.parametrize("kind", ADAPTERS, ids=lambda kind: kind.model_fields["name"].default)
def test_an_adapter_keeps_its_contract(kind, storage, tiny_model, tmp_path):
    from peft import PeftModel

    from ray_peft.tasks.llm_sft.model import save

    method = plain_method(kind)
    if storage and method["name"] in NOT_QUANTISED:
        with pytest.raises(ValidationError, match="cannot be trained on a base in nf4: .*set model.quantization: null"):
            trial(tiny_model, method, storage)
        return
    if not storage and method["name"] in NOT_PLAIN:
        with pytest.raises(ValidationError, match="model.quantization is null; set it to nf4"):
            trial(tiny_model, method, storage)
        return
    spec = trial(tiny_model, method, storage)
    stage, model = stage_of(spec), attached(spec)

    # Only the adapter is trained, as many numbers of it as are counted without weights.
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    count = sum(parameter.numel() for parameter in trainable(model))
    assert 0 < count == sum(parameter.numel() for parameter in trainable(stage.attach(on_meta(spec))))
    assert kind is LoRA or f"{count:,} parameters" in " ".join(stage.check(on_meta(spec), of="tiny", key="method"))
    optimizer = stage.optimizer(model)
    losses = [step(model, optimizer) for _ in range(STEPS)]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        if "lora_E" not in name:  # of which AdaLoRA takes most away
            assert torch.equal(parameter, before[name]) == (name not in trained), name

    # It is saved as PEFT loads it on the original base, and goes on from a checkpoint.
    scores = logits(model)
    save(model, None, tmp_path / "adapter", "float32")
    again = PeftModel.from_pretrained(loaded(spec), str(tmp_path / "adapter"))
    assert apart(logits(again), scores) < 1e-4
    state = {"parameters": [p.detach() for p in trainable(model)], "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "checkpoint.pt")
    following = step(model, optimizer), logits(model)
    resumed = attached(spec)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    with torch.no_grad():
        for parameter, value in zip(trainable(resumed), checkpoint["parameters"], strict=True):
            parameter.copy_(value)
    optimizer = stage.optimizer(resumed)
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert step(resumed, optimizer) == pytest.approx(following[0], rel=1e-5)
    assert apart(logits(resumed), following[1]) < 1e-5

    # It is merged, or says that it cannot be.
    if method["name"] in NOT_MERGED:
        with pytest.raises(SpecError, match="cannot be merged into the base: virtual tokens"):
            stage.merge(model)
        return
    merged = stage.merge(model)
    assert not hasattr(merged, "peft_config")
    assert not any(hasattr(parameter, "quant_state") for parameter in merged.parameters())
    assert apart(logits(merged), following[1]) < (0.05 if storage else 1e-4)


@pytest.mark.parametrize("kind", ADAPTERS, ids=lambda kind: kind.model_fields["name"].default)
def test_the_next_trial_starts_from_the_base_as_it_was_unless_the_method_changes_it(kind, tiny_model):
    from ray_peft.tasks import kept_base
    from ray_peft.tasks.llm_sft.model import base_key, load_model

    method = plain_method(kind)
    spec = trial(tiny_model, method, NF4 if method["name"] in NOT_PLAIN else None)
    key = base_key(spec, "cpu")
    assert (key is None) == kind.changes_base
    if key is None:
        return
    kept_base.drop()
    base = load_model(spec, "cpu", key)
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in base.named_parameters()}
    model = stage_of(spec).attach(base)
    step(model, stage_of(spec).optimizer(model))
    for name, weight in load_model(spec, "cpu", key).named_parameters():
        address, value = before[name]
        assert weight.data_ptr() == address
        assert torch.equal(weight, value)
        assert not weight.requires_grad
    kept_base.drop()


@pytest.mark.parametrize("iterations", [None, 16])
def test_loftq_starts_nearer_to_the_plain_base_by_what_its_rank_can_hold(iterations, tiny_model):
    """In every layer, the error that is left is that of the best approximation of the rank."""
    from bitsandbytes.functional import dequantize_4bit
    from safetensors.torch import load_file

    method = {"name": "loftq", "rank": 8, "alpha": 32.0, "rank_pattern": {"q_proj": 4}, "iterations": iterations}
    model = attached(trial(tiny_model, method, NF4))
    plain = load_file(tiny_model / "model.safetensors")
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        layer = model.get_submodule(f"base_model.model.model.layers.1.{name}")
        weight = layer.get_base_layer().weight
        lost = plain[f"model.layers.1.{name}.weight"] - dequantize_4bit(weight.data, weight.quant_state)
        update = layer.get_delta_weight("default").detach()
        rank = 4 if name.endswith("q_proj") else 8
        assert torch.linalg.matrix_rank(update) == rank
        best = torch.linalg.svdvals(lost)[rank:].square().sum().sqrt()
        assert float((lost - update).norm()) == pytest.approx(float(best), rel=0.02)
    started, without = logits(model), logits(loaded(trial(tiny_model, {"name": "lora"}, NF4)))
    exact = logits(loaded(trial(tiny_model, {"name": "lora"})))
    assert (started - exact).norm() < (without - exact).norm()
