"""What only a GPU shows of training a UNet: recorded passes, 4 bits, what is in memory. Run with `make test-gpu`."""

from __future__ import annotations

import pytest
import tiny_diffusion

from ray_peft.spec import TrialSpec
from ray_peft.tasks.text_to_image.task import TextToImage

pytestmark = pytest.mark.gpu

LORA = {"name": "lora", "rank": 4, "lr": 0.005}


def trained(model, images, folder, method=None, **changes):
    """The bench after training on the GPU, its losses, and the peak in bytes of all that is allocated."""
    import torch

    plain = tiny_diffusion.plain_spec(model, images, method, train__steps=10, **changes)
    bench, losses = TextToImage().load(TrialSpec.from_plain(plain), "cuda:0"), []
    ((stage, steps),) = bench.spec.method.stages(bench.total_steps())
    bench.attach(stage)
    torch.cuda.reset_peak_memory_stats()
    bench.train(stage, steps, 0, folder, lambda metrics, step: losses.append(metrics["train_loss"]))
    return bench, losses, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recorded_passes_give_the_losses_of_plain_ones(exact, tiny_painter, paintings, tmp_path, checkpointing):
    _, plain, _ = trained(
        tiny_painter, paintings, tmp_path / "a", LORA, train__cuda_graphs=False,
        train__gradient_checkpointing=checkpointing,
    )  # fmt: skip
    _, recorded, _ = trained(tiny_painter, paintings, tmp_path / "b", LORA, train__gradient_checkpointing=checkpointing)
    assert len(plain) == 10
    assert recorded == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("changes", [{"train__gradient_checkpointing": True}, {"train__micro_batch_size": 1}])
def test_recorded_passes_drop_as_plain_ones_do(exact, tiny_painter, paintings, tmp_path, changes):
    method = LORA | {"dropout": 0.5}
    _, plain, _ = trained(tiny_painter, paintings, tmp_path / "a", method, train__cuda_graphs=False)
    _, recorded, _ = trained(tiny_painter, paintings, tmp_path / "b", method, **changes)
    assert recorded == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_resumed_trial_draws_the_same_dropout(exact, tiny_painter, paintings, tmp_path, cuda_graphs):
    changes = {"train__checkpoint_every": 4, "train__cuda_graphs": cuda_graphs}
    method = LORA | {"dropout": 0.5}
    _, whole, _ = trained(tiny_painter, paintings, tmp_path, method, **changes)
    _, rest, _ = trained(tiny_painter, paintings, tmp_path, method, **changes)  # from the checkpoint at step 8
    assert rest == pytest.approx(whole[8:], rel=1e-4)
    _, other, _ = trained(tiny_painter, paintings, tmp_path / "other", method, seed=2, **changes)
    assert other[8:] != pytest.approx(whole[8:], rel=1e-4)


def test_the_gpu_trains_as_the_cpu_does(exact, tiny_painter, paintings, tmp_path):
    _, found, _ = trained(tiny_painter, paintings, tmp_path / "a", LORA)
    plain = tiny_diffusion.plain_spec(tiny_painter, paintings, LORA, train__steps=10)
    bench, losses = TextToImage().load(TrialSpec.from_plain(plain), "cpu"), []
    ((stage, steps),) = bench.spec.method.stages(bench.total_steps())
    bench.attach(stage)
    bench.train(stage, steps, 0, tmp_path / "b", lambda metrics, step: losses.append(metrics["train_loss"]))
    assert found == pytest.approx(losses, rel=1e-2)


def test_four_bits_train_and_paint(tiny_painter, paintings, tmp_path):
    method = {"name": "qlora", "rank": 4, "lr": 0.02}
    bench, losses, _ = trained(
        tiny_painter, paintings, tmp_path, method, model__dtype="bfloat16", train__precision="bf16"
    )
    assert len(losses) == 10
    assert set(bench.storage()) == {"nf4", "bfloat16"}
    (image,) = bench.illustrate(bench.evaluate()).images
    assert image.before is not None


def test_vae_and_text_encoder_are_not_in_memory_while_a_unet_trains(tiny_painter, paintings, tmp_path, monkeypatch):
    import gc

    import torch

    monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path / "cache"))  # so that this trial encodes the images itself
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    spec = TrialSpec.from_plain(tiny_diffusion.plain_spec(tiny_painter, paintings, LORA))
    bench = TextToImage().load(spec, "cuda:0")
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # of the encoders' products
    unet = sum(parameter.numel() * parameter.element_size() for parameter in bench.model.parameters())
    # Each tensor takes a multiple of 512 bytes.
    slack = 512 * len([*bench.model.parameters(), *bench.model.buffers()]) + 4096
    assert torch.cuda.memory_allocated() - before <= unet + slack
    del bench
    _, _, peak = trained(tiny_painter, paintings, tmp_path / "run", LORA)
    assert peak - before < unet + 256 * 2**20
