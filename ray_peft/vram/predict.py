"""A trial's predicted peak: its stages, what they need besides, and a cache on disk."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ray_peft.gpus import ANY, Gpu
from ray_peft.measure import GIB
from ray_peft.methods.base import ENOUGH_STEPS, Method, Stage
from ray_peft.methods.galore import GaLore
from ray_peft.methods.lora import LowRankAdapter
from ray_peft.methods.qlora_galore import QLoRAThenGaLore
from ray_peft.report.atomic import write_text
from ray_peft.spec import ImageTrialSpec, LlmTrialSpec, TrialSpec
from ray_peft.tasks.cache import cache_folder
from ray_peft.vram.shape import ModelShape

RUN_ON_SHAPES = (
    "tasks/llm_sft/evaluate.py", "tasks/llm_sft/targets.py", "tasks/text_to_image/passes.py",
    "tasks/text_to_image/style.py",
)  # fmt: skip
"""Code of tasks that predictions run or read; predictions kept on disk are of this code."""

SEGMENT = 2 * 2**20
"""The allocator's segments are multiples of this."""

CONVOLUTIONS = 60 * 2**20
"""What cuDNN takes beside the tensors while images are made: the rest of three measured peaks of SD 1.5 on an H200."""

_NO_MEMORY: dict[type[Any], frozenset[str]] = {
    Stage: frozenset({"lr", "weight_decay", "betas", "max_grad_norm"}),
    LowRankAdapter: frozenset({"alpha"}),
    GaLore: frozenset({"eps", "scale", "update_proj_gap"}),
    QLoRAThenGaLore: frozenset({"switch_at"}),
}
"""Settings that change numbers, but not how many there are, by the class that has them: another method's setting of
the same name may decide memory."""


@dataclass(frozen=True)
class Prediction:
    """Bytes on one GPU."""

    components: dict[str, int]
    """By kind, at the peak; they add up to `peak_allocated`."""
    peak_allocated: int
    """Peak of tensors in training, as `torch.cuda.max_memory_allocated` counts; without training, the weights."""
    peak_reserved: int
    """Peak of the allocator's segments in training."""
    evaluation: int | None
    """Peak of tensors outside of training, at most: while held-out rows are scored and answered, or images encoded,
    scored and made; None where nothing can say."""

    @property
    def needed(self) -> int:
        """What the trial must find, in training or after, beside the CUDA context."""
        return max(self.peak_reserved, self.evaluation or 0)

    def gib(self) -> dict[str, float]:
        """All of it in GiB, flat, as it is stored beside what is measured."""
        found = {"peak_allocated_gib": self.peak_allocated, "peak_reserved_gib": self.peak_reserved}
        found |= {"evaluation_gib": self.evaluation} if self.evaluation is not None else {}
        found |= {f"{kind}_gib": size for kind, size in self.components.items()}
        return {name: round(size / GIB, 4) for name, size in found.items()}


def predict(
    spec: TrialSpec,
    shape: ModelShape,
    *,
    longest_tokens: int,
    longest_scored: int | None = None,
    padded: bool | None = None,
    gpu: Gpu = ANY,
    others: Mapping[str, ModelShape] | None = None,
) -> Prediction:
    """The peak of a trial: of its largest stage; of an ensemble, that of its members asked together.

    Args:
        spec: the trial.
        shape: its model's.
        longest_tokens: of a training row, at most `data.max_length`.
        longest_scored: of a row or prompt outside of training; None takes that of training.
        padded: rows of a pass differ in length; None assumes it where a pass holds several.
        gpu: decides the workspace of matrix products and the slack of the allocator.
        others: the shapes of `vae` and `text_encoder` beside a UNet; None predicts nothing of what they take.

    Raises:
        NotImplementedError: the task has no prediction.
        ValueError: the config is of no known architecture.
    """
    if isinstance(spec, ImageTrialSpec):
        return _image(spec, shape, gpu, others or {})
    if not isinstance(spec, LlmTrialSpec):
        raise NotImplementedError(f"task {spec.task} has no memory prediction")
    outside = longest_scored or longest_tokens
    members = [
        predict(m, shape, longest_tokens=longest_tokens, longest_scored=outside, padded=padded, gpu=gpu)
        for m in spec.members()
    ]
    if members:
        together = sum(member.evaluation or 0 for member in members)
        return Prediction({"evaluation": together}, together, _segments(together, gpu.slack), together)
    uneven = spec.train.micro_batch_size > 1 if padded is None else padded
    stages = [stage for stage, _ in spec.method.stages(ENOUGH_STEPS)]
    held_for: list[Stage | None] = [*stages] or [None]
    scored = [_evaluation(spec, stage, shape, outside) for stage in held_for]
    evaluation = max(found["model"] + max(found["scoring"], found["answering"]) for found in scored) + gpu.workspace
    if not stages:
        held = scored[0]["model"]
        return Prediction({"weights": held}, held, _segments(held, 0.0), evaluation)
    steps = [_step(spec, stage, shape, longest_tokens, uneven) for stage in stages]
    if spec.train.eval_every:
        steps += [_evaluating(step, found) for step, found in zip(steps, scored, strict=True)]
    components = max(steps, key=lambda step: sum(step.values())) + Counter(workspace=gpu.workspace)
    if spec.resources.num_workers > 1:  # DistributedDataParallel holds the gradients twice
        components["buckets"] = components["adapters"] or components["weights"]
    peak = sum(components.values())
    slack = gpu.slack + (gpu.slack_uneven if uneven else 0.0)
    components = Counter({kind: size for kind, size in components.items() if size})
    return Prediction(dict(components), peak, _segments(peak, slack), evaluation)


def _segments(size: int, slack: float) -> int:
    """Bytes of the allocator's segments that hold `size` bytes of tensors, and a share of them besides."""
    return -(-int(size * (1 + slack)) // SEGMENT) * SEGMENT


def _image(spec: ImageTrialSpec, shape: ModelShape, gpu: Gpu, others: Mapping[str, ModelShape]) -> Prediction:
    """Of a UNet's training, and of all that is scored and made around it."""
    train, found = spec.train, Counter[str]()
    stages = [stage for stage, _ in spec.method.stages(ENOUGH_STEPS)]
    held_for: list[Stage | None] = [*stages] or [None]
    scored = [_painting(spec, stage, shape, others) for stage in held_for]
    last = scored[-1]
    painting = last["painting"] + CONVOLUTIONS if last["painting"] else 0
    evaluation = max(last["model"] + max(last["scoring"], painting), last["encoding"]) + gpu.workspace
    for stage, beside in zip(stages, scored, strict=False):
        settings = [train.micro_batch_size, train.gradient_checkpointing, train.precision]
        common = _common(spec, stage, shape, spec.data.resolution)

        def compute(stage: Stage = stage) -> Counter[str]:
            from ray_peft.vram import unet

            return unet.components(spec, stage, shape)

        step = _kept([*common, "unet", train.ema_decay is not None, *settings], compute)
        steps = [found, step]
        if train.eval_every:
            between = _evaluating(step, beside) + Counter(average=step["average"])
            between["gradients"] = step["adapters"] or step["weights"]  # they stay: a recorded pass adds to the same
            steps.append(between)
        found = max(steps, key=lambda kinds: sum(kinds.values()))
    if found:
        found["workspace"] = gpu.workspace
        if spec.resources.num_workers > 1:  # gradients are summed over the workers in a copy of all
            found["buckets"] = found["adapters"] or found["weights"]
    else:
        from ray_peft.vram import unet

        found = unet.weights(spec, shape)
    peak = sum(found.values())
    return Prediction(
        {kind: size for kind, size in found.items() if size}, peak, _segments(peak, gpu.slack), evaluation
    )


def _painting(
    spec: ImageTrialSpec, stage: Stage | None, shape: ModelShape, others: Mapping[str, ModelShape]
) -> Counter[str]:
    """The UNet, what scoring and making images takes beside it, and what encoding images takes before it is there."""
    asked = spec.evaluation
    images = len(asked.prompts) * len(asked.seeds)
    settings = [asked.batch_size, images, asked.guidance_scale > 1, asked.style, spec.train.precision]
    shapes = [others[part].config for part in sorted(others)]

    def compute() -> Counter[str]:
        from ray_peft.vram import unet

        return unet.evaluation(spec, stage, shape, others)

    return _kept([*_common(spec, stage, shape, spec.data.resolution), "painting", *settings, *shapes], compute)


def _evaluating(step: Counter[str], found: Counter[str]) -> Counter[str]:
    """Components while the held-out loss is measured between two steps: the optimizer keeps its state."""
    held = ("weights", "quantization", "adapters", "optimizer", "projectors")
    return Counter({kind: step[kind] for kind in held}) + Counter(buffers=found["scoring"])


def _step(spec: LlmTrialSpec, stage: Stage, shape: ModelShape, longest: int, padded: bool) -> Counter[str]:
    """Components at the peak of a step of one stage."""
    train = spec.train
    settings = [train.micro_batch_size, spec.accumulation > 1, train.gradient_checkpointing, train.precision, padded]

    def compute() -> Counter[str]:
        from ray_peft.vram import llm

        return llm.components(spec, stage, shape, longest_tokens=longest, padded=padded)

    return _kept([*_common(spec, stage, shape, longest), *settings], compute)


def _evaluation(spec: LlmTrialSpec, stage: Stage | None, shape: ModelShape, longest: int) -> Counter[str]:
    """The model, and what scoring and answering take beside it."""
    asked = spec.evaluation
    settings = [asked.generate, asked.batch_size, asked.max_new_tokens, spec.train.precision]

    def compute() -> Counter[str]:
        from ray_peft.vram import llm

        return llm.evaluation(spec, stage, shape, longest)

    return _kept([*_common(spec, stage, shape, longest), "evaluation", *settings], compute)


def _common(spec: TrialSpec, stage: Stage | None, shape: ModelShape, longest: int) -> list[object]:
    model = spec.model.plain()
    return [
        shape.config,
        decides_memory(stage or spec.method),
        [model[key] for key in ("dtype", "quantization", "attention")],
        longest,
    ]


def decides_memory(method: Method) -> dict[str, object]:
    """The settings of a method without those that only change numbers."""
    struck = frozenset().union(*(names for kind, names in _NO_MEMORY.items() if isinstance(method, kind)))
    return {key: value for key, value in method.plain().items() if key not in struck}


_lock = threading.RLock()
_known: dict[str, Counter[str]] = {}


def _kept(decides: list[object], compute: Callable[[], Counter[str]]) -> Counter[str]:
    """What `compute` finds, from memory or disk if it was found before."""
    key = hashlib.sha256(json.dumps([*decides, _code()], sort_keys=True).encode()).hexdigest()[:24]
    file = cache_folder() / "predicted" / f"{key}.json"
    with _lock:
        if key not in _known:
            if file.is_file():
                _known[key] = Counter(json.loads(file.read_text(encoding="utf-8")))
            else:
                _known[key] = compute()
                with contextlib.suppress(OSError):  # a cache that others keep may be read-only, or full
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_text(file, json.dumps(_known[key]))
        return _known[key].copy()


@cache
def _code() -> str:
    """A digest of all that computes a prediction: this package, the methods, the libraries."""
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    parts = [file for part in ("vram", "methods", "reach") for file in sorted((package / part).glob("*.py"))]
    for file in parts:
        digest.update(file.read_bytes())
    for name in RUN_ON_SHAPES:
        digest.update((package / name).read_bytes())
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "galore-torch", "diffusers"):
        digest.update(importlib.metadata.version(name).encode())
    return digest.hexdigest()
