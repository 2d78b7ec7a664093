"""Packed held-out rows have the log-probabilities of padded rows, in the same order."""

import pytest
import tiny
import torch
from attention_kinds import ARCHITECTURES
from cramped import holds
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft import evaluate, packed_scores

PAD = 258


@pytest.fixture(scope="module")
def rows():
    """Rows of many lengths; some carry loss in their first token alone, which is not scored, or nowhere."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for index in range(60):
        ids = torch.randint(3, 250, (5 + 13 * (7 * index % 23),), generator=draw).tolist()
        labels = [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]
        if index % 10 == 3:
            labels = [ids[0]] + [-100] * (len(ids) - 1)
        made.append({"input_ids": ids, "labels": labels})
    return Dataset.from_list(made)


def spec():
    return TrialSpec.from_plain(tiny.plain_spec("m", "rows.jsonl", {"name": "none"}))


def model(name):
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **ARCHITECTURES[name])).float()
    add_fused_lm_head(built)
    return built


def both(built, rows, monkeypatch, lowered=None, tokens=None):
    """Padded, and one after the other."""
    padded = evaluate.token_log_probs(spec(), built, rows, PAD)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "packs", lambda *_: True)
        if tokens is not None:
            patch.setattr(evaluate, "LOSS_TOKENS", tokens)
        return padded, evaluate.token_log_probs(spec(), built, rows, PAD, lowered)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probabilities_are_those_of_padded_rows(name, rows, monkeypatch, caplog):
    padded, packed = both(model(name), rows, monkeypatch)
    assert torch.allclose(packed, padded, rtol=1e-5, atol=1e-5)
    assert float(packed.mean()) == pytest.approx(float(padded.mean()), rel=1e-6)
    assert "are padded" not in caplog.text


@pytest.mark.parametrize("tokens", [1, 300, 1000])
def test_they_do_not_depend_on_the_tokens_of_a_pass(tokens, rows, monkeypatch):
    padded, packed = both(model("llama"), rows, monkeypatch, tokens=tokens)
    assert torch.allclose(packed, padded, rtol=1e-5, atol=1e-5)


def test_where_memory_runs_out_passes_hold_fewer_tokens(rows, monkeypatch):
    built, lowered = model("llama"), {}
    free = evaluate.token_log_probs(spec(), built, rows, PAD)
    with holds(built.model, 4) as seen:
        monkeypatch.setattr(evaluate, "packs", lambda *_: True)
        cramped = evaluate.token_log_probs(spec(), built, rows, PAD, lowered)
    assert max(seen) > 4
    assert 0 < lowered[evaluate.LOSS_BATCH] < evaluate.LOSS_TOKENS
    assert torch.allclose(cramped, free, rtol=1e-5, atol=1e-5)
    with holds(built.model, 0), pytest.raises(torch.OutOfMemoryError):
        evaluate.token_log_probs(spec(), built, rows, PAD)


def test_a_model_whose_loss_would_differ_is_scored_padded(rows, monkeypatch, caplog):
    def across_rows(self, documents):
        return torch.ones(len(documents), 1, *[documents.shape[1]] * 2).tril().bool()

    monkeypatch.setattr(packed_scores.PackedLoss, "_masks", across_rows)
    with caplog.at_level("INFO"):
        padded, packed = both(model("llama"), rows, monkeypatch)
    assert torch.equal(padded, packed)
    assert "are padded, not packed: their loss would be" in caplog.text
