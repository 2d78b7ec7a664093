"""Stable Diffusion 1.5 on paintings beside the stock loop, on true shapes: memory, speed and storage.

With RAY_PEFT_SD15 (a pipeline's folder; configs are enough), RAY_PEFT_CLIP (its tokenizer) and RAY_PEFT_VAN_GOGH set:
    python benchmarks/text_to_image.py FOLDER benchmarks/results/text_to_image_h200.json

`stock` is the loop of diffusers' train_text_to_image_lora.py: images are read, encoded by the VAE and captions by the
text encoder in every step, bf16 weights, float32 adapters, bf16 autocast. `ours` is the search space sd15_van_gogh.
Weights are random, so scores say nothing.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from provenance import write

ROOT = Path(__file__).resolve().parent.parent
SPACE = ROOT / "search_spaces" / "sd15_van_gogh.yaml"
STOCK_STEPS, STOCK_WARM_UP = 100, 10
STEPS = 600
RANDOM = ["model.random_weights=true", "model.tokenizer=${RAY_PEFT_CLIP}", f"train.steps={STEPS}"]
SHORT = ["evaluation.prompts=[]", "train.steps=300"]
TWO = ["method={grid: [{name: lora, rank: 16, lr: 1.0e-4}, {name: qlora, rank: 16, lr: 1.0e-4}]}", *SHORT]
CASES: dict[str, list[str]] = {
    "study": [],
    "checkpointing": [*TWO, "train.gradient_checkpointing=true"],
    "batch_4": [*TWO, "train.batch_size=4", "train.micro_batch_size=4"],
    "full": [*SHORT, "method={name: full}"],
    "no_cuda_graphs": [*TWO, "train.steps=150", "train.cuda_graphs=false"],
}
CAP_GIB = 6.0


def main(folder: Path, target: Path, only: list[str]) -> None:
    """Run every case; the result is written after each, so that a late failure loses nothing."""
    import ray_peft
    from ray_peft.console import Console

    measured: dict[str, Any] = {"steps": STEPS, "cap_gib": CAP_GIB, "ours": {}, "stock": []}
    for name in ("lora", "qlora", "lora_checkpointing", "qlora_checkpointing"):
        if only and "stock" not in only:
            break
        try:
            measured["stock"].append(stock(name))
        except Exception as error:
            measured["stock"].append({"name": name, "error": f"{type(error).__name__}: {error}"})
            traceback.print_exc()
        write(target, measured)
    for name, overrides in CASES.items():
        if only and name not in only:
            continue
        try:
            outcome = ray_peft.sweep(
                SPACE, out=folder / name, overrides=[*RANDOM, *overrides], console=Console(),
                gpu_memory_gib=CAP_GIB if name != "full" else None,
            )  # fmt: skip
            measured["ours"][name] = [row(result) for result in outcome.results]
        except Exception as error:  # a benchmark reports what failed and goes on
            measured["ours"][name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        write(target, measured)


def row(result: Any) -> dict[str, Any]:
    """What the study's table compares."""
    usage = result.usage
    return {
        "trial_id": result.trial_id, "method": result.spec.method.name, "status": result.status,
        "error": (result.error or "").partition("\n")[0] or None, "steps": result.steps,
        "steps_per_s": usage.steps_per_s, "peak_allocated_gib": usage.peak_allocated_gib,
        "peak_reserved_gib": usage.peak_reserved_gib, "trainable_parameters": result.trainable_parameters,
        "total_parameters": result.total_parameters, "adapter_bytes": result.adapter_bytes,
        "train_loss_final": result.train_loss_final, "load_s": usage.load_s, "train_s": usage.train_s,
        "evaluate_s": usage.evaluate_s, "eval_loss": result.scores.eval_loss,
    }  # fmt: skip


def stock(name: str) -> dict[str, Any]:
    """One row of the stock loop."""
    import torch
    from diffusers import BitsAndBytesConfig, DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    from PIL import Image

    from ray_peft.foundation.units import GIB
    from ray_peft.space.read import load
    from ray_peft.tasks.text_to_image import model as parts

    spec = load(SPACE, RANDOM).trials[1]
    device = "cuda:0"
    torch.manual_seed(0)
    paintings = [json.loads(line) for line in (Path(spec.data.path) / "metadata.jsonl").read_text().splitlines()]
    tokenizer = parts.load_tokenizer(spec.model)
    vae = parts.load_vae(spec.model, device, "bfloat16")
    text_encoder = parts.load_text_encoder(spec.model, device, "bfloat16")
    quantised = name.startswith("qlora")
    settings: dict[str, Any] = {"torch_dtype": torch.bfloat16}
    if quantised:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    unet = UNet2DConditionModel.from_pretrained(parts._random_part(spec.model, "unet"), subfolder="unet", **settings)
    unet.requires_grad_(False)
    unet.to(device)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=16, lora_alpha=32, init_lora_weights="gaussian", target_modules=targets))
    cast_training_params(unet, dtype=torch.float32)
    if name.endswith("checkpointing"):
        unet.enable_gradient_checkpointing()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2)
    schedule = DDPMScheduler.from_config(parts.load_configs(spec.model).parts["scheduler"])
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    unet.train()
    begin = 0.0
    for step in range(STOCK_STEPS + STOCK_WARM_UP):
        if step == STOCK_WARM_UP:
            torch.cuda.synchronize()
            begin = time.perf_counter()
        painting = paintings[step % len(paintings)]
        pixels = read(Image, Path(spec.data.path) / painting["file_name"]).to(device, torch.bfloat16)
        ids = tokenizer(painting["text"], max_length=77, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            texts = text_encoder(ids["input_ids"].to(device))[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (1,), device=device)
        noisy = schedule.add_noise(latents, noise, timesteps)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            predicted = unet(noisy, timesteps, texts).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    found = {
        "name": name, "steps_per_s": STOCK_STEPS / seconds,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
    }  # fmt: skip
    del unet, vae, text_encoder, optimizer, trained
    gc.collect()
    torch.cuda.empty_cache()
    return found


def read(image: Any, path: Path) -> Any:
    """(1, 3, 512, 512) in [-1, 1]: resized and cropped as the script does."""
    import numpy
    import torch

    picture = image.open(path).convert("RGB")
    scale = 512 / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), image.BILINEAR)
    left, top = (picture.width - 512) // 2, (picture.height - 512) // 2
    values = numpy.asarray(picture.crop((left, top, left + 512, top + 512)), dtype="float32")
    return torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1)[None]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
