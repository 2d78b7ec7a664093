"""A UNet's predicted memory: parts that can be counted by hand, and what settings change."""

import json

import pytest
import tiny_diffusion

from ray_peft.gpus import ANY
from ray_peft.spec import TrialSpec
from ray_peft.vram import ModelShape, predict

SIDE = 512
CONFIG = {
    "sample_size": 64,
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


@pytest.fixture(scope="module")
def numbers():
    """Numbers of the UNet in all, and in linear layers' weights."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(CONFIG)
    linear = [module.weight.numel() for module in unet.modules() if isinstance(module, torch.nn.Linear)]
    return sum(parameter.numel() for parameter in unet.parameters()), sum(linear)


def predicted(shared, method, **train):
    plain = tiny_diffusion.plain_spec(
        "model", "images", method, model__dtype="bfloat16", train__precision="bf16", data__resolution=SIDE
    )
    plain["train"] |= {"batch_size": 1, "micro_batch_size": 1, **train}
    return predict(TrialSpec.from_plain(plain), ModelShape(json.dumps(CONFIG)), longest_tokens=0, gpu=ANY)


def test_the_untouched_unet_is_its_weights(shared, numbers):
    assert predicted(shared, {"name": "none"}).peak_allocated == 2 * numbers[0]


def test_adapters_and_their_optimizer_are_counted_exactly(shared, numbers):
    found = predicted(shared, {"name": "lora", "rank": 4}).components
    # Each block has two attentions: one looks at itself, one at 32 numbers of text.
    blocks = 3  # one down, two up; the middle has 128 channels
    own = blocks * (4 * 4 * (64 + 64) + 2 * 4 * (64 + 64) + 2 * 4 * (32 + 64))
    middle = 4 * 4 * (128 + 128) + 2 * 4 * (128 + 128) + 2 * 4 * (32 + 128)
    assert found["adapters"] == pytest.approx(4 * (own + middle), abs=512 * 64)
    assert found["weights"] == pytest.approx(2 * numbers[0], rel=0.01)
    assert found["optimizer"] == pytest.approx(2 * found["adapters"], rel=0.2, abs=512 * 192)


def test_four_bits_shrink_linear_layers_alone(shared, numbers):
    lora, qlora = (predicted(shared, {"name": name, "rank": 4}).components for name in ("lora", "qlora"))
    saved = lora["weights"] - qlora["weights"] - qlora["quantization"]
    assert saved == pytest.approx(numbers[1] * (2 - 0.5 - 1 / 64), rel=0.1)


def test_checkpointing_and_a_larger_batch_move_activations(shared):
    plain = predicted(shared, {"name": "lora", "rank": 4})
    less = predicted(shared, {"name": "lora", "rank": 4}, gradient_checkpointing=True)
    more = predicted(shared, {"name": "lora", "rank": 4}, batch_size=4, micro_batch_size=4)
    assert less.components["activations"] < 0.7 * plain.components["activations"]
    assert more.components["activations"] == pytest.approx(4 * plain.components["activations"], rel=0.1)


def test_full_fine_tuning_holds_gradients_and_two_moments(shared, numbers):
    found = predicted(shared, {"name": "full"}).components
    assert found["optimizer"] == pytest.approx(4 * numbers[0], rel=0.05)
    assert found["gradients"] == pytest.approx(2 * numbers[0], rel=0.1)
