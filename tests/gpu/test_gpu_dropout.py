"""What only a GPU shows of dropout by the row: its kernel, and recorded passes. Run with `make test-gpu`."""

from __future__ import annotations

import copy

import pytest
import tiny
import tiny_architectures
import torch
from datasets import Dataset

from ray_peft.engine.keyed_dropout import keyed_dropout, layer_number, placed, row_key
from ray_peft.engine.member import Job
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.train import train_stage

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("features", [1, 5, 64, 300, 1152, 6912])
def test_the_kernel_gives_the_bits_of_the_cpu(dtype, features):
    keys = placed(torch.tensor([[row_key(3, 4, row)] for row in range(6)]), torch.arange(33)[None])
    columns = torch.stack([torch.arange(features).roll(place) for place in range(6)])
    x = torch.randn(6, 33, features).to(dtype)
    for layer in (0, 1, 16, 2**31, 2**32 - 1, layer_number("model.layers.0.self_attn.q_proj")):
        for p in (0.05, 0.5, torch.linspace(0, 0.9, 6)[:, None]):
            for numbers in (None, columns):
                wanted = keyed_dropout(x, p, keys, layer, numbers)
                leaf = x.cuda().requires_grad_()
                given = (p.cuda() if isinstance(p, torch.Tensor) else p, keys.cuda(), layer)
                out = keyed_dropout(leaf, *given, None if numbers is None else numbers.cuda())
                (gradient,) = torch.autograd.grad(out, leaf, x.cuda())
                assert torch.equal(out.cpu(), wanted)
                assert torch.equal(gradient.cpu(), wanted)


def test_the_kernel_is_there():
    from ray_peft.engine import keyed_dropout

    assert keyed_dropout._kernel() is not None


class Pad:
    pad_token_id = 258


LORA = {"name": "lora", "rank": 4, "lr": 0.01, "dropout": 0.3}
FULL = {"name": "full", "lr": 0.001, "weights": "float32"}


@pytest.mark.parametrize(("name", "method"), [("llama", LORA), ("gpt2", FULL), ("opt", FULL)])
def test_recorded_passes_drop_as_plain_ones_do(name, method, tmp_path):
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 250, (5 + 11 * (row % 8),), generator=draw).tolist() for row in range(48)]
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_architectures.config(name)).float()
    logs = []
    for changes in (
        {"train__cuda_graphs": False, "train__micro_batch_size": 2},
        {"train__cuda_graphs": False, "train__gradient_checkpointing": True},
        {},
        {"train__gradient_checkpointing": True},
    ):
        plain = tiny.plain_spec("m", "rows.jsonl", method, train__steps=6, **changes)
        spec, model, losses = TrialSpec.from_plain(plain), copy.deepcopy(base).cuda(), []
        add_fused_lm_head(model)
        torch.manual_seed(0)
        model = spec.method.attach(model)
        job = Job(
            spec, spec.method, 6, 0, tmp_path / str(len(logs)), "cuda:0",
            lambda metrics, step, losses=losses: losses.append(metrics["train_loss"]), lambda: 0.0,
        )  # fmt: skip
        passes = train_stage(spec, job, rows, model, Pad()).passes
        assert passes == ("recorded" if spec.train.cuda_graphs else "as they are, since train.cuda_graphs is false")
        logs.append(losses)
    for losses in logs[1:]:
        assert losses == pytest.approx(logs[0], rel=1e-4)
