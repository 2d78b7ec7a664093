"""GaLore on one GPU: refreshes, updates, steps and peaks of the study's setting, beside the stock pipeline.

    RAY_PEFT_CONFIGS=configs python benchmarks/galore.py --out results --parts refresh,stock,free,frugal,peak

RAY_PEFT_CONFIGS names a folder of folders that hold config.json alone; weights are random, of the true shape. Rows are
those of speed.py: log-normal lengths, cut at 2,048 tokens; `peak` has rows of 2,048 tokens each. 16 rows are a step,
and activations are recomputed. `stock` is TRL's SFTTrainer with galore-torch's optimizer on passes of 4 rows, `free`
ours with memory to spare, `frugal` ours as search_spaces/galore_4gib.yaml has it; one of its rows has 2,048 tokens.

    RAY_PEFT_MODEL=smollm2 RAY_PEFT_ALPACA=alpaca.jsonl.gz python benchmarks/galore.py --out results --parts curves

`curves` trains SmolLM2-135M-Instruct with exact and iterated subspaces, and with all that is frugal, on Alpaca: losses
of 500 held-out rows, and their differences with intervals. Without weights in the folder they are random.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gpu_profile
import speed

from ray_peft.foundation.units import GIB
from ray_peft.trial import provenance

STUDY = {"name": "galore", "rank": 128, "update_proj_gap": 200, "scale": 0.25, "weight_decay": 0.01}
FRUGAL = {**STUDY, "moments": "8bit", "gradients": "host"}
TOKENS = 2048


def main() -> None:
    """Measure the parts, and write them as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--stock-steps", type=int, default=None, help="default: as many as the others")
    parser.add_argument("--model", default="gemma-3-1b-it")
    parser.add_argument("--free-rows", type=int, default=16, help="rows of a pass with memory to spare")
    parser.add_argument("--parts", default="refresh,stock,free,frugal,peak")
    parser.add_argument("--curve-steps", type=int, default=600)
    parser.add_argument("--curve-ways", default="exact,randomized,frugal")
    parser.add_argument("--name", default="galore.json")
    options = parser.parse_args()
    folder = Path(os.environ.get("RAY_PEFT_CONFIGS", ".")).absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": provenance.device_name("cuda:0"),
        "versions": provenance.versions(),
        "command": f"galore.py --steps {options.steps} --model {options.model} --parts {options.parts}",
    }
    ways = {
        "refresh": lambda: refresh(folder / options.model),
        "stock": lambda: run(folder, options, STUDY, 4, stock=True),
        "free": lambda: run(folder, options, STUDY, options.free_rows),
        "exact": lambda: run(folder, options, {**STUDY, "svd": "exact"}, options.free_rows),
        "before": lambda: run(folder, options, STUDY, options.free_rows),  # of an older version, on PYTHONPATH
        "frugal": lambda: run(folder, options, FRUGAL, 1),
        "frugal overlapped": lambda: run(folder, options, FRUGAL, 1, overlaps=True),
        "frugal unrecorded": lambda: run(folder, options, FRUGAL, 1, cuda_graphs=False),
        "peak": lambda: run(folder, options, FRUGAL, 1, full=True),
        "curves": lambda: curves(options),
    }
    for part in options.parts.split(","):
        begin = time.perf_counter()
        try:
            found[part] = ways[part]()
        except Exception as error:  # a part that fails is a row
            found[part] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2500:]}
        found[part]["seconds"] = time.perf_counter() - begin
        print(part, json.dumps({key: value for key, value in found[part].items()}), flush=True)
        (options.out / options.name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        gc.collect()
        import torch

        torch.cuda.empty_cache()


def refresh(model: Path) -> dict[str, Any]:
    """Seconds of a refresh of all subspaces, and what they hold beside exact ones; seconds of an update."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ray_peft.methods import subspace
    from ray_peft.methods.galore import GaLore

    torch.manual_seed(0)
    with torch.device("cuda"):
        built: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    stage = GaLore(**{key: value for key, value in STUDY.items() if key != "name"})  # type: ignore[arg-type]
    built = stage.attach(built)
    optimizer: Any = stage.optimizer(built)

    def draw(seed: int) -> None:
        built.zero_grad()
        ids = torch.randint(0, 1000, (4, 256), generator=torch.Generator().manual_seed(seed)).cuda()
        built(input_ids=ids, labels=ids).loss.backward()

    draw(0)
    group = optimizer.param_groups[0]
    weights = group["params"]
    rank = group["rank"]

    def timed(work: Any) -> tuple[float, Any]:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        made = work()
        torch.cuda.synchronize()
        return time.perf_counter() - begin, made

    def iterate() -> dict[int, Any]:
        for weight in weights:
            optimizer.state[weight].setdefault("step", 1)
        return subspace.iterated(weights, optimizer._gradient, optimizer._start, rank)  # noqa: SLF001

    with torch.no_grad():
        timed(iterate)  # the libraries' first calls
        cold, bases = timed(iterate)
        exact_s, exact = timed(
            lambda: [subspace.exact(w.grad, rank, subspace.side_of(w.shape, "std"))[0] for w in weights]
        )
        held = [_held(w.grad, bases[place], exact[place]) for place, w in enumerate(weights)]
        result: dict[str, Any] = {
            "matrices": len(weights),
            "exact_s": exact_s,
            "iterated_s": cold,
            "energy_against_exact": {"mean": statistics.mean(held), "least": min(held)},
            "rounds": {},
        }
        for rounds in (2, 4, 16):
            subspace.ROUNDS, usual = rounds, subspace.ROUNDS
            seconds, other = timed(iterate)
            subspace.ROUNDS = usual
            shares = [_held(w.grad, other[place], exact[place]) for place, w in enumerate(weights)]
            result["rounds"][rounds] = {"s": seconds, "mean": statistics.mean(shares), "least": min(shares)}
        large = [w.grad.float() for w in weights if min(w.shape) == 1152][:12]
        grams = torch.stack([w.mT @ w if w.shape[0] > w.shape[1] else w @ w.mT for w in large])
        if len(grams):
            timed(lambda: torch.linalg.eigh(grams[:2].float()))
            seconds, _ = timed(lambda: torch.linalg.eigh(grams.float()))
            result["eigh_of_gram_s_a_matrix"] = seconds / len(grams)
        result |= _updates(optimizer, draw, timed)
        torch.cuda.reset_peak_memory_stats()
        held_before = torch.cuda.memory_allocated()
        iterate()
        result["refresh_extra_gib"] = (torch.cuda.max_memory_allocated() - held_before) / GIB
    return result


def _held(grad: Any, basis: Any, exact: Any) -> float:
    from ray_peft.methods import subspace

    side = subspace.side_of(grad.shape, "std")
    ours, most = (float(subspace.projected(grad.float(), [one.float()], side).norm() ** 2) for one in (basis, exact))
    return ours / most


def _updates(optimizer: Any, draw: Any, timed: Any) -> dict[str, float]:
    """Seconds of the update between refreshes, on the GPU, and until the host is free again."""
    import torch

    with torch.enable_grad():
        draw(1)
    optimizer.step()  # refreshes, and makes the state
    whole, hosts = [], []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        optimizer.step()
        hosts.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(400_000_000)  # the host runs ahead, so that the GPU never waits for it
    start.record()
    optimizer.step()
    end.record()
    torch.cuda.synchronize()
    return {"update_s": min(whole), "update_host_s": min(hosts), "update_gpu_s": start.elapsed_time(end) / 1000}


@dataclass
class StockStage:
    """What `speed._stock` asks of a stage, with the optimizer of galore-torch as transformers calls it."""

    stage: Any
    lr: float

    def optimizer(self, model: Any) -> Any:
        """galore-torch's, in the dtype of the weights."""
        from galore_torch import GaLoreAdamW

        projected = self.stage.target_weights(model)
        ids = {id(weight) for weight in projected}
        subspace = {name: getattr(self.stage, name) for name in ("rank", "update_proj_gap", "scale", "proj_type")}
        rest = [weight for weight in model.parameters() if id(weight) not in ids]
        return GaLoreAdamW(
            [{"params": projected, **subspace}, {"params": rest}], lr=self.lr, no_deprecation_warning=True
        )


@contextlib.contextmanager
def _refreshes_timed() -> Iterator[list[float]]:
    """The seconds of each SVD that galore-torch's projectors do inside."""
    import torch
    from galore_torch.galore_projector import GaLoreProjector

    seconds: list[float] = []
    usual = GaLoreProjector.get_orthogonal_matrix

    def timed(*arguments: Any, **named: Any) -> Any:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        basis = usual(*arguments, **named)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        return basis

    GaLoreProjector.get_orthogonal_matrix = timed
    try:
        yield seconds
    finally:
        GaLoreProjector.get_orthogonal_matrix = usual


def run(
    folder: Path, options: Any, method: dict[str, Any], rows_a_pass: int, *, stock: bool = False, full: bool = False,
    cuda_graphs: bool = True, overlaps: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train the setting one way; speed without the first third, memory of all, predicted beside measured."""
    import torch
    from datasets import Dataset
    from transformers import set_seed

    from ray_peft.engine import gpu_peaks
    from ray_peft.engine.member import Job
    from ray_peft.methods.host_gradients import HostGaLoreAdamW
    from ray_peft.tasks.llm_sft import train
    from ray_peft.tasks.llm_sft.memory import predict
    from ray_peft.tasks.llm_sft.model import load_model
    from ray_peft.vram import ModelShape
    from ray_peft.vram.cards import known

    HostGaLoreAdamW.overlaps = overlaps
    steps = 4 if full else options.stock_steps if stock and options.stock_steps else options.steps
    left = speed.released()
    case = speed.Case(options.model, method, 16, rows_a_pass, TOKENS, checkpointing=True)
    spec = speed.spec_of(case, folder, steps, cuda_graphs=cuda_graphs, log_every=max(1, steps // 3))
    set_seed(0)
    model: Any = load_model(spec, "cuda:0")
    ((stage, _),) = spec.method.stages(steps)
    model = stage.attach(model)
    rows = speed.rows_of(case, steps)
    longest_row = torch.randint(10, 1000, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = Dataset.from_list([{"input_ids": longest_row, "labels": longest_row}, *list(rows)[1:]])
    if full:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, 1000, (16 * steps, TOKENS), generator=generator).tolist()
        rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    stamps: list[tuple[int, float]] = []
    losses: list[float] = []

    profiles = not (stock or full)
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    every = spec.train.log_every
    profiled = every * (steps // every - 1)  # both ends are logged

    def report(metrics: Any, step: int) -> None:
        torch.cuda.synchronize()
        stamps.append((step, time.perf_counter()))
        losses.append(float(metrics["train_loss"]))
        if profiles and step == profiled:
            profile.start()
        elif profiles and step == profiled + every:
            profile.stop()

    gpu_peaks.restart()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        job = Job(
            spec, StockStage(stage, stage.lr) if stock else stage, steps, 0, Path(work), "cuda:0", report, lambda: 0.0
        )  # type: ignore[arg-type]
        if stock:
            with _refreshes_timed() as refreshes:
                passes = speed._stock(spec, job, rows, model, case, Path(work), report)  # noqa: SLF001
        else:
            passes = train.train_stage(spec, job, rows, model, speed.Pad(), rehearse=False).passes  # type: ignore[arg-type]
    settled, start = next(stamp for stamp in stamps if stamp[0] >= max(2, steps // 3))
    last, end = next(stamp for stamp in stamps if stamp[0] == profiled) if profiles else stamps[-1]
    tokens = speed._tokens(spec, rows)  # noqa: SLF001
    result = {
        "passes": passes,
        "rows_a_pass": rows_a_pass,
        "s_per_step": (end - start) / (last - settled),
        "tokens_per_s": sum(tokens[settled:last]) / (end - start),
        "first_step_s": stamps[0][1] - begin,
        "peak_allocated_gib": gpu_peaks.allocated() / GIB,
        "peak_reserved_gib": gpu_peaks.reserved() / GIB,
        "allocated_before_gib": left,
        "losses": [losses[0], losses[len(losses) // 2], losses[-1]],
    }
    if profiles:
        result["gpu"] = gpu_profile.summary(profile, every)
    if stock:
        result |= {"refreshed_matrices": len(refreshes), "refresh_s": sum(refreshes)}
    else:
        shape = ModelShape.from_config(folder / options.model / "config.json")
        longest = max(map(len, rows["input_ids"]))
        given = {"longest_tokens": longest, "gpu": known(torch.cuda.get_device_name())}
        result["predicted"] = predict(spec, shape, **given).gib()  # type: ignore[arg-type]
    del model
    return result


CURVES = {"exact": {"svd": "exact"}, "randomized": {}, "frugal": {"moments": "8bit", "gradients": "host"}}


def curves(options: Any) -> dict[str, Any]:
    """Losses of 500 held-out rows while and after training in several ways, and each way's less those of the first."""
    import torch
    from transformers import set_seed

    from ray_peft.metrics.intervals import mean_difference
    from ray_peft.spec import TrialSpec
    from ray_peft.tasks.llm_sft.task import LlmSft

    model, steps = Path(os.environ["RAY_PEFT_MODEL"]), options.curve_steps
    random = not list(model.glob("*.safetensors"))
    found: dict[str, Any] = {"weights": "random" if random else "SmolLM2-135M-Instruct", "steps": steps}
    by_row: dict[str, list[float]] = {}
    for way in options.curve_ways.split(","):
        spec: Any = TrialSpec.from_plain(
            {
                "task": "llm_sft",
                "model": {"name": str(model), "random_weights": random},
                "data": {
                    "sources": [
                        {"recipe": "alpaca", "path": os.environ["RAY_PEFT_ALPACA"], "train": 5000, "test": 500}
                    ],
                    "contamination": {"action": "allow"},
                },
                "method": {**STUDY, "weight_decay": 0.0, "update_proj_gap": steps // 3, **CURVES[way]},
                "train": {
                    "steps": steps, "batch_size": 16, "micro_batch_size": 16, "warmup_ratio": 0.03, "log_every": 10,
                    "eval_every": steps // 3,
                },
                "evaluation": {"generate": False},
            }
        )  # fmt: skip
        set_seed(0)
        begin, losses, held_out = time.perf_counter(), [], []
        bench: Any = LlmSft().load(spec, "cuda:0")
        ((stage, count),) = spec.method.stages(steps)
        bench.attach(stage)
        loaded = time.perf_counter()

        def report(metrics: Any, step: int, losses: Any = losses, held_out: Any = held_out) -> None:
            if "train_loss" in metrics:
                losses.append(round(float(metrics["train_loss"]), 5))
            if "eval_loss" in metrics:
                held_out.append(round(float(metrics["eval_loss"]), 5))

        with tempfile.TemporaryDirectory() as work:
            trained = bench.train(stage, count, 0, Path(work), report)
        by_row[way] = _by_row(bench)
        found[f"losses_by_row_{way}"] = [round(loss, 5) for loss in by_row[way]]  # to compare runs of one way each
        held_out.append(bench.eval_loss())
        found[way] = {
            "train_loss": losses, "eval_loss": held_out, "passes": trained.passes, "train_s": trained.seconds,
            "loading_s": loaded - begin,
        }  # fmt: skip
        first = next(iter(by_row))
        if way != first:
            change = mean_difference(by_row[way], by_row[first])
            found[way][f"less_{first}"] = [change.difference, change.low, change.high]
        print(way, json.dumps(found[way]), flush=True)
        (options.out / f"curves_{options.name}").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        del bench
        gc.collect()
        torch.cuda.empty_cache()
    return found


def _by_row(bench: Any) -> list[float]:
    """The mean negative log-likelihood of each held-out row's answer [nats]."""
    values = -bench.answer_log_probs()
    rows = list(zip(bench.data.test["input_ids"], bench.data.test["labels"], strict=True))
    rows.sort(key=lambda row: len(row[0]), reverse=True)  # the order of the values
    counts = [sum(label != -100 for label in labels[1:]) for _, labels in rows]
    assert sum(counts) == len(values)
    return [float(part.mean()) for part in values.split(counts) if len(part)]


if __name__ == "__main__":
    main()
