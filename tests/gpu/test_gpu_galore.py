"""GaLore on a GPU: the kernel's arithmetic, and gradients that wait on the host beside those of the GPU."""

from __future__ import annotations

import pytest
import tiny
import torch

from ray_peft.methods import fused
from ray_peft.methods.galore_adamw import GaLoreAdamW
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.task import LlmSft

pytestmark = pytest.mark.gpu

PLAIN = {"name": "galore", "rank": 4, "lr": 0.003, "update_proj_gap": 3, "weights": "float32", "weight_decay": 0.1}


def test_the_kernel_computes_what_torch_does():
    torch.manual_seed(0)
    weight, grad, first = (torch.randn(3000, device="cuda") for _ in range(3))
    second = torch.rand(3000, device="cuda")
    mean, square = first * 0.9 + grad * 0.1, second * 0.99 + grad * grad * 0.01
    moved = weight - 0.01 * mean / (square.sqrt() + 1e-6)
    expected = moved - 0.001 * moved
    assert fused.serves(weight)
    fused.adamw(weight, grad, [first, second], betas=(0.9, 0.99), eps=1e-6, size=0.01, decay=0.001, seed=7)
    for found, wanted in ((weight, expected), (first, mean), (second, square)):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_kernel_rounds_to_a_neighbour_with_the_right_mean_and_by_its_seed():
    def moved(seed):
        weight = torch.ones(200_000, dtype=torch.bfloat16, device="cuda")
        fused.move(weight, torch.full_like(weight, -0.25 * 2**-7), size=1.0, decay=0.0, seed=seed)
        return weight

    weight = moved(2**61 + 7)
    assert set(weight.float().unique().tolist()) == {1.0, 1 + 2**-7}
    assert (weight.double().mean().item() - 1) / 2**-7 == pytest.approx(0.25, abs=0.01)
    assert torch.equal(weight, moved(2**61 + 7))
    assert not torch.equal(weight, moved(2**61 + 8))


@pytest.mark.parametrize("eight_bit", [False, True])
def test_weights_move_with_the_kernel_as_without(monkeypatch, eight_bit):
    def run(serves):
        monkeypatch.setattr(fused, "serves", serves)
        torch.manual_seed(0)
        shapes = [(80, 96), (96, 80), (80, 96), (70,), (90, 70)]
        weights = [torch.nn.Parameter(torch.randn(shape).bfloat16().cuda()) for shape in shapes]
        begin = [weight.detach().float() for weight in weights]
        subspace = {"rank": 48, "update_proj_gap": 3, "scale": 0.5, "proj_type": "std", "svd": "exact"}
        groups = [{"params": weights[:3], "weight_decay": 0.1, **subspace}, {"params": weights[3:]}]
        optimizer = GaLoreAdamW(groups, lr=0.05, stochastic=True, eight_bit=eight_bit)
        for step in range(4):
            for weight in weights:
                drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
                weight.grad = drawn.to(weight)
            optimizer.step()
        return [weight.detach().float() - before for weight, before in zip(weights, begin, strict=True)]

    serves = fused.serves
    for with_kernel, without in zip(run(serves), run(lambda weight: False), strict=True):
        assert (with_kernel - without).norm() < 0.25 * without.norm()  # two roundings at random differ


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("graphs", [True, False])
def test_gradients_on_the_host_change_no_loss_and_no_norm(
    tiny_model, questions, tmp_path, monkeypatch, graphs, overlaps
):
    monkeypatch.setattr("ray_peft.methods.host_gradients.HostGaLoreAdamW.overlaps", overlaps)
    monkeypatch.setattr("ray_peft.methods.host_gradients.SMALL", 100)
    monkeypatch.setattr("ray_peft.methods.host_gradients.BYTES_IN_FLIGHT", 2**14)
    runs = {}
    for where in ("device", "host"):
        given = {"train__steps": 8, "train__micro_batch_size": 2, "train__cuda_graphs": graphs}
        spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, {**PLAIN, "gradients": where}, **given))
        bench, log = LlmSft().load(spec, "cuda:0"), []
        ((stage, steps),) = spec.method.stages(bench.total_steps())
        bench.attach(stage)
        outcome = bench.train(stage, steps, 0, tmp_path / where, lambda metrics, step, log=log: log.append(metrics))
        runs[where] = [line for line in log if "train_loss" in line]
        assert (outcome.passes == "recorded") == graphs
    for key in ("train_loss", "grad_norm"):
        found, wanted = ([line[key] for line in runs[where]] for where in ("host", "device"))
        assert found == pytest.approx(wanted, rel=1e-4)
