"""Peak memory as predicted and as measured: our own training path on rows that all have the same number of tokens.

With RAY_PEFT_GEMMA2, RAY_PEFT_GEMMA3, RAY_PEFT_SMOLLM2, RAY_PEFT_GPT2 and RAY_PEFT_SD15 set (those that are):
    python benchmarks/memory.py benchmarks/results/memory_h200.json            # all cells
    python benchmarks/memory.py OUT.json --part 0/2                            # every second cell; parts merge in OUT
    python benchmarks/memory.py OUT.json --analyse                             # predict again, no GPU, no models

The accuracy table is written beside OUT.json, as OUT.md.

The models are folders with config.json and tokenizer; their weights are random. Measured cells of OUT are kept: the
same command goes on where it was stopped. Each is written as soon as it is measured; predictions follow at the end.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from provenance import write

from ray_peft.foundation.units import GIB
from ray_peft.spec import ImageTrialSpec, LlmTrialSpec
from ray_peft.tasks.llm_sft import memory as of_text
from ray_peft.tasks.text_to_image import memory as of_images
from ray_peft.trial.peaks import MemoryWatch
from ray_peft.vram import ModelShape
from ray_peft.vram.cards import known

MODELS = {"gemma-2-2b": "RAY_PEFT_GEMMA2", "gemma-3-1b": "RAY_PEFT_GEMMA3", "SmolLM2-135M": "RAY_PEFT_SMOLLM2",
          "gpt2": "RAY_PEFT_GPT2", "SD 1.5": "RAY_PEFT_SD15"}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "lora dropout": {"name": "lora", "dropout": 0.05},
    "lora fused": {"name": "lora", "targets": ["c_attn", "c_proj", "c_fc"]},
    "qlora": {"name": "qlora"},
    "qlora fp16 paged": {"name": "qlora", "compute_dtype": "float16", "dropout": 0.05, "optim": "paged_adamw_8bit"},
    "full": {"name": "full"},
    "full fp32": {"name": "full", "weights": "float32"},
    "full fp32 8-bit": {"name": "full", "weights": "float32", "optim": "adamw_8bit"},
    "galore": {"name": "galore"},
    "galore fp32": {"name": "galore", "weights": "float32"},
    "galore layerwise": {"name": "galore", "layerwise": True, "max_grad_norm": None},
}
# model, method, [(tokens, micro-batch, checkpointing), ...]; uneven rows differ in length: attention needs a mask.
GRID: list[tuple[str, str, list[tuple[int, int, bool]]]] = [
    ("SmolLM2-135M", "lora", [(256, 8, False), (512, 8, False), (2048, 1, False), (2048, 4, True)]),
    ("SmolLM2-135M", "qlora", [(512, 8, False), (2048, 4, False), (2048, 8, True)]),
    ("SmolLM2-135M", "full", [(256, 4, False), (2048, 4, True)]),
    ("SmolLM2-135M", "full fp32", [(512, 4, False), (2048, 4, True)]),
    ("SmolLM2-135M", "galore", [(512, 4, False)]),
    ("SmolLM2-135M", "galore fp32", [(2048, 4, True)]),
    ("gpt2", "lora fused", [(512, 8, False), (512, 1, False), (1024, 4, True)]),
    ("gemma-3-1b", "lora", [(256, 1, False), (512, 4, False), (2048, 1, False), (2048, 4, True)]),
    ("gemma-3-1b", "lora dropout", [(512, 4, False)]),
    ("gemma-3-1b", "qlora", [(256, 4, False), (512, 1, False), (512, 8, False), (2048, 4, True)]),
    ("gemma-3-1b", "qlora fp16 paged", [(2048, 4, True)]),
    ("gemma-3-1b", "full", [(512, 4, False), (2048, 4, True)]),
    ("gemma-3-1b", "full fp32", [(512, 1, True)]),
    ("gemma-3-1b", "full fp32 8-bit", [(512, 4, True)]),
    ("gemma-3-1b", "galore", [(512, 4, False), (2048, 4, True)]),
    ("gemma-3-1b", "galore layerwise", [(512, 4, True)]),
    ("gemma-2-2b", "lora", [(256, 4, False), (512, 1, False), (512, 1, True), (512, 8, True), (2048, 1, True)]),
    ("gemma-2-2b", "qlora", [(256, 8, False), (512, 1, False), (512, 4, True), (2048, 1, False), (2048, 1, True)]),
    ("gemma-2-2b", "full", [(512, 1, True), (256, 4, False)]),
]
UNEVEN: list[tuple[str, str, list[tuple[int, int, bool]]]] = [
    ("SmolLM2-135M", "lora", [(512, 8, False)]),
    ("SmolLM2-135M", "qlora", [(2048, 4, True)]),
    ("gemma-3-1b", "qlora", [(2048, 4, False)]),
    ("gemma-3-1b", "lora", [(512, 8, False)]),
    ("gemma-2-2b", "qlora", [(512, 4, False)]),
]
# (resolution, micro-batch, checkpointing)
UNETS: list[tuple[str, list[tuple[int, int, bool]]]] = [
    ("lora", [(512, 1, False), (512, 4, False), (512, 1, True), (512, 4, True), (256, 1, False)]),
    ("qlora", [(512, 1, False), (512, 4, False), (512, 1, True)]),
    ("full", [(512, 1, False), (512, 2, True)]),
    ("full fp32", [(256, 1, False)]),
]
CARDS_GIB = (4, 6, 8, 10, 12, 16, 24, 40, 48, 80)
STEPS = 3


def cells() -> list[dict[str, Any]]:
    """Every cell of the grid, in an order that loads a model's file once."""
    return [
        {"model": model, "method": method, "tokens": tokens, "micro_batch_size": rows, "checkpointing": checkpointing,
         "uneven": uneven}
        for uneven, grid in ((False, GRID), (True, UNEVEN))
        for model, method, sizes in grid
        for tokens, rows, checkpointing in sizes
    ] + [
        {"model": "SD 1.5", "method": method, "pixels": pixels, "tokens": 0, "micro_batch_size": rows,
         "checkpointing": checkpointing, "uneven": False}
        for method, sizes in UNETS
        for pixels, rows, checkpointing in sizes
    ]  # fmt: skip


def spec_of(cell: dict[str, Any], folder: str) -> Any:
    """The trial of a cell; two passes a step, but one where the method allows no more."""
    if "pixels" in cell:
        return ImageTrialSpec.from_plain(
            {
                "task": "text_to_image",
                "model": {"name": folder, "random_weights": True},
                "data": {"path": "none", "test": 1, "resolution": cell["pixels"]},
                "method": METHODS[cell["method"]],
                "train": {
                    "steps": STEPS,
                    "batch_size": cell["micro_batch_size"],
                    "micro_batch_size": cell["micro_batch_size"],
                    "gradient_checkpointing": cell["checkpointing"],
                    "log_every": 1,
                },
            }
        )
    method = METHODS[cell["method"]]
    passes = 1 if method.get("layerwise") else 2
    return LlmTrialSpec.from_plain(
        {
            "model": {"name": folder, "random_weights": True},
            "data": {
                "sources": [{"recipe": "text", "path": "none.jsonl", "train": 1, "test": 1}],
                "max_length": cell["tokens"],
            },
            "method": method,
            "train": {
                "steps": STEPS,
                "batch_size": passes * cell["micro_batch_size"],
                "micro_batch_size": cell["micro_batch_size"],
                "gradient_checkpointing": cell["checkpointing"],
                "loss": "all",
                "log_every": 1,
            },
            "evaluation": {"generate": False},
        }
    )


def measured(cell: dict[str, Any], folder: str, device: str) -> dict[str, Any]:
    """Load, attach and train as a trial does; the peaks of the training alone."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, set_seed

    from ray_peft.engine.member import Job
    from ray_peft.tasks.llm_sft.model import load_model
    from ray_peft.tasks.llm_sft.train import train_stage

    spec = spec_of(cell, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    set_seed(spec.seed)
    model = load_model(spec, device)
    watch = MemoryWatch(device)
    ((stage, steps),) = spec.method.stages(STEPS)
    rows = []
    for row in range(STEPS * spec.train.batch_size):
        tokens = cell["tokens"] - (8 if cell["uneven"] and row % 2 else 0)
        ids = torch.randint(10, min(spec_vocabulary(model), 200), (tokens,), generator=torch.manual_seed(row)).tolist()
        rows.append({"input_ids": ids, "labels": ids})
    work = Path(tempfile.mkdtemp())
    begin = time.perf_counter()
    watch.start()
    try:
        attached = stage.attach(model)
        job = Job(spec, stage, steps, 0, work, device, lambda *_: None, lambda: 0.0)
        train_stage(spec, job, Dataset.from_list(rows), attached, tokenizer)  # type: ignore[arg-type]
    finally:
        watch.stop()
        shutil.rmtree(work, ignore_errors=True)
    return taken(watch, begin)


def measured_unet(cell: dict[str, Any], folder: str, device: str) -> dict[str, Any]:
    """The same for a UNet, on random latents."""
    import torch
    from diffusers import DDPMScheduler
    from transformers import set_seed

    from ray_peft.engine.member import Job
    from ray_peft.tasks.text_to_image import latents, model, noise, passes, train

    spec = spec_of(cell, folder)
    set_seed(spec.seed)
    side = cell["pixels"] // 8
    images = latents.Encoded(torch.randn(8, 1, 8, side, side), torch.randn(8, 77, 768), 0)
    work = Path(tempfile.mkdtemp())
    watch = MemoryWatch(device)
    ((stage, steps),) = spec.method.stages(STEPS)
    unet = model.load_unet(spec, device)
    begin = time.perf_counter()
    watch.start()
    try:
        attached = passes.attached(spec, stage, unet)
        draws = noise.Draws(spec, images, 0.18215, DDPMScheduler())
        job = Job(spec, stage, steps, 0, work, device, lambda *_: None, lambda: 0.0)
        train.train_stage(spec, job, draws, attached)
    finally:
        watch.stop()
        shutil.rmtree(work, ignore_errors=True)
    return taken(watch, begin)


def taken(watch: MemoryWatch, begin: float) -> dict[str, Any]:
    """What a cell took."""
    peaks = watch.peaks
    return {
        "status": "measured",
        "peak_allocated_gib": peaks.allocated_gib,
        "peak_reserved_gib": peaks.reserved_gib,
        "device_used_gib": peaks.device_used_gib,
        "train_s": round(time.perf_counter() - begin, 1),
    }


def spec_vocabulary(model: Any) -> int:
    """Tokens that the model knows."""
    return int(model.config.get_text_config().vocab_size)


def released() -> float | None:
    """Give all memory back; returns what is still allocated [GiB]."""
    import torch

    gc.collect()
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()  # each cell is to pay for its own, as a trial's process does
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / GIB


def run(target: Path, part: tuple[int, int], models: dict[str, str], chosen: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure the cells of this part that `target` lacks; it is written after each."""
    import torch

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    known_cells = {key(each): each for each in found.get("cells", [])}
    shapes = found.get("shapes", {})
    for number, cell in enumerate(chosen):
        folder = models.get(cell["model"])
        if folder is None or number % part[1] != part[0] or known_cells.get(key(cell), {}).get("status") == "measured":
            continue
        config = Path(folder) / ("unet/config.json" if "pixels" in cell else "config.json")
        shapes[cell["model"]] = json.loads(ModelShape.from_config(config).config)
        before = released()
        try:
            result = (measured_unet if "pixels" in cell else measured)(cell, folder, device)
        except torch.OutOfMemoryError as error:
            result = {"status": "out_of_memory", "error": str(error).splitlines()[0]}
        except Exception as error:  # a benchmark reports what failed and goes on
            traceback.print_exc()
            result = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
        known_cells[key(cell)] = {**cell, **result, "allocated_before_gib": before}
        print(f"{number + 1}/{len(chosen)} {key(cell)}: {result}", flush=True)
        found = {**found, "shapes": shapes, "cells": list(known_cells.values())}
        save(target, found)
    return found


def key(cell: dict[str, Any]) -> str:
    """A cell's name."""
    marks = [" checkpointing" if cell["checkpointing"] else "", " uneven" if cell["uneven"] else ""]
    size = f"{cell['pixels']}px" if "pixels" in cell else cell["tokens"]
    return f"{cell['model']} {cell['method']} {cell['micro_batch_size']}x{size}{''.join(marks)}"


def save(target: Path, found: dict[str, Any]) -> None:
    """Write atomically."""
    partial = target.with_suffix(".partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(target)


def predicted(found: dict[str, Any], card: str) -> None:
    """Put this code's prediction beside every measured cell, and the summary over them."""
    gpu = known(card)
    errors, reserved_errors, false_fits, missed_fits = [], [], [], []
    for cell in found.get("cells", []):
        if cell["status"] != "measured":
            continue
        shape = ModelShape.from_config(found["shapes"][cell["model"]])
        begin = time.perf_counter()
        trial = spec_of(cell, cell["model"])
        if isinstance(trial, ImageTrialSpec):
            prediction = of_images.predict(trial, shape, gpu=gpu)
        else:
            assert isinstance(trial, LlmTrialSpec)
            prediction = of_text.predict(trial, shape, longest_tokens=cell["tokens"], padded=cell["uneven"], gpu=gpu)
        cell["predicted"] = prediction.gib()
        cell["predict_s"] = round(time.perf_counter() - begin, 2)
        if cell["peak_allocated_gib"] is None:
            continue
        allocated, reserved = cell["peak_allocated_gib"] - left(cell), cell["peak_reserved_gib"] - left(cell)
        cell["error"] = cell["predicted"]["peak_allocated_gib"] / allocated - 1
        cell["error_reserved"] = cell["predicted"]["peak_reserved_gib"] / reserved - 1
        errors.append(cell["error"])
        reserved_errors.append(cell["error_reserved"])
        taken = allocated + gpu.context / GIB
        for size in CARDS_GIB:
            says, true = gpu.holds(prediction.peak_reserved, memory_gib=size), taken <= size
            if says and not true:
                false_fits.append(f"{key(cell)} on {size} GiB")
            if true and not says:
                missed_fits.append(f"{key(cell)} on {size} GiB")
    if errors:
        found["summary"] = {
            "card": gpu.name,
            "cells": len(errors),
            "median_absolute_error": statistics.median(abs(each) for each in errors),
            "worst_absolute_error": max(abs(each) for each in errors),
            "median_absolute_error_reserved": statistics.median(abs(each) for each in reserved_errors),
            "false_fits": false_fits,
            "missed_fits": missed_fits,
        }


def left(cell: dict[str, Any]) -> float:
    """GiB that cells before it left in its process; they count for none."""
    return float(cell.get("allocated_before_gib") or 0.0)


def table(found: dict[str, Any]) -> str:
    """The accuracy table, worst first."""
    rows = ["| cell | predicted [GiB] | measured [GiB] | error | reserved: predicted | measured |",
            "| :--- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    every = [cell for cell in found.get("cells", []) if "error_reserved" in cell]
    for cell in sorted(every, key=lambda cell: -abs(cell["error"])):
        said = cell["predicted"]
        rows.append(
            f"| {key(cell)} | {said['peak_allocated_gib']:.2f} | {cell['peak_allocated_gib'] - left(cell):.2f} | "
            f"{cell['error']:+.1%} | {said['peak_reserved_gib']:.2f} | {cell['peak_reserved_gib'] - left(cell):.2f} |"
        )
    return "\n".join(rows)


def page(found: dict[str, Any]) -> str:
    """Summary and accuracy table, as a Markdown page."""
    said = found.get("summary")
    if said is None:
        return "nothing is measured yet\n"
    sizes = f"{', '.join(str(size) for size in CARDS_GIB[:-1])} and {CARDS_GIB[-1]} GiB"
    versions, missed = found["versions"], said["missed_fits"]
    return f"""# Predicted and measured peak memory

{said["cells"]} cells on one {said["card"]}, {found["date"]}, torch {versions["torch"]}. A cell is a model, a method,
and rows of a pass x tokens or pixels; weights are random, shapes are true. `benchmarks/memory.py` makes this page.

- Allocated peak: error {said["median_absolute_error"]:.1%} in the median, {said["worst_absolute_error"]:.1%} at worst.
- Reserved peak: {said["median_absolute_error_reserved"]:.1%} in the median.
- On cards of {sizes}, {len(said["false_fits"])} of the cells were said to fit that do not:
  {"; ".join(said["false_fits"]) or "none"}.
- {len(missed)} were said not to fit that do: {"; ".join(missed) or "none"}.

{table(found)}
"""


def main() -> None:
    """Measure, then predict; or predict alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--part", default="0/1", help="such as 0/2: the first of every two cells")
    parser.add_argument("--analyse", action="store_true", help="predict again from the measured cells")
    parser.add_argument("--measure-only", action="store_true", help="leave the predictions for later")
    parser.add_argument("--cells", default="", help="only cells whose name contains this")
    parser.add_argument("--card", default=None, help="the card's name; default: the one measured")
    options = parser.parse_args()
    number, of = (int(each) for each in options.part.split("/"))
    if options.analyse:
        found = json.loads(options.target.read_text(encoding="utf-8"))
        predicted(found, options.card or (found.get("gpus") or ["NVIDIA H200"])[0])
        save(options.target, found)
    else:
        models = {name: os.environ[variable] for name, variable in MODELS.items() if os.environ.get(variable)}
        chosen = [cell for cell in cells() if options.cells in key(cell)]
        found = run(options.target, (number, of), models, chosen)
        released()
        write(options.target, found)
        if not options.measure_only:
            found = json.loads(options.target.read_text(encoding="utf-8"))
            predicted(found, options.card or (found.get("gpus") or ["NVIDIA H200"])[0])
            save(options.target, found)
    text = page(found)
    options.target.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
