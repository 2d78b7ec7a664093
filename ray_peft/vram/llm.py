"""A causal language model on the meta device: built from its config, stored and adapted as a trial does it."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from ray_peft.methods.base import Stage
from ray_peft.spec import LlmTrialSpec
from ray_peft.vram.parts import ANSWERING, ATTACH, SCORING, STEP, during
from ray_peft.vram.shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

_LIKE_SDPA = ("flex_attention", "flash_attention_2")
"""Attention that keeps what torch's fused kernels keep: q, k, v and the output, not the scores."""


def components(
    spec: LlmTrialSpec, stage: Stage, shape: ModelShape, *, longest_tokens: int, padded: bool
) -> Counter[str]:
    """Bytes by kind at the peak of a step of `stage` with rows of `longest_tokens`."""
    import torch

    from ray_peft.vram.stand_ins import Autocast, on_meta
    from ray_peft.vram.step import Conditions
    from ray_peft.vram.step import components as of_step

    autocast = spec.train.precision == "bf16"
    with on_meta(autocast=autocast):
        model = _built(spec, stage, shape)
        with during(ATTACH):
            model = cast("PreTrainedModel", stage.attach(model))
        model.train()
        if spec.train.gradient_checkpointing:
            dtype = torch.bfloat16 if autocast else None
            # A backward pass runs without the modes of the forward pass: the recomputation brings its own.
            model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]
                {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), Autocast(dtype))}
            )
            if not stage.needs_full_weights:
                model.enable_input_require_grads()  # type: ignore[no-untyped-call]
        ids = torch.ones(spec.train.micro_batch_size, longest_tokens, dtype=torch.long, device="meta")

        def loss() -> Tensor:
            made: Any = model(
                input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False, fused_lm_head=True
            )
            total: Tensor = made.log_probs.sum()
            return total

        recorded = keeps_gradients(spec, stage)
        given = Conditions(autocast=autocast, accumulates=spec.accumulation > 1 or recorded, padded=padded or recorded)
        with during(STEP):
            return of_step(model, stage, loss, given)


def keeps_gradients(spec: LlmTrialSpec, stage: Stage) -> bool:
    """Whether gradients lie in memory between steps: recorded passes add to the same tensors."""
    return spec.train.cuda_graphs and not stage.conflicts(accumulates=True, num_workers=1)


def _built(spec: LlmTrialSpec, stage: Stage | None, shape: ModelShape) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from ray_peft.tasks.llm_sft.targets import four_bit_layers
    from ray_peft.vram.stand_ins import quantize

    method = stage or spec.method
    attention = spec.model.attention
    settings = {"attn_implementation": "sdpa" if attention in _LIKE_SDPA else attention} if attention else {}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            _config(shape), dtype=getattr(torch, method.weights_dtype(spec.model.dtype)), **settings
        )
    quantization = method.quantization() or (None if method.needs_full_weights else spec.model.quantization)
    if quantization is not None:
        quantize(model, quantization, four_bit_layers(model))
    add_fused_lm_head(model)
    model.requires_grad_(False)
    return model


def _config(shape: ModelShape) -> PretrainedConfig:
    from transformers import AutoConfig

    plain = shape.plain()
    config: PretrainedConfig = AutoConfig.for_model(**plain)
    return config


def evaluation(spec: LlmTrialSpec, stage: Stage | None, shape: ModelShape, longest_tokens: int) -> Counter[str]:
    """Bytes of the model, and beside it while the held-out loss is measured and while prompts are answered."""
    import torch

    from ray_peft.tasks.llm_sft.evaluate import LOSS_TOKENS
    from ray_peft.vram.ledger import Ledger
    from ray_peft.vram.stand_ins import Autocast, on_meta
    from ray_peft.vram.step import own_model

    autocast = spec.train.precision == "bf16"
    found: Counter[str] = Counter()
    with on_meta(autocast=autocast):
        model = _built(spec, stage, shape)
        if stage is not None and not stage.needs_full_weights:
            with during(ATTACH):
                model = cast("PreTrainedModel", stage.attach(model))
        model.eval()  # type: ignore[no-untyped-call]
        scoring: tuple[int, dict[str, Any]] = (
            max(1, LOSS_TOKENS // longest_tokens),
            {"fused_lm_head": True, "use_cache": False},
        )
        answering: tuple[int, dict[str, Any]] = (spec.evaluation.batch_size, {"use_cache": True, "logits_to_keep": 1})
        asked = {"scoring": scoring, "answering": answering} if spec.evaluation.generate else {"scoring": scoring}
        for name, (rows, settings) in asked.items():
            ledger = Ledger(truth=False)
            own_model(ledger, model)
            found["model"] = ledger.now
            ids = torch.ones(rows, longest_tokens, dtype=torch.long, device="meta")
            labels = {"labels": ids} if "fused_lm_head" in settings else {}
            with (
                during(SCORING if name == "scoring" else ANSWERING),
                torch.no_grad(),
                Autocast(torch.bfloat16 if autocast else None),
                ledger,
            ):
                made: Any = model(input_ids=ids, attention_mask=torch.ones_like(ids), **labels, **settings)
                cached = ledger.bytes["buffers"]  # keys and values of the prompts, and the last tokens' logits
                del made
            found[name] = ledger.peak - found["model"]
    if spec.evaluation.generate:
        # While tokens are added, one layer's keys and values are there twice, and next-token scores in float32.
        new, vocabulary = spec.evaluation.max_new_tokens, model.config.get_text_config().vocab_size
        grown = int(cached * (longest_tokens + new) / longest_tokens * 1.1)
        found["answering"] = max(found["answering"], grown + spec.evaluation.batch_size * vocabulary * 12)
    return found
