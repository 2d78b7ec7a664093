"""A UNet's predicted memory: parts that can be counted by hand, and what settings change."""

import json

import pytest
import tiny_diffusion

from ray_peft.spec import TrialSpec
from ray_peft.tasks.text_to_image.memory import CONVOLUTIONS, predict
from ray_peft.tasks.text_to_image.task import TextToImage
from ray_peft.vram import ModelShape
from ray_peft.vram.cards import ANY

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
    return predict(TrialSpec.from_plain(plain), ModelShape(json.dumps(CONFIG)), gpu=ANY)


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


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_gradients_are_there_in_every_pass(shared, weights):
    """They are cleared and never let go, so that recorded passes find them: one pass a step takes what two take."""
    one = predicted(shared, {"name": "full", "weights": weights})
    two = predicted(shared, {"name": "full", "weights": weights}, batch_size=2)
    assert one.components["activations"] > 0
    assert one.components == two.components


@pytest.fixture(scope="module")
def others(tiny_painter):
    """The shapes of VAE and text encoder."""
    parts = ("vae", "text_encoder")
    return {part: ModelShape.from_config(tiny_painter / part / "config.json") for part in parts}


@pytest.fixture(scope="module")
def encoder_numbers(tiny_painter):
    """Numbers of each tensor of VAE and text encoder."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    models = [kind.from_pretrained(tiny_painter / part) for kind, part in
              ((AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder"))]  # fmt: skip
    return [parameter.numel() for model in models for parameter in model.parameters()]


POSITIONS = 1024
"""Bytes of the text encoder's 77 positions, which are no parameter."""


def blocks(counts, itemsize):
    """Bytes of tensors, as the allocator rounds them."""
    return sum(-(-count * itemsize // 512) * 512 for count in counts)


def asked(method, resolution=SIDE, **evaluation):
    plain = tiny_diffusion.plain_spec(
        "model", "images", method, model__dtype="bfloat16", train__precision="bf16", data__resolution=resolution
    )
    plain["evaluation"] |= {"prompts": [], "style": None, **evaluation}
    return TrialSpec.from_plain(plain)


def outside(spec, others=None):
    return predict(spec, ModelShape(json.dumps(CONFIG)), gpu=ANY, others=others).evaluation


def test_scoring_is_the_unet_and_a_pass_of_the_evaluation_batch(shared):
    import torch
    from diffusers import UNet2DConditionModel

    from ray_peft.tasks.text_to_image import memory as unet

    with torch.device("meta"):
        counts = [parameter.numel() for parameter in UNet2DConditionModel.from_config(CONFIG).parameters()]
    spec = asked({"name": "none"}, batch_size=4)
    found = unet.evaluation(spec, None, ModelShape(json.dumps(CONFIG)), {})
    assert set(found) == {"model", "scoring"}
    assert found["model"] == blocks(counts, 2)
    assert outside(spec) == found["model"] + found["scoring"] + ANY.workspace
    assert found["scoring"] > 4 * 64 * (SIDE // 8) ** 2 * 2  # one activation of the first block
    sizes = [outside(asked({"name": "none"}, batch_size=size)) for size in (1, 2, 4, 16)]
    assert sizes == sorted(set(sizes))
    assert outside(asked({"name": "none"}, 256, batch_size=4)) < sizes[2] < outside(asked({"name": "none"}, 1024))


def test_an_adapter_is_scored_in_place_and_four_bits_stay(shared):
    from ray_peft.tasks.text_to_image import memory as unet

    def held(method):
        spec = asked(method)
        ((stage, _),) = spec.method.stages(1)
        return unet.evaluation(spec, stage, ModelShape(json.dumps(CONFIG)), {})["model"]

    trained = predicted(shared, {"name": "lora", "rank": 4}).components
    assert held({"name": "lora", "rank": 4}) == trained["weights"] + trained["adapters"]
    trained = predicted(shared, {"name": "qlora", "rank": 4}).components
    assert held({"name": "qlora", "rank": 4}) == sum(trained[kind] for kind in ("weights", "quantization", "adapters"))


@pytest.mark.parametrize(("guidance", "prompts", "passes"), [(1.0, 8, 8), (7.5, 4, 8), (7.5, 2, 4)])
def test_images_are_made_beside_both_encoders(shared, others, encoder_numbers, guidance, prompts, passes):
    from ray_peft.tasks.text_to_image import memory as unet

    shape, names = ModelShape(json.dumps(CONFIG)), [str(prompt) for prompt in range(prompts)]
    made = asked({"name": "none"}, batch_size=8, guidance_scale=guidance, prompts=names, seeds=[0])
    found = unet.evaluation(made, None, shape, others)
    plain = unet.evaluation(asked({"name": "none"}, batch_size=passes), None, shape, {})
    # The UNet's pass is larger here than the decoding of one image.
    assert found["painting"] == blocks(encoder_numbers, 2) + POSITIONS + plain["scoring"]
    assert (
        outside(made, others)
        == found["model"] + max(found["painting"] + CONVOLUTIONS, found["scoring"]) + ANY.workspace
    )


def test_images_are_decoded_one_at_a_time(shared, others):
    def painting(images, resolution=SIDE, **more):
        from ray_peft.tasks.text_to_image import memory as unet

        small = ModelShape(json.dumps(CONFIG | {"block_out_channels": [8, 8], "attention_head_dim": 1}))
        names = [str(prompt) for prompt in range(images)]
        given = {"batch_size": images, "seeds": [0], "prompts": names, "guidance_scale": 1.0, **more}
        return unet.evaluation(asked({"name": "none"}, resolution, **given), None, small, others)["painting"]

    one, eight = painting(1), painting(8)
    picture = 3 * SIDE**2 * 2
    assert one < eight < one + 8 * 3 * picture  # the pictures themselves, and what joins them
    assert painting(1, 1024) > 3 * one
    assert painting(1, style="vae_gram") >= one  # looked at after it is decoded


def test_encoding_takes_both_encoders_in_float32_without_the_unet(shared, others, encoder_numbers):
    from ray_peft.tasks.text_to_image import memory as unet

    def encoding(resolution):
        found = unet.evaluation(asked({"name": "none"}, resolution), None, ModelShape(json.dumps(CONFIG)), others)
        assert set(found) == {"model", "scoring", "encoding"}
        return found["encoding"] - blocks(encoder_numbers, 4) - POSITIONS

    activation = 8 * SIDE**2 * 4
    assert 2 * activation < encoding(SIDE) < 12 * activation
    assert encoding(1024) == pytest.approx(4 * encoding(SIDE), rel=0.05)


def test_an_evaluation_between_steps_may_be_the_peak_of_training(shared):
    def peak(**more):
        plain = asked({"name": "lora", "rank": 4}, batch_size=64).plain()
        plain["train"] |= {"batch_size": 1, "micro_batch_size": 1, **more}
        return predict(TrialSpec.from_plain(plain), ModelShape(json.dumps(CONFIG)), gpu=ANY)

    seldom, often = peak(), peak(eval_every=2)
    assert seldom.peak_allocated < seldom.evaluation < often.peak_allocated
    assert often.components["gradients"] == often.components["adapters"]
    assert often.components["optimizer"] == pytest.approx(2 * often.components["adapters"], rel=0.2, abs=512 * 192)


def test_a_trial_is_predicted_with_its_pipeline(tiny_painter, paintings):
    def evaluation(**changes):
        method = {"name": "full", "lr": 0.01, "weights": "float32"}
        plain = tiny_diffusion.plain_spec(tiny_painter, paintings, method, **changes)
        return TextToImage().predict(TrialSpec.from_plain(plain)).evaluation

    assert evaluation(evaluation__prompts=[]) < evaluation()
