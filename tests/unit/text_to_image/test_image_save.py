"""What was trained is written so that diffusers and PEFT give exactly the same model again."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from ray_peft.errors import TrialFailed
from ray_peft.methods.base import Quantization
from ray_peft.methods.optimizers import trainable
from ray_peft.tasks.one_model import ADAPTER_CONFIG
from ray_peft.tasks.parameters import weight_storage
from ray_peft.tasks.text_to_image import save
from ray_peft.tasks.text_to_image.four_bit import dequantised, quantise
from ray_peft.tasks.text_to_image.passes import unwrapped
from ray_peft.tasks.text_to_image.task import TextToImage

LORA = {"name": "lora", "rank": 4, "alpha": 12.0, "lr": 0.02}  # alpha is not the rank: the file must say so
QLORA = LORA | {"name": "qlora", "compute_dtype": "float32"}
FULL = {"name": "full", "lr": 0.002, "weights": "float32"}


@pytest.fixture(scope="module")
def adapted(train, tmp_path_factory):
    """A LoRA trial after three steps, and the folder of its adapter in float32."""
    folder = tmp_path_factory.mktemp("adapted")
    bench = train(folder / "run", LORA, train__steps=3, train__save_dtype="float32").bench
    bench.save(folder / "saved")
    return bench, folder / "saved"


@pytest.fixture(scope="module")
def four_bits(train, tmp_path_factory):
    """The same of QLoRA."""
    folder = tmp_path_factory.mktemp("four_bits")
    bench = train(folder / "run", QLORA, train__steps=3, train__save_dtype="float32").bench
    bench.save(folder / "saved")
    return bench, folder / "saved"


def answer(unet):
    dice = torch.Generator().manual_seed(5)
    sample, texts = torch.randn(2, 4, 8, 8, generator=dice), torch.randn(2, 77, 32, generator=dice)
    with torch.no_grad():
        return unet(sample, torch.tensor([10, 700]), encoder_hidden_states=texts).sample


def base_unet(tiny_painter):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(tiny_painter, subfolder="unet").eval()


def test_an_adapter_is_there_for_diffusers_and_for_peft_and_counts_once(adapted):
    _, folder = adapted
    files = {file.name for file in folder.iterdir()}
    assert {save.DIFFUSERS_FILE, ADAPTER_CONFIG, "adapter_model.safetensors"} <= files
    assert json.loads((folder / ADAPTER_CONFIG).read_text())["lora_alpha"] == 12.0
    one, other = (load_file(folder / name) for name in (save.DIFFUSERS_FILE, "adapter_model.safetensors"))
    assert len(one) == len(other) > 0
    assert all(name.startswith("unet.") for name in one)
    assert save.adapter_bytes(folder) == (folder / save.DIFFUSERS_FILE).stat().st_size


def test_diffusers_loads_an_adapter_into_a_unet_with_the_trained_output(adapted, tiny_painter):
    bench, folder = adapted
    unet = base_unet(tiny_painter)
    before = answer(unet)
    unet.load_lora_adapter(str(folder), prefix="unet", weight_name=save.DIFFUSERS_FILE)
    assert torch.allclose(answer(unet), answer(bench.model), atol=1e-5)
    assert not torch.allclose(before, answer(bench.model), atol=1e-3)


def test_diffusers_loads_an_adapter_into_a_pipeline_from_the_folder_alone(adapted, tiny_painter):
    from diffusers import StableDiffusionPipeline

    bench, folder = adapted
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_painter, safety_checker=None)
    pipeline.load_lora_weights(str(folder))
    assert torch.allclose(answer(pipeline.unet), answer(bench.model), atol=1e-5)


def test_peft_loads_an_adapter_with_the_trained_output(adapted, tiny_painter):
    from peft import PeftModel

    bench, folder = adapted
    assert torch.allclose(
        answer(PeftModel.from_pretrained(base_unet(tiny_painter), folder)), answer(bench.model), atol=1e-5
    )


def test_a_saved_adapter_gives_the_trial_s_loss_again(adapted):
    bench, folder = adapted
    again = TextToImage().load_trained(bench.spec, folder, "cpu")
    assert again.eval_loss() == pytest.approx(bench.eval_loss(), rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_adapter_has_the_dtype_asked_for_and_the_model_stays_as_it_is(adapted, tmp_path, dtype):
    bench, _ = adapted
    before = [parameter.detach().clone() for parameter in trainable(bench.model)]
    bench.save(tmp_path, dtype)
    for name in (save.DIFFUSERS_FILE, "adapter_model.safetensors"):
        assert {tensor.dtype for tensor in load_file(tmp_path / name).values()} == {getattr(torch, dtype)}
    for one, other in zip(trainable(bench.model), before, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_numbers_beyond_float16_are_refused_by_name(adapted, tmp_path):
    bench, _ = adapted
    weight = trainable(bench.model)[-1]
    kept = weight.detach().clone()
    weight.data.view(-1)[0] = 7e4
    try:
        with pytest.raises(TrialFailed, match=r"lora_B.* has values above 65,504, .* save it in bfloat16 or float32"):
            bench.save(tmp_path, "float16")
    finally:
        weight.data.copy_(kept)
    assert not list(tmp_path.iterdir())


def test_full_weights_round_trip(train, tmp_path):
    bench = train(tmp_path / "run", FULL, train__steps=2, train__save_dtype="float32").bench
    bench.save(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["unet"]
    weights = list((tmp_path / "saved" / "unet").glob("*.safetensors"))
    assert save.adapter_bytes(tmp_path / "saved") == sum(path.stat().st_size for path in weights)
    again = TextToImage().load_trained(bench.spec, tmp_path / "saved", "cpu")
    assert torch.equal(answer(again.model), answer(bench.model))
    assert again.eval_loss() == pytest.approx(bench.eval_loss(), rel=1e-6)
    bench.save(tmp_path / "half", "bfloat16")
    (file,) = (tmp_path / "half" / "unet").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    assert bench.model.dtype == torch.float32


@pytest.mark.parametrize("double", [True, False])
def test_bytes_by_kind_add_up_to_what_four_bits_take(tiny_painter, double):
    unet = base_unet(tiny_painter)
    linears = [layer for layer in unet.modules() if isinstance(layer, torch.nn.Linear)]
    numbers = [layer.weight.numel() for layer in linears]
    total = sum(parameter.numel() for parameter in unet.parameters())
    assert weight_storage(unet).num_bytes == {"float32": 4 * total}
    quantise(unet, Quantization(double_quant=double, compute_dtype="float32"), "cpu")
    nf4 = 0
    for count in numbers:
        blocks = -(-count // 64)
        nf4 += -(-count // 2)
        nf4 += (blocks + 4 * -(-blocks // 256) + 4 * 256) if double else 4 * blocks
    assert weight_storage(unet).num_bytes == {"float32": 4 * (total - sum(numbers)), "nf4": nf4}


def test_four_bits_are_near_the_whole_and_equal_to_what_they_are_dequantised_to(tiny_painter):
    unet = base_unet(tiny_painter)
    whole = answer(unet)
    quantise(unet, Quantization(compute_dtype="float32"), "cpu")
    coarse = answer(unet)
    assert 1e-4 < float((coarse - whole).abs().mean()) < 0.3 * float(whole.abs().mean())
    plain = dequantised(unet)
    assert {type(layer) for layer in plain.modules() if isinstance(layer, torch.nn.Linear)} == {torch.nn.Linear}
    assert torch.allclose(answer(plain), coarse, atol=1e-5)


def test_a_trial_s_storage_is_that_of_its_base(four_bits, adapted):
    storage = four_bits[0].storage()
    assert set(storage) == {"nf4", "float32"}
    assert set(adapted[0].storage()) == {"float32"}
    assert sum(storage.values()) < sum(adapted[0].storage().values())


def test_a_merge_of_four_bits_gives_plain_layers_with_the_same_output_that_load_again(four_bits, tmp_path):
    bench, folder = four_bits
    wanted = answer(bench.model)
    again = TextToImage().load_trained(bench.spec, folder, "cpu")
    assert torch.allclose(answer(again.model), wanted, atol=1e-5)
    ((stage, _),) = bench.spec.method.stages(1)
    again.merge(stage)
    merged = again.model
    assert {type(layer) for layer in merged.modules() if isinstance(layer, torch.nn.Linear)} == {torch.nn.Linear}
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert torch.allclose(answer(merged), wanted, atol=1e-5)
    again.save(tmp_path / "merged", "float32")
    loaded = TextToImage().load_trained(bench.spec, tmp_path / "merged", "cpu")
    assert torch.allclose(answer(loaded.model), wanted, atol=1e-5)


def test_a_merge_of_lora_gives_the_same_output(adapted):
    bench, _ = adapted
    wanted = answer(bench.model)
    ((stage, _),) = bench.spec.method.stages(1)
    merged = stage.merge(copy.deepcopy(bench.model))
    assert unwrapped(merged) is merged
    assert torch.allclose(answer(merged), wanted, atol=1e-5)
