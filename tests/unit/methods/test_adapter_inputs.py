"""Inputs that are not converted and back: the same bits, in fewer operations and less memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ray_peft.methods.adapter_inputs import as_they_are
from ray_peft.methods.adapters.dora import DoRA
from ray_peft.methods.lora import LoRA


class Conversions(TorchDispatchMode):
    """Counts the conversions from one dtype to another."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


def attached(stage):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = stage.attach(LlamaForCausalLM(config).to(torch.bfloat16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros would hide what flows to A
                parameter.normal_()
    return model


def passed(model):
    """Loss, gradients, bytes that are kept for the backward pass, conversions."""
    model.zero_grad()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(48).view(2, 24)
    with Conversions() as conversions:
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            loss = model(input_ids=ids, labels=ids).loss
        held = sum(kept.values())
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss, gradients, held, conversions.count


def test_the_same_bits_with_fewer_conversions_and_less_memory():
    model = attached(LoRA(rank=4))
    loss, gradients, held, conversions = passed(model)
    with as_they_are(model):
        same_loss, same_gradients, less, fewer = passed(model)
    assert torch.equal(loss, same_loss)
    assert gradients.keys() == same_gradients.keys()
    assert len(gradients) == 2 * 7 * 2
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same_gradients[name]), name
        assert gradient.any(), name
    assert fewer <= conversions - 2 * 7 * 3, "each of 14 layers: there and back, and in the backward pass"
    tokens = 48
    assert held - less >= 2 * 2 * tokens * (3 * 32), "of q, k, v, gate and up, three copies of each layer's inputs"
    assert passed(model)[3] == conversions, "outside, PEFT converts as ever"


@pytest.mark.parametrize("stage", [LoRA(rank=4, dropout=0.1), DoRA(rank=4)], ids=["dropout", "dora"])
def test_dropout_and_variants_keep_the_conversion(stage):
    model = attached(stage)
    before = passed(model)[3]
    with as_they_are(model):
        assert passed(model)[3] == before


def test_without_autocast_inputs_are_converted():
    model = attached(LoRA(rank=4))
    ids = torch.arange(48).view(2, 24)
    expected = model(input_ids=ids).logits
    with as_they_are(model):
        assert torch.equal(model(input_ids=ids).logits, expected)
