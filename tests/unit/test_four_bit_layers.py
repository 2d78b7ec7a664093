"""4-bit weights stay as they are stored, and compute in the dtype that was asked for, on every kind of CPU."""

import bitsandbytes
import pytest
import tiny
import torch

from ray_peft.methods.base import Quantization
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.four_bit_layers import as_plain_parameters
from ray_peft.tasks.llm_sft.model import load_model
from ray_peft.tasks.text_to_image.four_bit import quantise


@pytest.fixture(params=[True, False], ids=["AVX512-BF16", "older CPU"])
def cpu(request, monkeypatch):
    """What bitsandbytes takes the processor for when it builds a layer."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: request.param)
    return request.param


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]


def exact(layer, x):
    """What the layer computes, from its dequantised weight in float32."""
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return torch.nn.functional.linear(x, weight, None if layer.bias is None else layer.bias.float())


def check(model, width):
    """An evaluation changes no stored byte, and computes in float32 where that was asked for."""
    model.eval()
    stored = [layer.weight.data.clone() for layer in layers(model)]
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    layer = next(layer for layer in layers(model) if layer.in_features == width)
    with torch.no_grad():
        assert torch.allclose(layer(x), exact(layer, x), atol=1e-6)  # bfloat16 errs by about 1e-3
        for other in layers(model):
            other(torch.randn(2, other.in_features))
    for before, layer in zip(stored, layers(model), strict=True):
        assert torch.equal(before, layer.weight.data)
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_the_base_of_a_text_trial_is_the_same_after_an_evaluation(cpu, tiny_model, questions):
    method = {"name": "qlora", "rank": 2, "compute_dtype": "float32"}
    model = load_model(LlmTrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, method)), "cpu")
    check(model, 64)


def test_a_shape_that_the_fast_kernel_does_not_know_is_computed(cpu):
    model = torch.nn.Sequential(torch.nn.Linear(48, 20), torch.nn.Linear(20, 7))
    quantise(model, Quantization(compute_dtype="float32"), "cpu")
    check(model, 48)


def test_bfloat16_is_computed_where_it_was_asked_for(cpu):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    quantise(model, Quantization(compute_dtype="bfloat16"), "cpu")
    model.eval()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, whole = model(x), exact(model[0], x)
    assert got.dtype == torch.float32
    assert torch.equal(got, got.bfloat16().float())  # its numbers are those of bfloat16
    assert torch.allclose(got, whole, atol=0.05)


def test_codes_as_plain_parameters_have_the_same_bits_and_constants_on_the_device():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    quantise(model, Quantization(compute_dtype="float32"), "cpu")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    codes, before = model[0].weight.data.clone(), model(x)
    as_plain_parameters(model, "cpu")
    assert type(model[0].weight) is torch.nn.Parameter
    assert not model[0].weight.requires_grad
    assert torch.equal(model[0].weight.data.view(torch.uint8).flatten(), codes.flatten())
    assert torch.equal(model(x), before)

    quantise(other := torch.nn.Sequential(torch.nn.Linear(64, 64)), Quantization(), "cpu")
    as_plain_parameters(other, "meta")
    state = other[0].quant_state
    assert {part.device.type for part in (state.code, state.absmax, state.offset, state.state2.absmax)} == {"meta"}
