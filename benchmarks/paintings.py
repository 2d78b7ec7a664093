"""Forty paintings learnt from nothing, so that made images can be looked at where no weights can be fetched.

With RAY_PEFT_CLIP (a CLIP tokenizer's folder) and RAY_PEFT_VAN_GOGH set:
    python benchmarks/paintings.py FOLDER benchmarks/results/paintings_h200.json
    python benchmarks/paintings.py FOLDER benchmarks/results/paintings_cpu.json small     # 128 px, minutes on a CPU

First a small VAE is trained as an autoencoder on the training paintings alone. Then method `full` trains a small UNet
of random weights on forty paintings, through search space sd15_van_gogh, until it paints them by title.
Quality is none: the model knows forty pictures. What is shown is that losses fall, that images follow, and that copying
shows in `nearest_train`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from provenance import write

ROOT = Path(__file__).resolve().parent.parent
SPACE = ROOT / "search_spaces" / "sd15_van_gogh.yaml"


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    resolution: int
    vae: tuple[int, ...]
    unet: tuple[int, ...]
    vae_seconds: int
    steps: int
    batch: int


SIZES = {
    "full": Size(256, (64, 128, 256, 256), (128, 256, 384, 384), 90, 4000, 16),
    "small": Size(128, (32, 64, 128, 128), (64, 128, 128), 120, 700, 8),
}


def main(folder: Path, target: Path, size: Size) -> None:
    """Train the VAE, then the UNet; keep the grid of images beside the numbers."""
    import ray_peft
    from ray_peft.console import Console
    from ray_peft.space.read import load
    from ray_peft.tasks.text_to_image import data

    chosen = [f"data.resolution={size.resolution}", "data.train=40", f"data.min_side={size.resolution}"]
    spec = load(SPACE, [*chosen, "method={name: none}"]).trials[0]
    pictures = data.prepare(spec.data)
    pipeline, errors = build(folder / "pipeline", pictures, spec.data, size)
    prompts = [
        pictures.train[0].caption,
        pictures.train[1].caption,
        pictures.train[2].caption,
        pictures.test[0].caption,
    ]
    overrides = [
        *chosen, f"model.name={pipeline}", f"train.steps={size.steps}", f"train.batch_size={size.batch}",
        f"train.micro_batch_size={size.batch}", "model.dtype=float32",
        "train.eval_every=200", "train.log_every=50", "data.crop=center", "data.flip=false", "data.views=1",
        f"evaluation.prompts={json.dumps(prompts)}", "evaluation.guidance_scale=2.0",
        "evaluation.inference_steps=30", "evaluation.seeds=[0]",
        "method={grid: [{name: none}, {name: full, lr: 2.0e-4, weights: float32}]}",
    ]  # fmt: skip
    outcome = ray_peft.sweep(SPACE, out=folder / "sweep", overrides=overrides, console=Console())
    rows = []
    for result in outcome.results:
        log = (outcome.folder / "trials" / result.trial_id / "metrics.jsonl").read_text().splitlines()
        curve = [line for line in map(json.loads, log) if "eval_loss" in line or "train_loss" in line]
        rows.append({
            "method": result.spec.method.name, "status": result.status, "scores": result.scores.plain(),
            "steps_per_s": result.usage.steps_per_s, "images_per_s": result.usage.images_per_s,
            "peak_allocated_gib": result.usage.peak_allocated_gib, "curve": curve,
        })  # fmt: skip
        grid = outcome.folder / "trials" / result.trial_id / "images" / "grid.png"
        if grid.is_file():
            shutil.copy(grid, target.with_name(f"{target.stem}_{result.spec.method.name}.png"))
    write(target, {"paintings": 40, "size": asdict(size), "vae_error": errors, "prompts": prompts, "trials": rows})


def build(folder: Path, pictures: Any, settings: Any, size: Size) -> tuple[Path, dict[str, float]]:
    """A small pipeline of the true classes: VAE trained here, UNet and text encoder random."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from ray_peft.spec import ModelSpec
    from ray_peft.tasks.text_to_image import data
    from ray_peft.tasks.text_to_image import model as parts

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=size.vae, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, sample_size=size.resolution,
    ).to(device)  # fmt: skip
    images = torch.stack([data.pixels(picture, settings, None) for picture in pictures.train]).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-4)
    began, step, error = time.perf_counter(), 0, torch.zeros(())
    while time.perf_counter() - began < size.vae_seconds:
        batch = images[torch.randint(len(images), (8,), device=device)]
        batch = torch.where(torch.rand(8, 1, 1, 1, device=device) < 0.5, batch.flip(-1), batch)
        with torch.autocast(device, dtype=torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            rebuilt = vae.decode(posterior.sample()).sample
        error = (rebuilt.float() - batch).abs().mean()
        (error + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    with torch.no_grad():
        spread = float(torch.cat([vae.encode(image[None]).latent_dist.mean for image in images]).std())
    vae.register_to_config(scaling_factor=1 / spread)
    unet = UNet2DConditionModel(
        sample_size=size.resolution // 8, block_out_channels=size.unet, cross_attention_dim=256,
        attention_head_dim=8, layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * (len(size.unet) - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(size.unet) - 1),
    )  # fmt: skip
    text = CLIPTextConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=49408,
        max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    import os

    StableDiffusionPipeline(
        vae=vae.cpu(), unet=unet, text_encoder=CLIPTextModel(text),
        tokenizer=parts.load_tokenizer(ModelSpec(name="none", tokenizer=os.environ["RAY_PEFT_CLIP"])),
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                skip_prk_steps=True),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder, {"steps": step, "mean_absolute_error": float(error), "latent_std": spread}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), SIZES[sys.argv[3] if len(sys.argv) > 3 else "full"])
