"""What every method must do, run over the registry on a model of two layers."""

from __future__ import annotations

import pytest
import tiny
import torch

from ray_peft.errors import SpecError
from ray_peft.methods import METHODS
from ray_peft.methods.adapter import Adapter
from ray_peft.methods.base import Stage
from ray_peft.methods.full import FullFineTuning
from ray_peft.methods.galore import GaLore
from ray_peft.methods.lora import LoRA
from ray_peft.methods.none import Untouched
from ray_peft.methods.optimizers import trainable
from ray_peft.methods.qlora import QLoRA
from ray_peft.spec import TrialSpec

STAGES = [
    method
    for method in METHODS
    if issubclass(method, Stage) and (not issubclass(method, Adapter) or method in (LoRA, QLoRA))
]
"""All others of PEFT's adapters are in test_adapters.py."""


@pytest.fixture(scope="module")
def load(tiny_model):
    """A function that loads the tiny base as a method wants it."""
    from ray_peft.tasks.llm_sft.model import load_model

    def loaded(method):
        plain = tiny.plain_spec(tiny_model, "d/d", method.plain(), train__micro_batch_size=8)
        return load_model(TrialSpec.from_plain(plain), "cpu")

    return loaded


def small(method):
    return method(lr=0.01, rank=4) if "rank" in method.model_fields else method(lr=0.003)


def batch():
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (8, 24))
    return {"input_ids": ids, "labels": ids.clone()}


def steps(model, optimizer, count, data=None):
    """Losses of `count` steps on eight repeated rows."""
    data = data or batch()
    losses = []
    for _ in range(count):
        loss = model(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def quantised(model):
    return any(hasattr(p, "quant_state") for p in model.parameters())


@pytest.mark.parametrize("method", STAGES, ids=lambda m: m.model_fields["name"].default)
def test_only_what_is_meant_is_trained_frozen_weights_stay_and_the_loss_falls(method, load):
    stage = small(method)
    model = stage.attach(load(stage))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    full = stage.needs_full_weights
    assert names
    assert full or all("lora_" in name for name in names)
    rests = {name for name, _ in model.named_parameters() if not name.startswith("model.layers.")}
    left_out = rests if stage.name == "badam" else set()
    assert not full or names == {name for name, _ in model.named_parameters()} - left_out
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = steps(model, stage.optimizer(model), 8)
    assert losses[-1] < losses[0] - 0.05
    for name, p in model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name


@pytest.mark.parametrize("method", STAGES, ids=lambda m: m.model_fields["name"].default)
def test_the_optimizer_s_state_saves_and_loads_without_foreign_classes(method, load, tmp_path):
    stage = small(method)
    model = stage.attach(load(stage))
    optimizer = stage.optimizer(model)
    steps(model, optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save({n: p for n, p in model.named_parameters() if p.requires_grad}, tmp_path / "model.pt")
    undisturbed = steps(model, optimizer, 3)

    again = stage.attach(load(stage))
    with torch.no_grad():
        for name, value in torch.load(tmp_path / "model.pt", weights_only=True).items():
            again.get_parameter(name).copy_(value)
    resumed = stage.optimizer(again)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert steps(again, resumed, 3) == pytest.approx(undisturbed, rel=1e-5)


@pytest.mark.parametrize("method", STAGES, ids=lambda m: m.model_fields["name"].default)
def test_merged_weights_are_plain_and_answer_the_same(method, load):
    stage = small(method)
    model = stage.attach(load(stage))
    steps(model, stage.optimizer(model), 4)
    model.eval()
    with torch.no_grad():
        before = model(**batch()).logits
        merged = stage.merge(model).eval()
        after = merged(**batch()).logits
    assert not quantised(merged)
    assert not hasattr(merged, "peft_config")
    assert (before - after).abs().max() < (0.05 if stage.name == "qlora" else 1e-4)


def test_none_trains_nothing():
    assert Untouched().stages(10) == []


@pytest.mark.parametrize("method", STAGES, ids=lambda m: m.model_fields["name"].default)
def test_stages_lose_no_step(method):
    assert sum(count for _, count in method().stages(17)) == 17


def test_rank_8_on_one_64_square_layer_trains_1024_parameters(load):
    stage = LoRA(rank=8, targets=("q_proj",))
    model = stage.attach(load(stage))
    assert sum(p.numel() for p in trainable(model)) == 2 * 8 * (64 + 64)


def test_adapters_train_in_the_dtype_asked_for(load):
    for dtype in ("float32", "bfloat16"):
        stage = QLoRA(rank=2, adapter_dtype=dtype)
        model = stage.attach(load(stage))
        assert {p.dtype for p in trainable(model)} == {getattr(torch, dtype)}


def test_qlora_stores_the_base_in_four_bits(load):
    model = load(QLoRA())
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.quant_type == "nf4"
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.nested


def one_step(method, model):
    stage = method
    attached = stage.attach(model)
    before = {n: p.detach().clone() for n, p in attached.named_parameters()}
    data = batch()
    attached(**data).loss.backward()
    gradients = {n: p.grad.clone() for n, p in attached.named_parameters()}
    stage.optimizer(attached).step()
    return before, gradients, attached


def test_galore_s_first_step_is_the_papers_worked_out_by_hand(load):
    stage = GaLore(
        rank=4, lr=0.01, scale=0.5, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6, weights="float32", svd="exact"
    )
    before, gradients, model = one_step(stage, load(stage))
    name = "model.layers.0.mlp.up_proj.weight"  # (128, 64): tall, so projected from the right
    weight, gradient = before[name], gradients[name]
    basis = torch.linalg.svd(gradient, full_matrices=False)[2][:4]
    low = gradient @ basis.T
    first, second = (1 - 0.8) * low, (1 - 0.9) * low**2
    size = 0.01 * (1 - 0.9) ** 0.5 / (1 - 0.8)
    moved = weight - size * 0.5 * (first / (second.sqrt() + 1e-6)) @ basis
    expected = moved - 0.01 * 0.1 * moved
    assert torch.allclose(model.get_parameter(name), expected, atol=1e-6)


def test_galore_moments_live_in_the_subspace(load):
    stage = GaLore(rank=4)
    model = stage.attach(load(stage))
    optimizer = stage.optimizer(model)
    steps(model, optimizer, 1)
    assert optimizer.state[model.model.layers[0].mlp.up_proj.weight]["exp_avg"].shape == (128, 4)
    assert optimizer.state[model.model.layers[0].mlp.down_proj.weight]["exp_avg"].shape == (4, 128)
    assert optimizer.state[model.model.embed_tokens.weight]["exp_avg"].shape == (272, 64)


@pytest.mark.parametrize(("weights", "within"), [("float32", 1e-6), ("bfloat16_stochastic", 1e-3)])
def test_layerwise_galore_equals_galore_and_frees_gradients(load, weights, within):
    plain = GaLore(rank=4, lr=0.01, weights=weights)
    layerwise = plain.model_copy(update={"layerwise": True, "max_grad_norm": None})
    first, second = plain.attach(load(plain)), layerwise.attach(load(layerwise))
    one, two = plain.optimizer(first), layerwise.optimizer(second)
    assert steps(first, one, 5) == pytest.approx(steps(second, two, 5), rel=within)
    second(**batch()).loss.backward()
    assert all(p.grad is None for p in second.parameters())


def test_galore_names_the_layers_where_none_matches(load):
    stage = GaLore(targets=("zzz",))
    with pytest.raises(SpecError, match="end in down_proj, gate_proj, k_proj"):
        stage.optimizer(stage.attach(load(stage)))


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_eight_bit_and_paged_adamw_train(optim, load):
    stage = FullFineTuning(lr=0.003, optim=optim, weights="float32")
    model = stage.attach(load(stage))
    losses = steps(model, stage.optimizer(model), 6)
    assert losses[-1] < losses[0]


def test_layerwise_galore_leaves_no_weights_behind():
    """Hooks of a tensor are out of the collector's sight: 3.4 GiB of a Gemma-3-1B stayed on the GPU through them."""
    import gc
    import weakref

    import torch

    from ray_peft.methods.galore_adamw import LayerwiseGaLoreAdamW

    model = torch.nn.Linear(64, 64)
    groups = [
        {
            "params": [model.weight],
            "rank": 4,
            "update_proj_gap": 2,
            "scale": 1.0,
            "proj_type": "std",
            "svd": "randomized",
        }
    ]
    optimizer = LayerwiseGaLoreAdamW(groups, lr=1e-3)
    before = model.weight.detach().clone()
    model(torch.ones(2, 64)).sum().backward()
    assert not torch.equal(before, model.weight)
    assert model.weight.grad is None
    weight = weakref.ref(model.weight)
    del model, optimizer, groups
    gc.collect()
    assert weight() is None
