"""Stochastic rounding: unbiased, and the same optimizer as the float32 one where nothing is rounded."""

from __future__ import annotations

import copy

import galore_torch
import pytest
import torch

from ray_peft.methods import stochastic
from ray_peft.methods.galore_adamw import GaLoreAdamW
from ray_peft.methods.stochastic import StochasticAdamW, rounded

SHAPES = [(12, 20), (20, 12), (16, 16), (7,)]
SUBSPACE = {"rank": 4, "update_proj_gap": 3, "scale": 0.5, "proj_type": "std", "svd": "exact"}


def weights(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def take_steps(parameters, optimizer, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def grouped(parameters):
    return [
        {"params": parameters[:3], "weight_decay": 0.1, **SUBSPACE},
        {"params": parameters[3:], "weight_decay": 0.0},
    ]


def test_a_value_goes_to_one_of_its_two_neighbours_with_the_right_mean():
    torch.manual_seed(0)
    step = 2**-7  # between neighbours in bfloat16 from 1 to 2
    for value in (1 + 0.25 * step, -1 - 0.25 * step):
        found = rounded(torch.full((40_000,), value), torch.bfloat16).double()
        assert set(found.abs().tolist()) == {1.0, 1 + step}
        assert abs(found.mean().item() - value) < 0.01 * step


def test_values_that_bfloat16_holds_stay_and_so_do_infinities():
    kept = torch.tensor([0.0, 1.0, -3.5, 2.0**-100, float("inf"), float("-inf")])
    assert torch.equal(rounded(kept.clone(), torch.bfloat16).float(), kept)
    assert rounded(torch.tensor([float("nan")]), torch.bfloat16).isnan().all()


@pytest.mark.parametrize("bucket", [stochastic.BUCKET, 50])
def test_in_float32_it_is_torchs_adamw(monkeypatch, bucket):
    monkeypatch.setattr(stochastic, "BUCKET", bucket)  # 50: tensors are cut, and several share a bucket
    ours, theirs = weights(), weights()
    settings = {"lr": 0.01, "betas": (0.9, 0.99)}
    take_steps(ours, StochasticAdamW([{"params": ours, "weight_decay": 0.1}], **settings), 7)
    take_steps(theirs, torch.optim.AdamW([{"params": theirs, "weight_decay": 0.1}], **settings), 7)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_in_float32_it_is_galore_torchs_optimizer():
    ours, theirs = weights(), weights()
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}
    take_steps(ours, GaLoreAdamW(grouped(ours), stochastic=True, **settings), 7)
    take_steps(theirs, galore_torch.GaLoreAdamW(grouped(theirs), no_deprecation_warning=True, **settings), 7)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_small_updates_move_bfloat16_weights_only_if_rounded_stochastically():
    torch.manual_seed(0)
    moved = {}
    for kind in (StochasticAdamW, torch.optim.AdamW):
        weight = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
        optimizer = kind([{"params": [weight], "weight_decay": 0.0}], lr=1e-4, betas=(0.9, 0.999))
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[kind] = 1 - weight.double().mean().item()
    assert moved[torch.optim.AdamW] == 0.0
    assert moved[StochasticAdamW] == pytest.approx(0.01, rel=0.05)


def test_trained_weights_are_rounded_but_not_the_rotary_frequencies(tiny_model):
    from transformers import AutoModelForCausalLM

    from ray_peft.methods.full import FullFineTuning

    model = FullFineTuning().attach(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("galore", [False, True])
def test_saved_and_loaded_it_goes_on_as_if_undisturbed(galore):
    def built(parameters):
        if galore:
            return GaLoreAdamW(grouped(parameters), lr=0.01, stochastic=True)
        return StochasticAdamW([{"params": parameters, "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.999))

    whole = weights(torch.bfloat16)
    optimizer = built(whole)
    take_steps(whole, optimizer, 4)
    halves = [torch.nn.Parameter(weight.detach().clone()) for weight in whole]
    saved = copy.deepcopy(optimizer.state_dict())
    take_steps(whole, optimizer, 4, seed=2)
    again = built(halves)
    again.load_state_dict(saved)
    take_steps(halves, again, 4, seed=2)
    assert all(torch.equal(one, other) for one, other in zip(whole, halves, strict=True))
    assert all(state["exp_avg"].dtype == torch.bfloat16 for state in again.state.values())
