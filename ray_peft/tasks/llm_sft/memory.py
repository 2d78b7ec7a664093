"""The predicted peak memory of a causal language model: built, adapted, trained and scored on shapes alone."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ray_peft.engine.row_dropout import CODE as DROPOUT
from ray_peft.methods.adapter import Adapter
from ray_peft.methods.base import ENOUGH_STEPS, Stage
from ray_peft.spec import LlmTrialSpec
from ray_peft.spec.preference import PAIRED_OBJECTIVES
from ray_peft.vram.cards import ANY, Gpu
from ray_peft.vram.parts import ANSWERING, ATTACH, SCORING, STEP, during
from ray_peft.vram.predict import GATHERED, Prediction, cached, common, evaluating, recorded_segments, segments
from ray_peft.vram.shape import ModelShape
from ray_peft.vram.spread import evaluated, spread, units

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from ray_peft.vram.tape import Tape

_LIKE_SDPA = ("flex_attention", "flash_attention_2")
"""Attention that keeps the same tensors for the backward pass as torch's fused kernels: no scores."""

FIXED_TOKENS = 150
"""Fixed time of a recorded pass, in tokens that take as long (Gemma-3-1B on an H100: 50; a base in 4 bits, which every
pass dequantises, adds 150)."""

HOST_GRADIENTS_SLACK = 0.2
"""Share of the peak that the allocator reserves in addition if gradients are on the host and passes are not recorded
(measured with recorded ones, before their pools were predicted: 1.15 to 1.28 times the peak of the tensors in all)."""

_FILES = (
    "memory.py", "evaluate.py", "targets.py", "head.py", "continuous.py", "decodable.py", "grown.py", "lane_cache.py",
    "lanes.py", "masks.py",
)  # fmt: skip
CODE = (*(Path(__file__).with_name(name) for name in _FILES), *DROPOUT)
"""The files of this task that predictions run or read; a cached prediction is valid for the same code only."""


def predict(
    spec: LlmTrialSpec,
    shape: ModelShape,
    *,
    longest_tokens: int,
    longest_scored: int | None = None,
    padded: bool | None = None,
    gpu: Gpu = ANY,
) -> Prediction:
    """The peak memory of a trial's largest stage, or of an ensemble whose members answer together.

    Args:
        spec: the trial.
        shape: the shape of its model.
        longest_tokens: tokens of the longest training row, at most `data.max_length`; where passes of pairs are
            recorded, of both sides of the longest pair.
        longest_scored: tokens of the longest held-out row or prompt; None for `longest_tokens`.
        padded: whether the rows of a pass differ in length; None assumes so if a pass holds several.
        gpu: decides the workspace of matrix products and the slack of the allocator.

    Raises:
        ValueError: the config is of no known architecture.
    """
    outside = longest_scored or longest_tokens
    members = [
        predict(m, shape, longest_tokens=longest_tokens, longest_scored=outside, padded=padded, gpu=gpu)
        for m in spec.members()
    ]
    if members:
        together = sum(member.evaluation or 0 for member in members)
        return Prediction({"evaluation": together}, together, segments(together, gpu.slack), together)
    several = spec.train.micro_batch_size > 1 or spec.train.objective in PAIRED_OBJECTIVES
    uneven = several if padded is None else padded
    stages = [stage for stage, _ in spec.method.stages(ENOUGH_STEPS)]
    evaluated_stages: list[Stage | None] = [*stages] or [None]
    scored = [_evaluation(spec, stage, shape, outside) for stage in evaluated_stages]
    models = [part["model"] + part[GATHERED] for part in scored]
    beside = [max(part["scoring"], part["answering"]) for part in scored]
    evaluation = max(map(sum, zip(models, beside, strict=True))) + gpu.workspace
    if not stages:
        weights = models[0]
        return Prediction({"weights": weights}, weights, segments(weights, 0.0), evaluation)
    steps = [_step(spec, stage, shape, longest_tokens, uneven) for stage in stages]
    recorded = all(keeps_gradients(spec, stage) for stage in stages)
    uneven_slack = gpu.slack_uneven if uneven else 0.0
    buckets = 0
    if spec.resources.num_workers > 1:  # gradients are summed over the workers in a copy of all
        buckets = max(step["adapters"] or (0 if spec.sharded else step["weights"]) for step in steps)
    in_pools = 0
    for step, part in zip(steps, scored, strict=True):
        scoring = part["scoring"] if spec.train.eval_every else 0
        in_pools = max(in_pools, recorded_segments(step, scoring, gpu.workspace + buckets, uneven_slack))
    if spec.train.eval_every:
        steps += [evaluating(step, part) for step, part in zip(steps, scored, strict=True)]
    largest = max(steps, key=lambda step: sum(step.values())) + Counter(workspace=gpu.workspace, buckets=buckets)
    peak = sum(largest.values())
    slack = gpu.slack + uneven_slack
    if any(getattr(stage, "gradients", "device") == "host" for stage in stages):
        slack += HOST_GRADIENTS_SLACK
    return Prediction(
        {kind: size for kind, size in largest.items() if size},
        peak,
        in_pools if recorded else segments(peak, slack),
        evaluation,
        FIXED_TOKENS / longest_tokens if recorded else None,
    )


def _step(spec: LlmTrialSpec, stage: Stage, shape: ModelShape, longest: int, padded: bool) -> Counter[str]:
    """Components at the peak of a step of one stage."""
    train = spec.train
    settings: list[Any] = [train.micro_batch_size, spec.accumulation > 1, train.gradient_checkpointing]
    settings += [train.precision, padded, *(["trl"] if train.engine == "trl" else [])]
    settings += ["pairs"] if train.objective in PAIRED_OBJECTIVES else []
    settings += ["sharded"] if spec.sharded else []

    def compute() -> Counter[str]:
        return components(spec, stage, shape, longest_tokens=longest, padded=padded)

    step = cached([*common(spec, stage, shape, longest), *settings], CODE, compute)
    if not spec.sharded:
        return step
    workers = spec.resources.num_workers
    return spread(step, _units(spec, stage, shape), workers, trains_base=stage.needs_full_weights)


def _units(spec: LlmTrialSpec, stage: Stage | None, shape: ModelShape) -> Counter[str]:
    """Bytes of the weights that a worker of a sharded model gathers at once."""
    from ray_peft.vram.stand_ins import on_meta

    def compute() -> Counter[str]:
        with on_meta(autocast=False):
            return units(_built(spec, stage, shape))

    return cached([*common(spec, stage, shape, 0), "units"], CODE, compute)


def _evaluation(spec: LlmTrialSpec, stage: Stage | None, shape: ModelShape, longest: int) -> Counter[str]:
    """Bytes of the model, and the bytes that scoring and answering add."""
    answers = spec.evaluation
    settings = [answers.generate, answers.batch_size, answers.max_new_tokens, spec.train.precision]

    def compute() -> Counter[str]:
        return evaluation(spec, stage, shape, longest)

    scored = cached([*common(spec, stage, shape, longest), "evaluation", *settings], CODE, compute)
    return evaluated(scored, _units(spec, stage, shape), spec.resources.num_workers) if spec.sharded else scored


def components(
    spec: LlmTrialSpec, stage: Stage, shape: ModelShape, *, longest_tokens: int, padded: bool
) -> Counter[str]:
    """Bytes by kind at the peak of a step of `stage` with rows of `longest_tokens`."""
    import torch

    from ray_peft.engine.row_dropout import RowDropout, may_drop
    from ray_peft.methods.adapter_inputs import as_they_are
    from ray_peft.tasks.llm_sft.head import adds_in_place, head_settings, log_probs
    from ray_peft.vram.stand_ins import on_meta, recomputing
    from ray_peft.vram.step import Conditions
    from ray_peft.vram.step import components as of_step

    autocast = spec.train.precision == "bf16"
    with on_meta(autocast=autocast):
        model = _built(spec, stage, shape)
        with during(ATTACH):
            model = cast("PreTrainedModel", stage.attach(model))
        model.train()
        by_rows = spec.train.engine == "own" and may_drop(model)
        dropout = RowDropout(model, predicts=True) if by_rows else None
        if spec.train.gradient_checkpointing:
            contexts = recomputing(torch.bfloat16 if autocast else None, None if dropout is None else dropout.contexts)
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})  # type: ignore[no-untyped-call]
            if not stage.needs_full_weights:
                model.enable_input_require_grads()  # type: ignore[no-untyped-call]
        rows, recorded = spec.train.micro_batch_size, keeps_gradients(spec, stage)
        if spec.train.objective in PAIRED_OBJECTIVES and not recorded:
            rows *= 2  # else both sides of a pair lie in one lane, and `longest_tokens` is the length of both
        ids = torch.ones(rows, longest_tokens, dtype=torch.long, device="meta")

        in_place, head = adds_in_place(model), head_settings(model.config.get_text_config())

        def loss() -> Tensor:
            if dropout is not None:
                dropout.begin(torch.empty_like(ids))
            if in_place:
                hidden = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
                layer: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
                return log_probs(layer, hidden.flatten(0, 1), ids.flatten(), *head).sum()
            output: Any = model(
                input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False, fused_lm_head=True
            )
            total: Tensor = output.log_probs.sum()
            return total

        inputs = as_they_are(model) if spec.train.engine == "own" else contextlib.nullcontext()
        conditions = Conditions(
            autocast=autocast,
            accumulates=spec.accumulation > 1 or recorded or spec.sharded,
            padded=padded or recorded,
            shares_masks=recorded and autocast,
        )
        with during(STEP), contextlib.nullcontext() if dropout is None else dropout.installed(), inputs:
            return of_step(model, stage, loss, conditions)


def keeps_gradients(spec: LlmTrialSpec, stage: Stage) -> bool:
    """Whether gradients stay in memory between steps, as for recorded passes, which add to the same tensors."""
    in_eight_bits = spec.quantization is not None and spec.quantization.bits == 8  # LLM.int8() waits for the GPU
    waits = isinstance(stage, Adapter) and (stage.trains_prompts or bool(spec.model.new_tokens))
    unrecorded = in_eight_bits or waits or stage.why_not_recorded() is not None
    return spec.train.cuda_graphs and not unrecorded and not spec.sharded


def _built(spec: LlmTrialSpec, stage: Stage | None, shape: ModelShape) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from ray_peft.tasks.llm_sft.grown import mark_on_shapes
    from ray_peft.tasks.llm_sft.targets import quantised_layers
    from ray_peft.vram.quantised_layers import quantize

    method = stage or spec.method
    attention = spec.model.attention
    settings = {"attn_implementation": "sdpa" if attention in _LIKE_SDPA else attention} if attention else {}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            _config(shape), dtype=getattr(torch, method.weights_dtype(spec.model.dtype)), **settings
        )
    quantization = method.quantization() or (None if method.needs_full_weights else spec.model.quantization)
    if quantization is not None:
        quantize(model, quantization, quantised_layers(model))
    mark_on_shapes(model, spec.model)
    add_fused_lm_head(model)
    model.requires_grad_(False)
    return model


def _config(shape: ModelShape) -> PretrainedConfig:
    from transformers import AutoConfig

    plain = shape.plain()
    config: PretrainedConfig = AutoConfig.for_model(**plain)
    return config


def evaluation(spec: LlmTrialSpec, stage: Stage | None, shape: ModelShape, longest_tokens: int) -> Counter[str]:
    """Bytes of the model, and the bytes that measuring the held-out loss and answering prompts add."""
    import torch

    from ray_peft.tasks.llm_sft.decodable import by_config, has_virtual_tokens
    from ray_peft.tasks.llm_sft.evaluate import LOSS_TOKENS, bare
    from ray_peft.vram.stand_ins import Autocast, on_meta
    from ray_peft.vram.step import own_model
    from ray_peft.vram.tape import Tape

    autocast = spec.train.precision == "bf16"
    sizes: Counter[str] = Counter()
    with on_meta(autocast=autocast):
        model = _built(spec, stage, shape)
        if stage is not None and not stage.needs_full_weights:
            with during(ATTACH):
                model = cast("PreTrainedModel", stage.attach(model))
        model.eval()  # type: ignore[no-untyped-call]

        def added(part: str, work: Callable[[Tape], None]) -> int:
            """Bytes that the peak of `work` adds to the model."""
            tape = Tape(truth=False)
            own_model(tape, model)
            sizes["model"] = tape.now
            with during(part), torch.no_grad(), Autocast(torch.bfloat16 if autocast else None), tape:
                work(tape)
            return tape.peak - sizes["model"]

        sizes["scoring"] = added(
            SCORING, lambda _: _score(model, max(1, LOSS_TOKENS // longest_tokens), longest_tokens)
        )
        if spec.evaluation.generate and by_config(bare(model)) is None and not has_virtual_tokens(model):
            sizes["answering"] = added(ANSWERING, lambda _: _answer(spec, model, longest_tokens))
        elif spec.evaluation.generate:
            cached: list[int] = []
            sizes["answering"] = added(ANSWERING, lambda tape: cached.append(_read(spec, model, longest_tokens, tape)))
            # While a token is added, one layer has its keys and values twice, and next-token scores are in float32.
            new, vocabulary = spec.evaluation.max_new_tokens, model.config.get_text_config().vocab_size
            grown = int(cached[0] * (longest_tokens + new) / longest_tokens * 1.1)
            sizes["answering"] = max(sizes["answering"], grown + spec.evaluation.batch_size * vocabulary * 12)
    return sizes


def _score(model: PreTrainedModel, rows: int, tokens: int) -> None:
    """Score rows of a length, on shapes."""
    import torch

    ids = torch.ones(rows, tokens, dtype=torch.long, device="meta")
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True, use_cache=False)


def _read(spec: LlmTrialSpec, model: PreTrainedModel, tokens: int, tape: Tape) -> int:
    """Read a batch of prompts as `generate` does, on shapes; returns the bytes of their cache and last scores."""
    import torch

    ids = torch.ones(spec.evaluation.batch_size, tokens, dtype=torch.long, device="meta")
    output: Any = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
    assert output is not None  # held until its bytes are counted
    return tape.bytes["buffers"]


def _answer(spec: LlmTrialSpec, model: PreTrainedModel, longest_tokens: int) -> None:
    """Fill all lanes with prompts of one length and add the last token of their answers, on shapes."""
    import torch

    from ray_peft.tasks.llm_sft.continuous import Ends, Lanes, Voice, group_of
    from ray_peft.tasks.llm_sft.evaluate import bare
    from ray_peft.tasks.llm_sft.lanes import largest_capacity

    count, new = spec.evaluation.batch_size, spec.evaluation.max_new_tokens
    dtype = torch.bfloat16 if spec.train.precision == "bf16" else model.dtype
    lanes = Lanes([Voice(bare(model))], count, longest_tokens + new, Ends(new, (0,)), dtype)
    capacity = largest_capacity(longest_tokens)
    group = torch.ones(group_of(count, capacity), dtype=torch.long, device="meta")
    lanes.read(torch.ones(len(group), capacity, dtype=torch.long, device="meta"), group, group)
    lanes.add(count, lanes.capacity)
