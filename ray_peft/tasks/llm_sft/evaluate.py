"""Loss on answer tokens and greedy answers on held-out rows, in the same way for every method."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ray_peft.engine.recovery import in_parts
from ray_peft.engine.shards import is_sharded
from ray_peft.spec import LlmTrialSpec
from ray_peft.spec.keys import EVALUATION_BATCH
from ray_peft.tasks.llm_sft.data import IGNORED
from ray_peft.tasks.llm_sft.decodable import VIRTUAL_TOKENS, has_virtual_tokens
from ray_peft.tasks.llm_sft.decoding import end_of_answers, greedy
from ray_peft.tasks.llm_sft.encode import tokens_with_loss
from ray_peft.tasks.llm_sft.packed_scores import Row, packed_log_probs, packs

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn
    from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

    from ray_peft.engine.slots import Slots
    from ray_peft.tasks.llm_sft.continuous import Voice

logger = logging.getLogger(__name__)

LOSS_TOKENS = 4096
"""Tokens, padding included, of one forward pass that measures the loss."""

LOSS_BATCH = "evaluation.loss_tokens"
"""Key of `Bench.lowered` for the value to which `LOSS_TOKENS` was lowered when memory ran out. It is not a setting of
the trial. The rows that are answered at a time have another key, so that small passes do not slow down answers."""


@dataclass(frozen=True)
class Mixture:
    """The models of an ensemble, and how their distributions are mixed."""

    voices: Sequence[Voice]
    processor: Callable[[Tensor], LogitsProcessor]
    """Takes the attention mask of a batch of prompts (row, longest); returns a processor that turns the first model's
    scores of the next tokens into those of the mixture."""


def token_log_probs(
    spec: LlmTrialSpec, model: PreTrainedModel, rows: Dataset, pad: int, lowered: dict[str, int] | None = None
) -> Tensor:
    """Log-probabilities of all answer tokens of all rows (answer tokens,) float64 on the CPU, the longest row first.

    Args:
        spec: how to evaluate.
        model: in any mode; its mode is restored.
        rows: with `input_ids` and `labels`.
        pad: the padding token.
        lowered: `Bench.lowered`, read and written at `LOSS_BATCH`; None for a call that should not remember it.

    Raises:
        ValueError: no row has an answer token.
        torch.OutOfMemoryError: a single row does not fit.
    """
    import torch

    ordered = longest_first(rows)
    log_probs = row_log_probs(spec, model, ordered, pad, {} if lowered is None else lowered)
    if not any(row.numel() for row in log_probs):
        raise ValueError("no held-out row has an answer token within data.max_length")
    return torch.cat(log_probs)


def longest_first(rows: Dataset, slot: int = 0) -> list[Row]:
    """Rows with `input_ids` and `labels` in the order in which they are scored; `slot` is that of their trial."""
    ordered = [Row(ids, labels, slot) for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)]
    return sorted(ordered, key=lambda row: len(row.ids), reverse=True)


def row_log_probs(
    spec: LlmTrialSpec,
    model: PreTrainedModel,
    rows: Sequence[Row],
    pad: int,
    lowered: dict[str, int],
    slots: Slots | None = None,
) -> list[Tensor]:
    """Log-probabilities (answer tokens,) float64 on the CPU of each row.

    If memory runs out, the pass is halved, and later passes hold no more tokens than that.

    Args:
        spec: how to evaluate; of several trials, any of them: they agree in what is used here.
        model: in any mode; its mode is restored.
        rows: the longest first.
        pad: the padding token.
        lowered: read and written at `LOSS_BATCH`.
        slots: the adapters of several trials, which each row names; None for a model as it is.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    import torch

    if not rows:
        return []
    log_probs = None
    with inference(spec, model):
        if packs(spec, model):
            tokens = lowered.get(LOSS_BATCH, LOSS_TOKENS)

            def padded_pass(part: Sequence[Row]) -> Tensor:
                return torch.cat(_padded_log_probs(model, part, pad, {}, None))

            # Trials have one base only where their rows in lanes had the loss of padded rows.
            log_probs, fitting = packed_log_probs(
                spec, model, rows, tokens, padded_pass if slots is None else None, slots
            )
            if fitting < tokens:
                lowered[LOSS_BATCH] = fitting
        if log_probs is None:
            log_probs = _padded_log_probs(model, rows, pad, lowered, slots)
    parts: Sequence[Tensor] = torch.cat(log_probs).double().cpu().split([len(row) for row in log_probs])  # type: ignore[no-untyped-call]
    return list(parts)


def _padded_log_probs(
    model: PreTrainedModel, rows: Sequence[Row], pad: int, lowered: dict[str, int], slots: Slots | None
) -> list[Tensor]:
    """The result of `row_log_probs`, where the rows of a pass are padded to the longest of them."""
    import torch

    def score(part: Sequence[Row]) -> list[Tensor]:
        ids = [row.ids for row in part]
        if slots is not None:
            slots.begin(torch.tensor([row.slot for row in part], device=model.device))
        output: Any = model(
            input_ids=padded(ids, pad, "right").to(model.device),
            attention_mask=padded([[1] * len(row) for row in ids], 0, "right").to(model.device),
            labels=padded([row.labels for row in part], IGNORED, "right").to(model.device),
            fused_lm_head=True,  # never holds the logits of a whole batch: see model.py
        )
        scored = output.log_probs[output.label_mask].double().cpu()
        return list(scored.split([tokens_with_loss(row.labels) for row in part]))

    log_probs: list[Tensor] = []
    while rows:
        longest = len(rows[0].ids)
        batch = rows[: max(1, lowered.get(LOSS_BATCH, LOSS_TOKENS) // longest)]
        scored, size = in_parts(batch, len(batch), str(model.device), score, repeats=not is_sharded(model))
        log_probs, rows = log_probs + scored, rows[len(batch) :]
        if size < len(batch):
            lowered[LOSS_BATCH] = size * longest
    return log_probs


def answers(
    spec: LlmTrialSpec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    mixture: Mixture | None = None,
    *,
    lowered: dict[str, int] | None = None,
    ended: list[bool] | None = None,
) -> list[str]:
    """The model's greedy answers, in the order of `rows`, equal to those of its own `generate`.

    The longest prompts are answered first, and a new prompt takes the place of one whose answer is complete
    (continuous.py). If memory runs out, half as many are answered at a time from there on. A model that cannot do this
    answers with `generate`, batch by batch, and the log says why.

    Args:
        spec: how to evaluate.
        model: in any mode; its mode is restored.
        tokenizer: of the model.
        rows: with `prompt_ids`.
        mixture: that of an ensemble; `model` is then its first member's, with its adapter on.
        lowered: `Bench.lowered`, read and written at `EVALUATION_BATCH`; None for a call that should not remember it.
        ended: a list to which is added, for each answer, whether it ended before it had the most tokens it may have.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    from ray_peft.tasks.llm_sft.continuous import Voice
    from ray_peft.tasks.llm_sft.in_lanes import InLanes

    prompts: list[list[int]] = list(rows["prompt_ids"])
    if not prompts:
        return []
    end = end_of_answers(spec, tokenizer)
    lowered = {} if lowered is None else lowered
    first = lowered.get(EVALUATION_BATCH, spec.evaluation.batch_size)
    voices = mixture.voices if mixture is not None else [Voice(bare(model))]
    with inference(spec, model), greedy(model, tokenizer, end) as settings:
        settings.stop_strings = [end.text] if end.text else None
        settings.max_new_tokens = spec.evaluation.max_new_tokens
        work = InLanes(spec, voices, tokenizer, prompts, settings)
        reason = VIRTUAL_TOKENS if has_virtual_tokens(model) else work.why_not()
        if reason is None:
            answered, size = work.answers(first)
        else:
            logger.info("%s: answers are generated batch by batch: %s", spec.trial_id, reason)
            processor = mixture.processor if mixture is not None else None
            answered, size = _generated(model, tokenizer, prompts, settings, first, processor)
    if size < first:
        lowered[EVALUATION_BATCH] = size
    return as_texts([answered[row] for row in range(len(prompts))], tokenizer, settings.eos_token_id, end.text, ended)


def as_texts(
    answered: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    end_text: str | None,
    ended: list[bool] | None,
) -> list[str]:
    """Answers as texts, up to the text that ends an answer; `ended` is that of `answers`."""
    texts = tokenizer.batch_decode([list(tokens) for tokens in answered], skip_special_tokens=True)
    if ended is not None:
        last = set(stops)
        ended += [
            not last.isdisjoint(tokens) or bool(end_text and end_text in text)
            for tokens, text in zip(answered, texts, strict=True)
        ]
    return [(text.partition(end_text)[0] if end_text else text).strip() for text in texts]


def bare(model: PreTrainedModel) -> PreTrainedModel:
    """The model without PEFT's wrapper; adapters stay in its layers."""
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inner


def _generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    size: int,
    processor: Callable[[Tensor], LogitsProcessor] | None,
) -> tuple[dict[int, list[int]], int]:
    """Answers with `generate`: prompts are batched by length, so that little is padded, and padded on the left."""
    import torch

    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)

    def answer(chosen: Sequence[int]) -> list[list[int]]:
        batch = padded([prompts[row] for row in chosen], tokenizer.pad_token_id, "left").to(model.device)
        mask = padded([[1] * len(prompts[row]) for row in chosen], 0, "left").to(model.device)
        with torch.no_grad():
            output: Any = model.generate(  # type: ignore[operator]  # from GenerationMixin, in subclasses
                input_ids=batch,
                attention_mask=mask,
                generation_config=settings,
                tokenizer=tokenizer if settings.stop_strings else None,  # finds the stop string in tokens
                logits_processor=[processor(mask)] if processor is not None else None,
            )
        answered: list[list[int]] = output[:, batch.shape[1] :].tolist()
        return answered

    answered, size = in_parts(order, size, str(model.device), answer, repeats=not is_sharded(model))
    return dict(zip(order, answered, strict=True)), size


@contextlib.contextmanager
def inference(spec: LlmTrialSpec, model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode in the spec's precision; the training mode and gradient checkpointing are restored afterwards."""
    import torch

    from ray_peft.tasks.llm_sft.routers import switched_off

    was_training = model.training
    checkpoint_functions = {part: part._gradient_checkpointing_func for part in model.modules() if _checkpoints(part)}
    checkpointing = getattr(model, "is_gradient_checkpointing", False)
    model.eval()  # type: ignore[no-untyped-call]
    if checkpointing:
        model.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]
    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=spec.train.precision == "bf16")
    try:
        with torch.no_grad(), autocast, switched_off(model):
            yield
    finally:
        if checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
            for part, function in checkpoint_functions.items():  # those that training had set
                cast(Any, part)._gradient_checkpointing_func = function
        model.train(was_training)


def _checkpoints(part: nn.Module) -> bool:
    return getattr(part, "_gradient_checkpointing_func", None) is not None


def padded(rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
    """Rows of unequal length as one tensor (row, longest) int64, padded with `value` on one `side`, left or right."""
    import torch

    longest = max(len(row) for row in rows)
    pads = [[value] * (longest - len(row)) for row in rows]
    filled = zip(rows, pads, strict=True)
    return torch.tensor([[*row, *pad] if side == "right" else [*pad, *row] for row, pad in filled])
