"""Packed rows have the losses and the gradients of padded rows."""

import copy

import pytest
import tiny
import torch
from attention_kinds import ARCHITECTURES
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from ray_peft.engine.contract import Computation, Share
from ray_peft.engine.loop import Engine
from ray_peft.engine.member import Job, Member
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.loss import TextLoss
from ray_peft.tasks.llm_sft.packed import PackedLoss, PackedRows
from ray_peft.tasks.llm_sft.steps import TextRows
from ray_peft.tasks.llm_sft.train import why_unlike


@pytest.fixture(scope="module")
def rows(half_scored):
    return half_scored


def spec(method=None, **changes):
    sizes = {"train__batch_size": 8, "train__micro_batch_size": 4}
    return TrialSpec.from_plain(tiny.plain_spec("m", "rows.jsonl", method or {"name": "none"}, **sizes | changes))


def model(name, **changes):
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **ARCHITECTURES[name], **changes)).float()
    add_fused_lm_head(built)
    return built.train()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_rows_apart(name, rows):
    trial, built = spec(), model(name)
    apart = TextRows(trial, rows)
    seen = []
    for data, computation in ((apart, TextLoss(trial, built, 258)), (PackedRows(apart), PackedLoss(trial, built))):
        built.zero_grad()
        total = 0.0
        for part in data.parts(1, Share(), 4):
            loss = computation.loss(*computation.inputs(part))
            loss.backward()
            total += float(loss)
        seen.append((total, [p.grad.clone() for p in built.parameters() if p.grad is not None]))
    (usual, theirs), (packed, ours) = seen
    assert packed == pytest.approx(usual, rel=1e-5)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-7)


@pytest.mark.parametrize("micro", [1, 4, 8])
@pytest.mark.parametrize("loss", ["answers", "all"])
def test_a_whole_training_has_the_numbers_of_rows_apart(rows, tmp_path, micro, loss):
    method = {"name": "full", "lr": 0.003, "weights": "float32"}
    trial = spec(method, train__steps=7, train__micro_batch_size=micro, train__loss=loss)
    logs = []
    start = model("llama")
    for way in ("apart", "packed"):
        built = copy.deepcopy(start)
        add_fused_lm_head(built)
        built.requires_grad_(True)
        log = []
        job = Job(trial, trial.method, 7, 0, tmp_path / way, "cpu", lambda m, s, log=log: log.append(m), lambda: 0.0)
        data = TextRows(trial, rows)
        member = Member(job, built, data)
        if way == "apart":
            Engine([member], built, data, TextLoss(trial, built, 258)).run()
        else:
            Engine([member], built, PackedRows(data), PackedLoss(trial, built)).run()
        logs.append((log, member.trained.tokens))
    (usual, tokens), (packed, as_many) = logs
    assert len(usual) == len(packed) == 7
    assert tokens == as_many
    for one, other in zip(packed, usual, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_workers_share_the_rows_of_a_step(rows):
    data = PackedRows(TextRows(spec(), rows))
    whole = [ids for part in data.parts(0, Share(), 4) for lane in part.lanes for ids, _ in lane]
    shared = [
        ids for rank in range(2) for part in data.parts(0, Share(rank, 2), 4) for lane in part.lanes for ids, _ in lane
    ]
    assert sorted(shared) == sorted(whole)
    assert len(whole) == 8


class Loss(Computation):
    """Its loss is what it is given."""

    def inputs(self, part):
        return [torch.tensor(part)]

    def loss(self, number):
        return number


@pytest.mark.parametrize(
    ("padded", "packed", "reason"),
    [
        (2.0, 2.0001, None),
        (2.0, 2.001, "rows in lanes have another loss (2.001, not 2)"),
        (2.0, float("nan"), "rows in lanes have another loss (nan, not 2)"),
        (2.0, None, "it cannot compute several rows in one lane (RuntimeError)"),
    ],
)
def test_packed_rows_are_refused_where_their_loss_is_another(padded, packed, reason):
    assert why_unlike(spec(), "cpu", (Loss(), padded), (Loss(), packed)) == reason
