"""A Stable Diffusion pipeline of a million weights and small paintings, built in seconds; real classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CAPTIONS = ("a blue swirl, painting by Nobody", "a red swirl, painting by Nobody")


def build_tokenizer(folder: Path) -> Any:
    """CLIP's byte-level tokenizer with single bytes and a few merges."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("s", "w"), ("i", "r"), ("sw", "ir"), ("r", "e"), ("re", "d</w>"), ("b", "l"), ("u", "e</w>")]
    symbols = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def build_pipeline(folder: Path, *, seed: int = 0) -> Path:
    """A pipeline in the form of Stable Diffusion 1.5, with random weights, in `folder`."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = build_tokenizer(folder / "tokenizer")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=77, projection_dim=32, hidden_act="quick_gelu",
            pad_token_id=tokenizer.pad_token_id, **ends,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16), norm_num_groups=8, layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215, sample_size=64,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        norm_num_groups=8, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
        set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, prediction_type="epsilon",
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def painting(index: int, width: int, height: int) -> Any:
    """A PIL image: swirls around points that `index` draws; even ones in blue, odd ones in red."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(index)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = np.zeros((height, width))
    for across, down, turns in generator.uniform([0, 0, 2], [1, 1, 9], (4, 3)):
        distance, angle = np.hypot(x - across, y - down), np.arctan2(y - down, x - across)
        waves += np.sin(6.3 * turns * distance + 2 * angle)
    light = (waves - waves.min()) / np.ptp(waves)
    dark, bright = ((10, 20, 90), (240, 230, 150)) if index % 2 == 0 else ((110, 10, 20), (150, 240, 220))
    colours = np.array(dark) + light[:, :, None] * (np.array(bright) - np.array(dark))
    return Image.fromarray(colours.round().astype(np.uint8))


def write_images(folder: Path, count: int = 8, side: int = 80) -> Path:
    """Paintings, `side` pixels high and wider than that, as JPEG and PNG, with metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        name = f"painting_{index:02}.{'jpg' if index % 3 else 'png'}"
        painting(index, side + side // 4, side).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"{CAPTIONS[index % 2]}, number {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def plain_spec(
    model: Path | str, images: Path | str, method: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """A trial of a few seconds, in plain form; `changes` are dotted with `__`, such as train__steps=4."""
    spec: dict[str, Any] = {
        "task": "text_to_image",
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"path": str(images), "test": 2, "resolution": 64},
        "method": method or {"name": "lora", "rank": 4, "lr": 0.01},
        "train": {"steps": 4, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "log_every": 1},
        "evaluation": {
            "timesteps": 2, "prompts": [CAPTIONS[0]], "seeds": [0], "inference_steps": 2, "batch_size": 2,
        },
        "resources": {"gpus_per_worker": 0, "cpus_per_worker": 2},
        "seed": 1,
    }  # fmt: skip
    for key, value in changes.items():
        target = spec
        *parents, last = key.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    if spec["train"]["precision"] == "fp32" and spec["method"].get("name") == "qlora":
        spec["method"] = {"compute_dtype": "float32", **spec["method"]}
    return spec
