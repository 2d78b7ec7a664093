"""Trials whose gradients wait on the host: the same losses, norms and resumes as plain GaLore."""

import copy

import pytest
import tiny
import torch

from ray_peft.methods.galore import GaLore
from ray_peft.methods.vocabulary import is_added_in_place
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.task import LlmSft

PLAIN = {"name": "galore", "rank": 4, "lr": 0.003, "update_proj_gap": 3, "weights": "float32", "weight_decay": 0.1}
HOST = {**PLAIN, "gradients": "host"}
FRUGAL = {**HOST, "moments": "8bit", "weights": "bfloat16_stochastic"}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that a tiny model's matrices leave, and its vocabulary has several pieces."""
    monkeypatch.setattr("ray_peft.methods.host_gradients.SMALL", 100)
    monkeypatch.setattr("ray_peft.methods.vocabulary.PIECE", 100)
    monkeypatch.setattr("ray_peft.tasks.llm_sft.head.PIECE", 100)


class Killed(Exception):
    """Stands for a trial that ends in mid-training."""


def trained(model, questions, folder, method, killed_at=None, **changes):
    spec = TrialSpec.from_plain(tiny.plain_spec(model, questions, method, **changes))
    bench, log = LlmSft().load(spec, "cpu"), []

    def report(metrics, step):
        log.append(metrics)
        if step == killed_at:
            raise Killed

    ((stage, steps),) = spec.method.stages(bench.total_steps())
    bench.attach(stage)
    outcome = bench.train(stage, steps, 0, folder, report)
    return bench, [line for line in log if "train_loss" in line], outcome


@pytest.mark.parametrize("limit", [None, 0.3])
@pytest.mark.parametrize("loss", ["answers", "all"])
def test_losses_norms_and_weights_are_those_of_plain_galore(tiny_model, questions, tmp_path, limit, loss):
    runs = {}
    for name, method in (("plain", PLAIN), ("host", HOST)):
        given = {"train__steps": 7, "train__micro_batch_size": 2, "train__loss": loss}
        runs[name] = trained(tiny_model, questions, tmp_path / name, {**method, "max_grad_norm": limit}, **given)
    (plain, expected, _), (host, found, _) = runs["plain"], runs["host"]
    for key in ("train_loss", "grad_norm"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-5)
    assert limit is None or all(line["grad_norm"] > limit for line in found[:3]), "clipping had nothing to do"
    for (name, one), other in zip(plain.model.named_parameters(), host.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", [HOST, FRUGAL], ids=["host", "8bit, rounded"])
def test_a_resumed_trial_goes_on_as_if_nothing_had_happened(tiny_model, questions, tmp_path, method):
    changes = {"train__steps": 8, "train__checkpoint_every": 4, "train__micro_batch_size": 4}
    _, whole, _ = trained(tiny_model, questions, tmp_path / "a", method, **changes)
    with pytest.raises(Killed):
        trained(tiny_model, questions, tmp_path / "b", method, killed_at=6, **changes)
    _, rest, outcome = trained(tiny_model, questions, tmp_path / "b", method, **changes)
    assert outcome.resumed_from_step == 4
    assert [line["train_loss"] for line in rest] == pytest.approx([line["train_loss"] for line in whole[4:]], rel=1e-4)


def test_the_loss_falls_with_all_that_is_frugal(tiny_model, questions, tmp_path):
    changes = {"train__steps": 15, "train__micro_batch_size": 2, "train__gradient_checkpointing": True}
    bench, log, _ = trained(tiny_model, questions, tmp_path, {**FRUGAL, "update_proj_gap": 200}, **changes)
    assert log[-1]["train_loss"] < log[0]["train_loss"] - 0.3
    assert all(parameter.grad is None for parameter in bench.model.parameters())


@pytest.mark.parametrize("family", ["gemma3", "untied"])
def test_a_vocabulary_s_gradient_in_pieces_is_autograd_s(family):
    """Through an embedding that scales its rows and has a padding token, and a tied or an untied output layer."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    sizes = {"vocab_size": 250, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 3}  # fmt: skip
    torch.manual_seed(0)
    if family == "gemma3":
        plain = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, head_dim=16, sliding_window=8))
    else:
        plain = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    stage = GaLore(rank=4, weights="float32", gradients="host")
    models = [plain, copy.deepcopy(plain)]
    plain.requires_grad_(True)
    stage.attach(models[1])
    assert is_added_in_place(models[1].get_output_embeddings().weight)
    from ray_peft.tasks.llm_sft.loss import TextLoss

    spec = TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d", stage.plain()))
    ids = torch.randint(0, 250, (3, 12))
    ids[0, :4] = 3
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    for model in models:
        add_fused_lm_head(model)
        for _ in range(2):
            TextLoss(spec, model, 3).loss(
                ids, torch.ones_like(ids), labels, torch.tensor(20.0), torch.tensor(1.0)
            ).backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
