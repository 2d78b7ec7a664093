"""One GPU, shared and short: what sharing gains, what a neighbour that lies about its memory does, what recovery costs.

With RAY_PEFT_MODEL (config.json and tokenizer of SmolLM2-135M), RAY_PEFT_SD15 and RAY_PEFT_CLIP set:
    python benchmarks/sharing.py benchmarks/results/sharing_h200.json [neighbour] [recovery] [image_recovery] [packing]

neighbour: an honest trial beside one whose share of the GPU is far too small for a single row, and the honest one
    alone, twice: two equal runs say how much of a difference is none. Losses are compared step by step.
recovery: one pass of 16 rows of 512 tokens a step, undisturbed and under a cap that holds a few rows.
image_recovery: the same with a UNet of Stable Diffusion 1.5, 4 images a pass.
packing: four trials of one row a pass on 12 GiB in bfloat16, one after another and packed by their predicted bytes.

Weights are random and rows are made of random words, so losses say nothing but whether they are equal. All but packing
computes in float32, where equal mathematics shows as equal numbers. Cases that the result file holds already, and that
are not run, are kept.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from long_rows import write_long_rows
from provenance import write

import ray_peft
from ray_peft.console import Console
from ray_peft.foundation.units import GIB
from ray_peft.schedule import cluster
from ray_peft.space.read import Space, TrackingSpec
from ray_peft.spec import TrialSpec
from ray_peft.store.ledger import Ledger
from ray_peft.tasks import TASKS
from ray_peft.vram.cards import Gpu, known

TOKENS = 512
STEPS = 20
HONEST_SHARE = 0.5
LIAR_GIB = 1.6
"""What the liar asks for: full tuning of 135 million float32 weights takes 2.2 GB before the first row."""
CPUS = 4
PACKED = 4
PACKED_GIB = 12.0


def main(target: Path, chosen: list[str]) -> None:
    """Run the chosen cases (all by default); the result is written after each, so that a late failure loses nothing.

    Raises:
        SystemExit: no such case.
    """
    unknown = sorted(set(chosen) - set(CASES))
    if unknown:
        raise SystemExit(f"no such case: {', '.join(unknown)}; choose from {', '.join(CASES)}")
    folder = Path(tempfile.mkdtemp())
    os.environ.setdefault("RAY_PEFT_OUTPUTS", str(folder / "outputs"))
    earlier = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    measured: dict[str, Any] = {
        "tokens": TOKENS,
        "steps": STEPS,
        **{key: earlier[key] for key in CASES if key in earlier},
    }
    gpu = card()
    with cluster.connect():  # one Ray for all sweeps
        for name in chosen or CASES:
            print(f"== {name}", flush=True)
            try:
                measured[name] = CASES[name](folder / name, gpu)
            except Exception as error:  # a benchmark reports what failed and goes on
                measured[name] = {"error": f"{type(error).__name__}: {error}"}
                traceback.print_exc()
            write(target, measured)
    print("\n".join(summary(measured)))


def card() -> Gpu:
    """The GPU that is here, with the memory that NVML says: this process takes no CUDA context."""
    from ray_peft.foundation.nvml import gpu_memory

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    found = gpu_memory(visible)
    if found is None:
        raise SystemExit("no GPU here: NVML does not answer")
    return replace(known(found.name), name=found.name, memory_gib=found.total_gib)


def text_trial(
    rows: Path, method: dict[str, Any], *, micro: int, batch: int, share: float | None = 1.0, dtype: str = "float32",
    cpus: int = CPUS, seed: int = 0,
) -> TrialSpec:  # fmt: skip
    """A trial of SmolLM2's shape on rows of `TOKENS` tokens each."""
    return TrialSpec.from_plain(
        {
            "task": "llm_sft",
            "seed": seed,
            "model": {"name": os.environ["RAY_PEFT_MODEL"], "dtype": dtype, "random_weights": True},
            "data": {
                "sources": [{"recipe": "prompt_completion", "path": str(rows), "train": 64, "test": 4}],
                "max_length": TOKENS,
            },
            "method": method,
            "train": {
                "steps": STEPS, "batch_size": batch, "micro_batch_size": micro, "log_every": 1, "loss": "all",
                "precision": "fp32" if dtype == "float32" else "bf16",
            },
            "evaluation": {"generate": False},
            "resources": {"gpus_per_worker": share, "cpus_per_worker": cpus},
        }
    )  # fmt: skip


def image_trial(paintings: Path, *, micro: int, batch: int) -> TrialSpec:
    """A trial of Stable Diffusion 1.5's shape."""
    return TrialSpec.from_plain(
        {
            "task": "text_to_image",
            "model": {
                "name": os.environ["RAY_PEFT_SD15"], "tokenizer": os.environ["RAY_PEFT_CLIP"], "dtype": "float32",
                "random_weights": True,
            },
            "data": {"path": str(paintings), "test": 2},
            "method": {"name": "lora", "rank": 16, "lr": 1.0e-4},
            "train": {
                "steps": STEPS, "batch_size": batch, "micro_batch_size": micro, "precision": "fp32", "log_every": 1,
            },
            "resources": {"gpus_per_worker": 1.0, "cpus_per_worker": CPUS},
        }
    )  # fmt: skip


def swept(out: Path, trials: list[TrialSpec], cap_gib: float | None = None) -> list[dict[str, Any]]:
    """The rows of a sweep over the trials, each with its logged losses."""
    space = Space(
        name=out.name, description="", trials=trials, search=None, tracking=TrackingSpec(),
        templates=[trial.plain() for trial in trials],
    )  # fmt: skip
    outcome = ray_peft.sweep(space, out=out, gpu_memory_gib=cap_gib, console=Console())
    # In the order of the plan; ids are those of their content.
    return [row(result, Ledger(out).trial_folder(result.trial_id)) for result in outcome.results]


def row(result: ray_peft.TrialResult, folder: Path) -> dict[str, Any]:
    """What is compared."""
    usage = result.usage
    return {
        "trial_id": result.trial_id,
        "method": result.spec.method.name,
        "gpus_per_worker": result.provenance.gpus_per_worker,
        "micro_batch_size": result.spec.train.micro_batch_size,
        "status": result.status,
        "error": (result.error or "").partition("\n")[0] or None,
        "chosen": result.chosen,
        "lowered": result.lowered,
        "predicted": result.predicted,
        "peak_allocated_gib": usage.peak_allocated_gib,
        "peak_reserved_gib": usage.peak_reserved_gib,
        "steps_per_s": usage.steps_per_s,
        "train_s": usage.train_s,
        "wall_time_s": usage.wall_time_s,
        "started_at": result.provenance.started_at,
        "losses": losses(folder),
        "eval_loss": result.scores.eval_loss,
    }


def losses(folder: Path) -> list[float]:
    """The training losses that a trial logged, by step; of a step that was done again, the last."""
    log = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    found = {line["step"]: line["train_loss"] for line in lines if "train_loss" in line}
    return [found[step] for step in sorted(found)]


def difference(first: dict[str, Any], second: dict[str, Any]) -> float | None:
    """The largest difference of two curves; null if they are not of the same steps."""
    pairs = list(zip(first["losses"], second["losses"], strict=False))
    if not pairs or len(first["losses"]) != len(second["losses"]):
        return None
    return max(abs(one - other) for one, other in pairs)


def together_s(rows: list[dict[str, Any]]) -> float:
    """Seconds during which all of the trials were running; starts are known to a second."""
    begins = [datetime.fromisoformat(each["started_at"]).timestamp() for each in rows]
    ends = [begin + each["wall_time_s"] for begin, each in zip(begins, rows, strict=True)]
    return max(0.0, min(ends) - max(begins))


def neighbour(out: Path, gpu: Gpu) -> dict[str, Any]:
    """An honest trial beside a liar, and alone."""
    rows = write_long_rows(out / "rows.jsonl", 100, TOKENS)
    honest = text_trial(rows, {"name": "lora", "lr": 2.0e-4}, micro=4, batch=8, share=HONEST_SHARE)
    share = round(LIAR_GIB / gpu.memory_gib, 4)
    liar = text_trial(rows, {"name": "full", "weights": "float32"}, micro=1, batch=8, share=share)
    (alone,), (again,) = swept(out / "alone", [honest]), swept(out / "again", [honest])
    beside, lied = swept(out / "beside", [honest, liar])
    return {
        "alone": alone,
        "again": again,
        "beside": beside,
        "liar": lied,
        "together_s": together_s([beside, lied]),
        "difference_of_equal_runs": difference(alone, again),
        "difference": difference(alone, beside),
    }


def recovered(out: Path, gpu: Gpu, made: Callable[[int], TrialSpec], micro: int, held: int) -> dict[str, Any]:
    """A trial of `micro` rows a pass, undisturbed and under a cap that holds `held` rows, but not twice as many.

    Args:
        out: folder for both sweeps.
        gpu: the GPU that is here.
        made: the trial with so many rows a pass.
        micro: rows a pass.
        held: rows a pass that fit.
    """
    task = TASKS[made(micro).task]
    less, more = task.predict(made(held), gpu), task.predict(made(2 * held), gpu)
    assert less is not None
    assert more is not None
    cap_gib = (gpu.context + (less.peak_reserved + more.peak_allocated) / 2) / GIB
    (plain,) = swept(out / "plain", [made(micro)])
    (capped,) = swept(out / "capped", [made(micro)], cap_gib)
    return {
        "cap_gib": cap_gib,
        "plain": plain,
        "capped": capped,
        "lowered": capped["lowered"],
        "difference": difference(plain, capped),
    }


def recovery(out: Path, gpu: Gpu) -> dict[str, Any]:
    """Text: 16 rows a pass where 4 fit."""
    rows = write_long_rows(out / "rows.jsonl", 100, TOKENS)
    lora = {"name": "lora", "lr": 2.0e-4}
    return recovered(out, gpu, lambda micro: text_trial(rows, lora, micro=micro, batch=16), 16, 4)


def image_recovery(out: Path, gpu: Gpu) -> dict[str, Any]:
    """Images: 4 a pass where 2 fit."""
    paintings = write_paintings(out / "paintings")
    return recovered(out, gpu, lambda micro: image_trial(paintings, micro=micro, batch=4), 4, 2)


def packing(out: Path, gpu: Gpu) -> dict[str, Any]:
    """Small trials on a small card: each with the GPU to itself, then as many at once as their bytes allow."""
    rows = write_long_rows(out / "rows.jsonl", 100, TOKENS)
    lora = {"name": "lora", "lr": 2.0e-4}

    def trials(share: float | None) -> list[TrialSpec]:
        shape = {"micro": 1, "batch": 8, "dtype": "bfloat16", "cpus": 2}
        return [text_trial(rows, lora, share=share, seed=seed, **shape) for seed in range(PACKED)]

    found: dict[str, Any] = {"card_gib": PACKED_GIB}
    for name, share in (("packed", None), ("alone", 1.0)):  # the first pays for what the second finds warm
        begin = time.perf_counter()
        found[name] = swept(out / name, trials(share), PACKED_GIB)
        found[f"{name}_s"] = round(time.perf_counter() - begin, 1)
    apart = [difference(one, other) for one, other in zip(found["alone"], found["packed"], strict=True)]
    return {**found, "differences": apart}


def write_paintings(folder: Path, count: int = 12, side: int = 512) -> Path:
    """Pictures of coloured noise with captions, for what does not depend on what is seen."""
    import numpy
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        pixels = numpy.random.default_rng(index).integers(0, 256, (side // 16, side // 16, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).resize((side, side)).save(folder / f"{index:02}.png")
        lines.append(json.dumps({"file_name": f"{index:02}.png", "text": f"noise number {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def summary(measured: dict[str, Any]) -> list[str]:
    """A line or two a case."""
    said = []
    for name in CASES:
        found = measured.get(name)
        if found is None:
            continue
        if "error" in found:
            said.append(f"{name}: {found['error']}")
        elif name == "neighbour":
            said.append(
                f"neighbour: honest {found['beside']['status']}, liar {found['liar']['status']} "
                f"({found['liar']['error']}), {found['together_s']:.0f} s side by side; losses differ by "
                f"{found['difference']} from those alone, two runs alone by {found['difference_of_equal_runs']}"
            )
        elif name == "packing":
            rows = found["packed"]
            said.append(
                f"packing: {len(rows)} trials on {found['card_gib']} GiB in {found['alone_s']} s one after another, in "
                f"{found['packed_s']} s packed ({[each['gpus_per_worker'] for each in rows]} of a GPU, "
                f"{[each['status'] for each in rows]}); losses differ by {found['differences']}"
            )
        else:
            plain, capped = found["plain"], found["capped"]
            said.append(
                f"{name}: {capped['status']} under {found['cap_gib']:.2f} GiB, lowered {found['lowered']}; losses "
                f"differ by {found['difference']}; {plain['steps_per_s']} and {capped['steps_per_s']} steps/s, "
                f"{plain['peak_reserved_gib']} and {capped['peak_reserved_gib']} GiB reserved"
            )
    return said


CASES: dict[str, Callable[[Path, Gpu], dict[str, Any]]] = {
    "neighbour": neighbour,
    "recovery": recovery,
    "image_recovery": image_recovery,
    "packing": packing,
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
