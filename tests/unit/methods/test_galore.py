"""GaLore's optimizer beside galore-torch's, its subspaces beside exact ones, its frugal ways beside the plain one."""

from __future__ import annotations

import copy

import galore_torch
import pytest
import torch

from ray_peft.methods import subspace
from ray_peft.methods.galore_adamw import BASIS, GaLoreAdamW
from ray_peft.methods.host_gradients import HostGaLoreAdamW

SHAPES = [(24, 40), (24, 40), (40, 24), (16, 16), (30, 9), (7,), (5, 4)]
SETTINGS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}
REFERENCE = {"rank": 4, "update_proj_gap": 3, "scale": 0.5, "proj_type": "std"}


def weights(dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def grouped(parameters, **changes):
    subspaces = {**REFERENCE, **changes}
    return [
        {"params": parameters[:5], "weight_decay": 0.1, **subspaces},
        {"params": parameters[5:], "weight_decay": 0.0},
    ]


def gradients(parameters, seed, step):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return [torch.randn(parameter.shape, generator=generator).to(parameter.dtype) for parameter in parameters]


def take_steps(parameters, optimizer, steps, seed=1):
    for step in steps:
        for parameter, gradient in zip(parameters, gradients(parameters, seed, step), strict=True):
            parameter.grad = gradient
        optimizer.step()


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_with_exact_subspaces_it_is_galore_torchs_optimizer(proj_type, dtype, within):
    ours, theirs = weights(dtype), weights(dtype)
    take_steps(ours, GaLoreAdamW(grouped(ours, proj_type=proj_type, svd="exact"), **SETTINGS), range(7))
    reference = galore_torch.GaLoreAdamW(grouped(theirs, proj_type=proj_type), no_deprecation_warning=True, **SETTINGS)
    take_steps(theirs, reference, range(7))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=within, atol=within)


def spread(rows, columns, decay, rank=None):
    """A matrix whose singular values fall as their number to the power of -decay."""
    torch.manual_seed(rows)
    left, right = torch.linalg.qr(torch.randn(rows, columns))[0], torch.linalg.qr(torch.randn(columns, columns))[0]
    values = torch.arange(1, columns + 1.0) ** -decay
    values[rank or columns :] = 0
    return left @ torch.diag(values) @ right


def start(weight, columns):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(min(weight.shape), columns, generator=generator).double()


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_iterated_subspaces_hold_what_exact_ones_hold(decay):
    tall = spread(160, 96, decay)
    matrices = [tall, tall.mT.contiguous(), spread(120, 96, decay)]
    bases = subspace.iterated(matrices, lambda weight: weight, start, 16)
    for place, matrix in enumerate(matrices):
        side = subspace.side_of(matrix.shape, "std")
        (exact,) = subspace.exact(matrix, 16, side)
        energy, most = (subspace.projected(matrix, [basis], side).norm() ** 2 for basis in (bases[place], exact))
        assert energy > 0.998 * most
        low = subspace.projected(matrix, [bases[place]], side)
        products = low.mT @ low if side == "right" else low @ low.mT  # of singular vectors, diagonal and falling
        assert (products - products.diag().diag()).abs().max() < 1e-4 * products.max()
        assert (products.diag().diff() <= 1e-6).all()


@pytest.mark.parametrize("matrix", [spread(40, 24, 1.0, rank=1), torch.zeros(40, 24)], ids=["rank 1", "zero"])
def test_a_gradient_of_too_low_a_rank_has_an_orthonormal_basis_all_the_same(matrix):
    basis = subspace.iterated([matrix], lambda weight: weight, start, 8)[0]
    torch.testing.assert_close(basis @ basis.mT, torch.eye(8), atol=1e-5, rtol=0)


def test_a_gradient_that_is_not_finite_is_left_to_the_guard():
    (weight,) = weights(shapes=[(12, 8)])
    optimizer = GaLoreAdamW([{"params": [weight], **REFERENCE, "svd": "randomized"}], lr=0.1)
    weight.grad = torch.full_like(weight, float("nan"))
    optimizer.step()
    assert weight.isnan().any()


def test_the_seed_decides_iterated_subspaces_and_a_resume_goes_on_with_them():
    def built(parameters):
        torch.manual_seed(3)
        return GaLoreAdamW(grouped(parameters, svd="randomized"), **SETTINGS)

    first, again = weights(), weights()
    one, other = built(first), built(again)
    take_steps(first, one, range(4))
    take_steps(again, other, range(4))
    assert all(torch.equal(mine, its) for mine, its in zip(first, again, strict=True))
    saved = copy.deepcopy(other.state_dict())
    resumed = built(again)
    resumed.load_state_dict(saved)
    take_steps(first, one, range(4, 9))
    take_steps(again, resumed, range(4, 9))
    assert all(torch.equal(mine, its) for mine, its in zip(first, again, strict=True))


def test_a_checkpoint_of_an_earlier_version_goes_on_exactly():
    parameters = weights()
    take_steps(parameters, optimizer := GaLoreAdamW(grouped(parameters, svd="exact"), **SETTINGS), range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group.pop("svd", None)
        group["correct_bias"] = True
    earlier = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = GaLoreAdamW(grouped(earlier, svd="exact"), **SETTINGS)
    resumed.load_state_dict(saved)
    take_steps(parameters, optimizer, range(2, 6))
    take_steps(earlier, resumed, range(2, 6))
    assert all(torch.equal(mine, its) for mine, its in zip(parameters, earlier, strict=True))


LARGE = [(80, 96), (96, 80), (80, 96), (64, 72), (72, 64), (70,), (90, 70)]


@pytest.mark.parametrize("stochastic", [False, True])
def test_moments_in_8_bits_move_weights_nearly_as_whole_ones_do_and_resume(stochastic):
    dtype = torch.bfloat16 if stochastic else torch.float32
    large = {"rank": 48, "svd": "exact"}
    exact, coarse = weights(dtype, LARGE), weights(dtype, LARGE)
    begin = [weight.detach().clone().float() for weight in exact]
    take_steps(exact, GaLoreAdamW(grouped(exact, **large), **SETTINGS, stochastic=stochastic), range(6))
    optimizer = GaLoreAdamW(grouped(coarse, **large), **SETTINGS, stochastic=stochastic, eight_bit=True)
    take_steps(coarse, optimizer, range(6))
    for before, mine, other in zip(begin, exact, coarse, strict=True):
        moved = (mine.float() - before).norm()
        assert (mine.float() - other.float()).norm() < (
            0.4 if stochastic else 0.15
        ) * moved  # two roundings at random differ
    kinds = {len(state["exp_avg"].view(-1)) >= 4096: state["exp_avg"].dtype for state in optimizer.state.values()}
    assert kinds == {True: torch.uint8, False: torch.float32}

    halves = [torch.nn.Parameter(weight.detach().clone()) for weight in coarse]
    saved = copy.deepcopy(optimizer.state_dict())
    again = GaLoreAdamW(grouped(halves, **large), **SETTINGS, stochastic=stochastic, eight_bit=True)
    again.load_state_dict(saved)
    take_steps(coarse, optimizer, range(6, 9))
    take_steps(halves, again, range(6, 9))
    assert all(torch.equal(one, other) for one, other in zip(coarse, halves, strict=True))


@pytest.mark.parametrize("limit", [None, 0.5])
def test_gradients_that_add_up_on_the_host_are_those_that_add_up_on_the_device(monkeypatch, limit):
    monkeypatch.setattr("ray_peft.methods.host_gradients.SMALL", 50)
    here, away = weights(), weights()
    plain = GaLoreAdamW(grouped(here, svd="randomized"), **SETTINGS)
    host = HostGaLoreAdamW(grouped(away, svd="randomized"), **SETTINGS)
    assert [host.holds_gradient(weight) for weight in away] == [True] * 5 + [False] * 2
    norms = []
    for step in range(7):
        for seed in (1, 2):  # two passes a step
            for parameters in (here, away):
                drawn = gradients(parameters, seed, step)
                sum((weight * part).sum() for weight, part in zip(parameters, drawn, strict=True)).backward()
        assert all(weight.grad is None for weight in away[:5])
        whole = torch.nn.utils.clip_grad_norm_(here, float("inf") if limit is None else limit)
        norms.append((float(whole), float(host.clip(limit))))
        for optimizer in (plain, host):
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    assert [one for one, _ in norms] == pytest.approx([other for _, other in norms], rel=1e-5)
    for mine, other in zip(here, away, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_gradients_on_the_host_leave_no_weights_behind():
    import gc
    import weakref

    model = torch.nn.Linear(300, 300)
    optimizer = HostGaLoreAdamW([{"params": [model.weight], **REFERENCE, "svd": "randomized"}], lr=1e-3)
    model(torch.ones(2, 300)).sum().backward()
    assert model.weight.grad is None
    weight = weakref.ref(model.weight)
    del model, optimizer
    gc.collect()
    assert weight() is None


def test_a_step_has_the_same_basis_for_every_weight_of_a_shape_as_alone():
    together, alone = weights(), weights()
    take_steps(together, one := GaLoreAdamW(grouped(together, svd="exact"), **SETTINGS), range(1))
    assert {BASIS, "step", "exp_avg", "exp_avg_sq"} == set(one.state[together[0]])
    for place, weight in enumerate(alone[:5]):
        (basis,) = subspace.exact(gradients(alone, 1, 0)[place], 4, subspace.side_of(weight.shape, "std"))
        torch.testing.assert_close(one.state[together[place]][BASIS], basis)


def test_settings_that_cannot_go_together_are_refused():
    import tiny

    from ray_peft.errors import SpecError
    from ray_peft.spec import TrialSpec

    host = {"name": "galore", "gradients": "host"}
    layerwise = {**host, "layerwise": True, "max_grad_norm": None}
    for method, changes, words in (
        (host, {"train__engine": "trl"}, "method.gradients: host cannot be trained by train.engine: trl"),
        (host, {"resources": {"num_workers": 2}}, r"needs resources.num_workers: 1 \(found 2\)"),
        (layerwise, {"train__micro_batch_size": 8}, "layerwise GaLore keeps no gradient, so method.gradients: host"),
    ):
        with pytest.raises((SpecError, ValueError), match=words):
            TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d", method, **changes))
    assert TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d", host, train__micro_batch_size=2)).accumulation == 4


def test_a_kernel_that_fails_or_computes_other_numbers_is_not_used(monkeypatch, caplog):
    from ray_peft.methods import fused

    def right(weight, grad, moments, *, betas, eps, size, decay, seed):
        first, second = moments
        first.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
        second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        weight.sub_(size * first / (second.sqrt() + eps)).mul_(1 - decay)

    def failing(*args, **settings):
        raise RuntimeError("no compiler")

    usable = []
    for kernel in (right, failing, lambda *args, **settings: None):
        monkeypatch.setattr(fused, "adamw", kernel)
        fused._works.cache_clear()
        usable.append(fused._works(torch.device("cpu")))
    fused._works.cache_clear()
    assert usable == [True, False, False]
    assert ["no compiler" in caplog.messages[0], "other numbers" in caplog.messages[1]] == [True, True]
