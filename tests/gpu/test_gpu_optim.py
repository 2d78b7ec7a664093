"""Optimizers of whole models on a GPU: with the kernel as without it, and Muon beside torch's."""

from __future__ import annotations

import pytest
import torch

from ray_peft.methods import fused
from ray_peft.methods.galore_adamw import GaLoreAdamW
from ray_peft.methods.optim.low_rank_rules import ScaledGradient, ScaledRest
from ray_peft.methods.optim.muon_adamw import MuonAdamW

pytestmark = pytest.mark.gpu

SHAPES = [(80, 96), (96, 80), (80, 96), (70,)]


def moved(make, steps=5):
    """Weights in float32 after a few steps, on the GPU."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape).cuda()) for shape in SHAPES]
    optimizer = make(weights)
    for step in range(steps):
        for weight in weights:
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            weight.grad = drawn.to(weight)
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("rule", [ScaledRest(), ScaledGradient(by_matrix=False), ScaledGradient(by_matrix=True)])
def test_fira_and_apollo_move_weights_with_the_kernel_as_without(monkeypatch, rule):
    subspace = {"rank": 8, "update_proj_gap": 3, "scale": 0.5, "proj_type": "std", "svd": "exact"}

    def make(weights):
        groups = [{"params": weights[:3], "weight_decay": 0.1, **subspace}, {"params": weights[3:]}]
        return GaLoreAdamW(groups, lr=0.05, stochastic=True, rule=rule)  # float32 is not rounded

    assert fused.serves(torch.ones(4, device="cuda"))
    with_kernel = moved(make)
    monkeypatch.setattr(fused, "serves", lambda _: False)
    for one, other in zip(with_kernel, moved(make), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_muon_moves_matrices_as_torchs_does():
    settings = {"momentum": 0.95, "nesterov": True, "rounds": 5}
    ours = moved(lambda weights: MuonAdamW([{"params": weights[:3], "weight_decay": 0.1, **settings}], lr=0.01))

    def theirs(weights):
        return torch.optim.Muon(weights[:3], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")

    for one, other in zip(ours[:3], moved(theirs)[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=5e-3)  # the iteration is in bfloat16
