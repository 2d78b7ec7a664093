"""Answers to 500 prompts on a GPU: lanes of recorded passes beside transformers' `generate`, in one session.

    RAY_PEFT_CONFIGS=configs python benchmarks/evaluation.py --out results --seconds 140

RAY_PEFT_CONFIGS names a folder of folders that hold config.json alone; weights are random, of the true shape. Random
weights end no answer, so every row has a limit of its own, which both ways obey: log-normal, 1 to 1,024 tokens (the
study's `max_new_tokens`). Prompts have log-normal lengths of up to 1,024 tokens. First, tiny models of every kind of
attention answer in float32, which must be equal to the token, and score held-out rows, which must be equal to 1e-6.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import write

from ray_peft.engine import gpu_peaks
from ray_peft.engine.replays import Replays
from ray_peft.foundation.units import GIB
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft import evaluate
from ray_peft.tasks.llm_sft.continuous import Answering, Ends, Lanes, Voice
from ray_peft.tasks.llm_sft.decodable import why_not

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""On the CPU nothing is recorded: that only shows that the script runs."""
PAD = 0
PROMPTS, LONGEST, NEW = 500, 1024, 1024
ADAPTED = {"name": "lora", "rank": 16}
ADAPTED_4BIT = {"name": "qlora", "rank": 16}


def spec_of(
    model: str, precision: str, method: dict[str, Any] | None = None, lanes: int = 1, new: int = NEW
) -> TrialSpec:
    """What decides precision, storage and the predicted memory; no rows are read."""
    return TrialSpec.from_plain(
        {
            "task": "llm_sft",
            "model": {"name": model, "random_weights": True},
            "data": {"sources": [{"recipe": "prompt_completion", "path": "rows.jsonl", "train": 1, "test": 1}]},
            "method": method or {"name": "none"},
            "train": {"steps": 1, "precision": precision} if method is None else {"steps": 1},
            "evaluation": {"max_new_tokens": new, "batch_size": lanes},
        }
    )


def drawn(count: int, longest: int, vocabulary: int, mean: float) -> list[list[int]]:
    """Prompts of log-normal lengths; the first two tokens of each are its number."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.empty(count).log_normal_(mean, 0.8, generator=draw).round().clamp(8, longest).int().tolist()
    return [
        [10 + row % 100, 10 + row // 100, *torch.randint(10, vocabulary, (length - 2,), generator=draw).tolist()]
        for row, length in enumerate(lengths)
    ]


def row_of(tokens: Any) -> int:
    """The number of a prompt."""
    return int(tokens[0]) - 10 + 100 * (int(tokens[1]) - 10)


def limits(count: int, most: int) -> list[int]:
    """Tokens after which answers end: a seventh of `most` in the median."""
    draw = torch.Generator().manual_seed(1)
    drawn_limits = torch.empty(count).log_normal_(5.0 + math.log(most / NEW), 0.8, generator=draw)
    return drawn_limits.round().clamp(1, most).int().tolist()


def stock(model: Any, prompts: list[list[int]], ends: Ends, limit: list[int] | None, most: int) -> dict[int, list[int]]:
    """One batch of `generate`, of at most `most` new tokens."""
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    class Limits(StoppingCriteria):  # type: ignore[misc]
        """A row ends at its limit."""

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return own <= input_ids.shape[1] - longest

    longest = max(map(len, prompts))
    own = torch.tensor([limit[row_of(prompt)] if limit else most for prompt in prompts], device=model.device)
    config = GenerationConfig(
        do_sample=False, eos_token_id=list(ends.tokens) or [10**9], pad_token_id=PAD, max_new_tokens=most
    )
    output = model.generate(
        input_ids=evaluate.padded(prompts, PAD, "left").to(model.device),
        attention_mask=evaluate.padded([[1] * len(prompt) for prompt in prompts], 0, "left").to(model.device),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([Limits()]),
    )
    found = {}
    for prompt, tokens in zip(prompts, output[:, longest:].tolist(), strict=True):
        stops = [place + 1 for place, token in enumerate(tokens) if token in ends.tokens]
        end = min([*stops, limit[row_of(prompt)] if limit else most])
        found[row_of(prompt)] = tokens[:end]
    return found


def in_lanes(
    model: Any, prompts: list[list[int]], ends: Ends, limit: list[int] | None, lanes: int, dtype: Any
) -> tuple[dict[int, list[int]], dict[str, Any]]:
    """Ours, and how it passed."""

    def stop(tokens: Any, searched: int) -> int | None:
        assert limit is not None
        row = row_of(tokens)
        end = len(prompts[row]) + limit[row]
        return end if end <= len(tokens) else None

    shapes: Counter[Any] = Counter()
    replays = Replays(records=DEVICE == "cuda")

    class Counted:
        def __call__(self, shape: Any, work: Callable[[], object]) -> None:
            shapes[shape] += 1
            replays(shape, work)

    begin = time.perf_counter()
    held = Lanes([Voice(model)], lanes, max(map(len, prompts)) + ends.new_tokens, ends, dtype)
    answering = Answering(held, PAD, Counted(), static=True, stop=stop if limit else None)  # type: ignore[arg-type]
    found = dict(answering.answers(prompts, range(len(prompts))))
    wait()
    seconds = round(time.perf_counter() - begin, 3)
    timed = {}
    for shape in [shape for shape, count in shapes.items() if shape[0] != "read" and count > 2][:8]:
        begin = time.perf_counter()
        for _ in range(20):
            replays(shape, lambda: None)
        wait()
        timed[str(shape)] = round((time.perf_counter() - begin) / 20 * 1000, 3)
    passes = {str(shape): count for shape, count in sorted(shapes.items(), key=str)}
    return found, {"seconds": seconds, "passes": passes, "unrecorded": replays.unrecorded, "ms_a_replayed_step": timed}


def wait() -> None:
    """Until the GPU has done all work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What it gives, with its seconds and its peak."""
    gc.collect()
    wait()
    if DEVICE == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        gpu_peaks.restart()
    begin = time.perf_counter()
    given = work()
    wait()
    return given, {
        "seconds": round(time.perf_counter() - begin, 3),
        "peak_allocated_gib": round(gpu_peaks.allocated() / GIB, 3),
        "peak_reserved_gib": round(gpu_peaks.reserved() / GIB, 3),
    }


def profiled(model: Any, prompts: list[list[int]], lanes: int) -> dict[str, Any]:
    """Where the GPU's time of adding a token goes, as passes run unrecorded."""
    from torch.profiler import ProfilerActivity, profile

    held = Lanes([Voice(model)], lanes, 2048, Ends(NEW, ()), torch.bfloat16)
    first = torch.tensor([prompt[:8] for prompt in prompts[:lanes]], device=DEVICE)
    held.read(first, torch.full((lanes,), 8, device=DEVICE), torch.arange(lanes, device=DEVICE))
    held.add(lanes, 1024)
    wait()
    begin = time.perf_counter()
    for _ in range(5):
        held.add(lanes, 1024)
    wait()
    eager = (time.perf_counter() - begin) / 5
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as watch:
        held.add(lanes, 1024)
        wait()
    kernels = [event for event in watch.key_averages() if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    return {
        "eager_s_a_step": eager,
        "gpu_ms": sum(event.self_device_time_total for event in kernels) / 1000,
        "kernels": sum(event.count for event in kernels),
        "largest": [[e.key[:90], e.count, round(e.self_device_time_total / 1000, 4)] for e in kernels[:25]],
    }


def equal(ours: dict[int, list[int]], theirs: dict[int, list[int]]) -> dict[str, Any]:
    """How many rows are equal to the token."""
    same = sum(ours[row] == theirs[row] for row in theirs)
    lengths = len({len(tokens) for tokens in theirs.values()})
    return {"rows": len(theirs), "equal": same, "tokens": sum(map(len, theirs.values())), "lengths": lengths}


def recovery() -> dict[str, Any]:
    """Work that waits for the GPU cannot be recorded: it runs as it is, and what comes after it is not harmed."""
    numbers = torch.arange(4.0, device=DEVICE)
    replays, done = Replays(records=DEVICE == "cuda"), []
    for _ in range(4):
        replays("waits", lambda: done.append(float(numbers.sum())))
    drawn_after = torch.rand(3, device=DEVICE)
    others, sums = Replays(records=DEVICE == "cuda"), torch.zeros(4, device=DEVICE)
    for _ in range(4):
        others("adds", lambda: sums.add_(numbers))
    return {
        "unrecorded": replays.unrecorded, "times": len(done), "drawn": drawn_after.tolist(),
        "others_unrecorded": others.unrecorded, "sums": sums.tolist(),
    }  # fmt: skip


def tiny_cases(found: dict[str, Any], save: Callable[[], None], left: Callable[[], float], options: Any) -> None:
    """Answers and losses of tiny models in float32, recorded, beside transformers'."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from attention_kinds import ARCHITECTURES
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    prompts = drawn(24, 90, 250, 3.3)
    ends = Ends(48, list(range(0, 250, 12)))
    rows = Dataset.from_list(
        [{"input_ids": p, "labels": [-100] * (len(p) // 3) + p[len(p) // 3 :]} for p in drawn(80, 200, 250, 4.0)]
    )
    spec = spec_of("tiny", "fp32")
    first = ["gemma3_text", "gemma2", "llama", "gpt2", "qwen2", "gpt_neox"]
    for name in [*first, *(name for name in ARCHITECTURES if name not in first)]:
        settings = ARCHITECTURES[name]
        if left() < options.seconds - 35:  # the larger cases need the rest
            return
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **settings, **{"tie_word_embeddings": False})
        model = AutoModelForCausalLM.from_config(config).float().to(DEVICE).eval()
        add_fused_lm_head(model)
        reason = why_not(Voice(model), prompts, PAD, torch.float32)
        begin = time.perf_counter()
        ours, how = in_lanes(model, prompts, ends, None, 8, torch.float32)
        seconds = time.perf_counter() - begin
        theirs = stock(model, prompts, ends, None, 48)
        packed = evaluate.token_log_probs(spec, model, rows, PAD)  # type: ignore[arg-type]
        plain = TrialSpec.from_plain({**spec.plain(), "train": {**spec.plain()["train"], "cuda_graphs": False}})
        padded = evaluate.token_log_probs(plain, model, rows, PAD)  # type: ignore[arg-type]
        found["tiny_float32"][name] = {
            **equal(ours, theirs), "why_not": reason, "unrecorded": how["unrecorded"], "seconds": round(seconds, 2),
            "loss_padded": -float(padded.mean()), "loss_packed": -float(packed.mean()),
            "largest_difference": float((packed - padded).abs().max()),
        }  # fmt: skip
        save()
    found["recovery"] = recovery()
    save()


class Study:
    """The study's prompts on a model of the true shape."""

    def __init__(self, folder: Path, count: int, new: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(folder)
        with torch.device(DEVICE):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self.model.generation_config.eos_token_id = None
        self.folder, self.new = folder, new
        self.method: dict[str, Any] | None = None
        self.prompts = drawn(count, LONGEST, 10000, 5.3)
        self.limit, self.ends = limits(count, new), Ends(new, ())
        self.tokens = sum(self.limit)

    def adapt(self) -> None:
        """Attach a LoRA adapter of rank 16."""
        from ray_peft.methods.lora import LoRA

        self.model, self.method = LoRA(rank=16).attach(self.model).eval(), ADAPTED

    def quantise(self) -> None:
        """Take the base in 4 bits, with a LoRA adapter of rank 16."""
        from ray_peft.tasks.llm_sft.model import load_model

        del self.model
        spec: Any = spec_of(str(self.folder), "bf16", ADAPTED_4BIT)
        ((stage, _),) = spec.method.stages(1)
        self.model, self.method = stage.attach(load_model(spec, DEVICE)).eval(), ADAPTED_4BIT
        self.model.generation_config.eos_token_id = None

    def predicted(self, lanes: int) -> float | None:
        """The predicted peak [GiB] of answering so many prompts at a time."""
        from ray_peft.tasks.llm_sft.memory import predict
        from ray_peft.vram import ModelShape
        from ray_peft.vram.cards import here

        if DEVICE == "cpu":
            return None
        shape = ModelShape.from_config(self.folder / "config.json")
        spec: Any = spec_of(str(self.folder), "bf16", self.method, lanes, self.new)
        longest = max(map(len, self.prompts))
        return predict(spec, shape, longest_tokens=longest, gpu=here("cuda:0")).gib()["evaluation_gib"]

    def ours(self, lanes: int) -> dict[str, Any]:
        """All prompts in lanes."""
        bare = evaluate.bare(self.model)
        (answers, how), cost = measured(
            lambda: in_lanes(bare, self.prompts, self.ends, self.limit, lanes, torch.bfloat16)
        )
        right = all(len(answers[row]) == self.limit[row] for row in range(len(self.prompts)))
        speed = self.tokens / how["seconds"]
        return {**cost, **how, "method": self.method, "tokens_per_s": speed, "right_lengths": right}

    def profile(self, lanes: int) -> dict[str, Any]:
        """One step."""
        return profiled(evaluate.bare(self.model), self.prompts, lanes)

    def whole(self, size: int) -> dict[str, Any]:
        """All prompts by `generate`, by length, in batches of one size."""
        batches, steps = self._batches(size, by_length=True)
        _, cost = measured(lambda: [stock(self.model, batch, self.ends, self.limit, self.new) for batch in batches])
        return {**cost, "method": self.method, "tokens_per_s": self.tokens / cost["seconds"], "steps": steps}

    def sorted(self, size: int) -> dict[str, Any]:
        """Reckoned from one batch of `generate`, prompts by length."""
        return self._reckoned(size, by_length=True)

    def unsorted(self, size: int) -> dict[str, Any]:
        """The same, prompts as they come."""
        return self._reckoned(size, by_length=False)

    def _batches(self, size: int, *, by_length: bool) -> tuple[list[list[list[int]]], int]:
        """Batches, and the tokens that their longest answers have together."""
        rows = sorted(self.prompts, key=len, reverse=True) if by_length else self.prompts
        batches = [rows[first : first + size] for first in range(0, len(rows), size)]
        return batches, sum(max(self.limit[row_of(prompt)] for prompt in batch) for batch in batches)

    def _reckoned(self, size: int, *, by_length: bool) -> dict[str, Any]:
        """The first 129 tokens of the middle batch; later ones cost more, since they look back on more."""
        batches, steps = self._batches(size, by_length=by_length)
        batch = batches[len(batches) // 2]
        _, one = measured(lambda: stock(self.model, batch, self.ends, None, 1))
        _, cost = measured(lambda: stock(self.model, batch, self.ends, None, 129))
        step = (cost["seconds"] - one["seconds"]) / 128
        seconds = len(batches) * one["seconds"] + (steps - len(batches)) * step
        return {
            **cost, "steps": steps, "s_a_step": step, "s_a_prompt_pass": one["seconds"],
            "reckoned_seconds": seconds, "reckoned_tokens_per_s": self.tokens / seconds,
        }  # fmt: skip


def big_cases(found: dict[str, Any], save: Callable[[], None], left: Callable[[], float], options: Any) -> None:
    """The cells that were asked for, in order; `lora` and `qlora` change the model for those after them."""
    folder = Path(os.environ["RAY_PEFT_CONFIGS"]).absolute() / options.model
    study = Study(folder, options.prompts, options.new)
    cells: dict[str, Any] = {}
    found["big"] = {
        "model": options.model, "prompts": len(study.prompts), "prompt_tokens": sum(map(len, study.prompts)),
        "answer_tokens": study.tokens, "longest_answer": max(study.limit), "cells": cells,
    }  # fmt: skip
    changes: dict[str, Callable[[], None]] = {"lora": study.adapt, "qlora": study.quantise}
    for number, cell in enumerate(options.cells.split(",")):
        name, (way, _, size) = f"{number + 1} {cell}", cell.partition(":")
        if left() < 12:
            cells[name] = {"skipped": "no time was left"}
            save()
            continue
        try:
            if way in changes:  # for this cell and those after it
                changes[way]()
            else:
                with evaluate.inference(spec_of(str(folder), "bf16"), study.model):  # type: ignore[arg-type]
                    cells[name] = getattr(study, way)(int(size))
                if way == "ours":
                    with torch.enable_grad():  # it runs a training step on shapes, too
                        cells[name]["predicted_gib"] = study.predicted(int(size))
        except Exception as error:  # a cell that fails is a row
            cells[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]}
        save()


def main() -> None:
    """Measure all cases, and write them as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600, help="nothing is begun that might not end in time")
    parser.add_argument("--model", default="gemma-3-1b-it")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--new", type=int, default=NEW, help="most tokens of an answer")
    parser.add_argument("--cells", default="sorted:32,unsorted:32,ours:32,whole:500,ours:128,ours:256")
    parser.add_argument("--tiny", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("ray_peft.engine.replays").setLevel(logging.DEBUG)
    begin = time.perf_counter()
    found: dict[str, Any] = {"tiny_float32": {}}

    def left() -> float:
        return float(options.seconds - (time.perf_counter() - begin))

    def save() -> None:
        write(options.out / "evaluation.json", found)

    with torch.no_grad():
        if options.tiny:
            try:
                tiny_cases(found, save, left, options)
            except Exception as error:
                found["tiny_error"] = f"{type(error).__name__}: {error} {traceback.format_exc()[-1500:]}"
                save()
        if options.cells:
            big_cases(found, save, left, options)


if __name__ == "__main__":
    main()
