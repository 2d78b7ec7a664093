"""Optimizers of whole models beside the algorithms of their papers, written out for one matrix at a time."""

from __future__ import annotations

import math

import pytest
import torch

from ray_peft.methods.badam import BAdam
from ray_peft.methods.galore_adamw import BASIS, GaLoreAdamW, LayerwiseGaLoreAdamW
from ray_peft.methods.host_gradients import HostGaLoreAdamW
from ray_peft.methods.lisa import LISA
from ray_peft.methods.optim.layers_in_turn import train_in_turns
from ray_peft.methods.optim.low_rank_rules import ScaledGradient, ScaledRest
from ray_peft.methods.optim.muon_adamw import LayerwiseMuonAdamW, MuonAdamW, orthogonalised
from ray_peft.methods.stochastic import StochasticAdamW

SHAPES = [(24, 40), (24, 40), (40, 24), (16, 16), (7,), (5, 4)]
SETTINGS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}
OF_SUBSPACES = {"rank": 4, "update_proj_gap": 3, "scale": 0.5, "proj_type": "std", "svd": "exact"}
OF_MUON = {"momentum": 0.9, "nesterov": True, "rounds": 5}


def weights(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def grouped(parameters, settings):
    return [
        {"params": parameters[:4], "weight_decay": 0.1, **settings},
        {"params": parameters[4:], "weight_decay": 0.0},
    ]


def gradient(parameter, step, growth=1.0):
    generator = torch.Generator().manual_seed(1000 * parameter.numel() + step)
    return torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * growth**step


def take_steps(parameters, optimizer, steps, growth=1.0):
    for step in steps:
        for parameter in parameters:
            parameter.grad = gradient(parameter, step, growth)
        optimizer.step()


def adam(low, state, step):
    """AdamW's direction and step size, as the papers' code computes them."""
    beta1, beta2 = SETTINGS["betas"]
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * low
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * low**2
    size = SETTINGS["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return state["m"] / (state["v"].sqrt() + SETTINGS["eps"]), size


def in_growth(update, state):
    """The norm-growth limiter: algorithm 1 of Fira, and of APOLLO."""
    norm = update.norm()
    if "norm" in state:
        excess = max(norm / (state["norm"] + 1e-8), 1.01) / 1.01
        update, norm = update / excess, norm / excess
    state["norm"] = norm
    return update


def fira(weight, grad, state, step):
    """One step for one matrix (m, n); a subspace every third step."""
    wide = weight.shape[0] < weight.shape[1]
    if (step - 1) % 3 == 0:
        left, _, right = torch.linalg.svd(grad, full_matrices=False)
        state["basis"] = left[:, :4] if wide else right[:4].mT
    basis, scale = state["basis"], 0.5
    low = basis.mT @ grad if wide else grad @ basis
    direction, size = adam(low, state, step)
    back, inside = (scale * (basis @ part if wide else part @ basis.mT) for part in (direction, low))
    factor = direction.norm(dim=0 if wide else 1, keepdim=True) / (low.norm(dim=0 if wide else 1, keepdim=True) + 1e-8)
    update = back + in_growth((grad - inside) * factor, state)
    return (weight - size * update) * (1 - SETTINGS["lr"] * 0.1)


@pytest.mark.parametrize("growth", [1.0, 1.5])
def test_fira_is_its_papers_algorithm(growth):
    """With gradients that grow, the limiter is at work, too."""
    parameters, expected, states = weights(), [w.detach().clone() for w in weights()], [{} for _ in range(4)]
    take_steps(
        parameters, GaLoreAdamW(grouped(parameters, OF_SUBSPACES), rule=ScaledRest(), **SETTINGS), range(7), growth
    )
    for step in range(7):
        for place in range(4):
            grad = gradient(expected[place], step, growth)
            expected[place] = fira(expected[place], grad, states[place], step + 1)
    for mine, other in zip(parameters[:4], expected[:4], strict=True):
        torch.testing.assert_close(mine.detach(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_matrix", [False, True])
def test_apollo_is_its_papers_algorithm_on_the_subspaces_that_it_draws(by_matrix):
    settings = {**OF_SUBSPACES, "rank": 1 if by_matrix else 4}
    parameters, expected, states = weights(), [w.detach().clone() for w in weights()], [{} for _ in range(4)]
    optimizer = GaLoreAdamW(grouped(parameters, settings), rule=ScaledGradient(by_matrix=by_matrix), **SETTINGS)
    bases = []
    for step in range(7):
        take_steps(parameters, optimizer, [step], 1.2)
        sides = ["right" if p.shape[0] >= p.shape[1] else "left" for p in parameters[:4]]
        bases.append([optimizer._bases(settings, p, side)[0] for p, side in zip(parameters, sides, strict=False)])
        for place, side in enumerate(sides):
            grad, basis = gradient(expected[place], step, 1.2), bases[step][place]
            low = grad @ basis.mT if side == "right" else basis.mT @ grad
            direction, size = adam(low, states[place], step + 1)
            axes = (0, 1) if by_matrix else (1 if side == "right" else 0)
            factor = direction.norm(dim=axes, keepdim=True) / (low.norm(dim=axes, keepdim=True) + 1e-8)
            update = 0.5 * in_growth(grad * factor, states[place])
            expected[place] = (expected[place] - size * update) * (1 - SETTINGS["lr"] * 0.1)
    for mine, other in zip(parameters[:4], expected[:4], strict=True):
        torch.testing.assert_close(mine.detach(), other, rtol=1e-4, atol=1e-5)
    assert torch.equal(bases[0][0], bases[2][0])  # a subspace lasts three steps
    assert not torch.allclose(bases[2][0], bases[3][0])
    assert not torch.allclose(bases[0][0], bases[0][1])  # and is the matrix's own
    assert all(BASIS not in state for state in optimizer.state.values())
    variance = torch.cat([basis.reshape(-1) for row in bases for basis in row]).var()
    assert variance == pytest.approx(1 / settings["rank"], rel=0.3)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_muon_and_adamw(nesterov):
    parameters, others = weights(), weights()
    take_steps(parameters, MuonAdamW(grouped(parameters, {**OF_MUON, "nesterov": nesterov}), **SETTINGS), range(5))
    muon = torch.optim.Muon(
        others[:4], lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    take_steps(others[:4], muon, range(5))
    for mine, other in zip(parameters[:4], others[:4], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)  # their iteration is in bfloat16
    plain = weights()[4:]
    take_steps(plain, torch.optim.AdamW(plain, lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0), range(5))
    for mine, other in zip(parameters[4:], plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_singular_values_come_near_one():
    torch.manual_seed(0)
    matrices = torch.randn(3, 40, 24) @ torch.diag(torch.logspace(0, -2, 24))
    values = torch.linalg.svdvals(orthogonalised(matrices, 5).float())
    assert values.max() < 1.3
    assert values.min() > 0.5


KINDS = {
    "fira": (OF_SUBSPACES, lambda groups, **more: GaLoreAdamW(groups, rule=ScaledRest(), **SETTINGS, **more)),
    "apollo": (
        OF_SUBSPACES,
        lambda groups, **more: GaLoreAdamW(groups, rule=ScaledGradient(by_matrix=False), **SETTINGS, **more),
    ),
    "muon": (OF_MUON, lambda groups, **more: MuonAdamW(groups, **SETTINGS, **more)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_rounding_moves_weights_that_the_nearest_would_leave(kind):
    settings, make = KINDS[kind]

    def moved(stochastic):
        parameters = [torch.nn.Parameter(torch.full_like(w, 100.0, dtype=torch.bfloat16)) for w in weights()]
        optimizer = make(grouped(parameters, settings), stochastic=stochastic)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        before = [parameter.detach().clone() for parameter in parameters]
        take_steps(parameters, optimizer, range(3))
        pairs = zip(parameters[:4], before, strict=False)
        return sum(int((now != then).sum()) for now, then in pairs)

    assert moved(stochastic=True) > 5
    assert moved(stochastic=False) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_resume_goes_on_with_the_same_numbers(kind, stochastic, tmp_path):
    settings, make = KINDS[kind]
    parameters = weights(torch.bfloat16 if stochastic else torch.float32)
    optimizer = make(grouped(parameters, settings), stochastic=stochastic)
    take_steps(parameters, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    take_steps(parameters, optimizer, range(2, 6))
    torch.manual_seed(0)
    again = make(grouped(resumed, settings), stochastic=stochastic)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    take_steps(resumed, again, range(2, 6))
    for mine, other in zip(parameters, resumed, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("layerwise", "plain", "settings", "more"),
    [
        (LayerwiseGaLoreAdamW, GaLoreAdamW, OF_SUBSPACES, {"rule": ScaledRest()}),
        (LayerwiseGaLoreAdamW, GaLoreAdamW, OF_SUBSPACES, {"rule": ScaledGradient(by_matrix=True)}),
        (LayerwiseMuonAdamW, MuonAdamW, OF_MUON, {}),
    ],
)
def test_layer_by_layer_it_is_the_same_and_frees_gradients(layerwise, plain, settings, more):
    one, other = weights(), weights()
    take_steps(one, plain(grouped(one, settings), **SETTINGS, **more), range(4))
    optimizer = layerwise(grouped(other, settings), **SETTINGS, **more)
    for step in range(4):
        sum((p * gradient(p, step)).sum() for p in other).backward()
        optimizer.step()
        assert all(parameter.grad is None for parameter in other)
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [ScaledRest(), ScaledGradient(by_matrix=False)])
def test_gradients_on_the_host_change_nothing(rule):
    parameters = [torch.nn.Parameter(torch.randn(300, 256)) for _ in range(2)]
    away = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    groups = [[{"params": each, "weight_decay": 0.0, **OF_SUBSPACES}] for each in (parameters, away)]
    plain, host = GaLoreAdamW(groups[0], rule=rule, **SETTINGS), HostGaLoreAdamW(groups[1], rule=rule, **SETTINGS)
    for step in range(4):
        for each, optimizer in ((parameters, plain), (away, host)):
            sum((p * gradient(p, step)).sum() for p in each).backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in zip(parameters, away, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def layers(count=4):
    torch.manual_seed(0)
    return [[torch.nn.Parameter(torch.randn(6, 6)), torch.nn.Parameter(torch.randn(6))] for _ in range(count)]


def in_turns(blocks, head, choice, every=2):
    parameters = [p for block in blocks for p in block]
    optimizer = StochasticAdamW([{"params": [*parameters, head], "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.99))
    return train_in_turns(optimizer, blocks, choice, every)


def turn_steps(blocks, head, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        trained = [p for block in blocks for p in block if p.requires_grad]
        sum((p * gradient(p, step)).sum() for p in [*trained, head]).backward()
        optimizer.step()


def test_layers_that_rest_are_not_touched_and_begin_anew():
    """Layer 1 in its second turn moves as AdamW does from its first step on."""
    blocks, head = layers(), torch.nn.Parameter(torch.ones(3))
    optimizer = in_turns(blocks, head, lambda turn, _: [(1, 2, 1, 0)[turn]])
    before = [[p.detach().clone() for p in block] for block in blocks]
    turn_steps(blocks, head, optimizer, range(2))
    changed = [
        any(not torch.equal(p, q) for p, q in zip(b, c, strict=True)) for b, c in zip(blocks, before, strict=True)
    ]
    assert changed == [False, True, False, False]
    turn_steps(blocks, head, optimizer, range(2, 4))
    assert {id(p) for p in optimizer.state} == {id(head)}  # the third turn has not stepped yet
    alone = [torch.nn.Parameter(p.detach().clone()) for p in blocks[1]]
    turn_steps(blocks, head, optimizer, range(4, 6))
    turn_steps([alone], torch.nn.Parameter(torch.ones(3)), StochasticAdamW(
        [{"params": alone}], lr=0.01, betas=(0.9, 0.99)), range(4, 6))  # fmt: skip
    for mine, other in zip(blocks[1], alone, strict=True):
        assert torch.equal(mine, other)
    assert optimizer.state[head]["step"] == 6


def test_a_resume_in_mid_turn_trains_the_same_layers(tmp_path):
    stage = LISA(layers=2, every=3)

    def choice(turn, seed):
        return stage.chosen(turn, 4, seed)

    blocks, head = layers(), torch.nn.Parameter(torch.ones(3))
    optimizer = in_turns(blocks, head, choice, every=3)
    turn_steps(blocks, head, optimizer, range(4))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    copies = [[torch.nn.Parameter(p.detach().clone()) for p in block] for block in blocks]
    other_head = torch.nn.Parameter(head.detach().clone())
    turn_steps(blocks, head, optimizer, range(4, 10))
    torch.manual_seed(0)
    again = in_turns(copies, other_head, choice, every=3)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    turn_steps(copies, other_head, again, range(4, 10))
    for block, copied in zip(blocks, copies, strict=True):
        for mine, other in zip(block, copied, strict=True):
            assert torch.equal(mine, other)


def test_lisa_draws_layers_and_badam_gives_each_its_turn():
    drawn = [LISA(layers=2).chosen(turn, 12, seed=7) for turn in range(60)]
    assert all(len(set(layers)) == 2 for layers in drawn)
    assert {layer for layers in drawn for layer in layers} == set(range(12))
    assert drawn == [LISA(layers=2).chosen(turn, 12, seed=7) for turn in range(60)]
    assert drawn != [LISA(layers=2).chosen(turn, 12, seed=8) for turn in range(60)]
    turns = [BAdam().chosen(turn, 5, seed=7)[0] for turn in range(10)]
    assert sorted(turns[:5]) == sorted(turns[5:]) == list(range(5))
    assert [BAdam(order="descending").chosen(turn, 3, 0)[0] for turn in range(4)] == [2, 1, 0, 2]
    assert [BAdam(order="ascending").chosen(turn, 3, 0)[0] for turn in range(4)] == [0, 1, 2, 0]
