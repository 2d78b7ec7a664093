"""Loss on answer tokens and greedy answers on held-out rows, the same for every method."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.data import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

LOSS_TOKENS = 4096
"""Tokens, padding included, of one forward pass that measures the loss."""


def answer_loss(spec: LlmTrialSpec, model: PreTrainedModel, rows: Dataset, pad: int) -> float:
    """Mean negative log-likelihood of the answers' tokens over all rows [nats].

    Every token counts once: it is the loss of one batch that holds all rows.
    """
    return -float(token_log_probs(spec, model, rows, pad).mean())


def token_log_probs(spec: LlmTrialSpec, model: PreTrainedModel, rows: Dataset, pad: int) -> Tensor:
    """Log-probabilities of all answer tokens of all rows (answer tokens,) float64 on the CPU, the longest row first.

    Raises:
        ValueError: there is none.
    """
    import torch

    found = []
    with inference(spec, model):
        for ids, labels in _by_length(rows, LOSS_TOKENS):
            output = model(
                input_ids=_padded(ids, pad, "right").to(model.device),
                attention_mask=_padded([[1] * len(row) for row in ids], 0, "right").to(model.device),
                labels=_padded(labels, IGNORED, "right").to(model.device),
                fused_lm_head=True,  # never holds the logits of a whole batch: see model.py
            )
            found.append(output.log_probs[output.label_mask].double().cpu())
    if not any(part.numel() for part in found):
        raise ValueError("no held-out row has an answer token within data.max_length")
    return torch.cat(found)


def answers(
    spec: LlmTrialSpec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    others: Callable[[Tensor], LogitsProcessor] | None = None,
) -> list[str]:
    """The model's greedy answers, in the order of `rows`.

    Prompts are padded on the left and batched by length, so that little is padded.

    Args:
        spec: how to evaluate.
        model: in any mode; its mode is restored.
        tokenizer: of the model.
        rows: with `prompt_ids`.
        others: given the attention mask of a batch's prompts (row, longest), what changes the next tokens' scores.
    """
    import torch

    prompts: list[list[int]] = list(rows["prompt_ids"])
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    found: dict[int, str] = {}
    stop = _stop_tokens(model, tokenizer)
    with inference(spec, model):
        for begin in range(0, len(order), spec.evaluation.batch_size):
            chosen = order[begin : begin + spec.evaluation.batch_size]
            batch = _padded([prompts[row] for row in chosen], tokenizer.pad_token_id, "left").to(model.device)
            mask = _padded([[1] * len(prompts[row]) for row in chosen], 0, "left").to(model.device)
            with torch.no_grad():
                output: Any = model.generate(  # type: ignore[operator]  # from GenerationMixin, in subclasses
                    input_ids=batch,
                    attention_mask=mask,
                    max_new_tokens=spec.evaluation.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    repetition_penalty=1.0,  # some models ask for one, which would not be greedy decoding
                    no_repeat_ngram_size=0,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=stop,
                    use_cache=True,
                    logits_processor=[others(mask)] if others is not None else None,
                )
            texts = tokenizer.batch_decode(output[:, batch.shape[1] :], skip_special_tokens=True)
            found |= {row: text.strip() for row, text in zip(chosen, texts, strict=True)}
    return [found[row] for row in range(len(prompts))]


@contextlib.contextmanager
def inference(spec: LlmTrialSpec, model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode in the spec's precision; training mode and checkpointing are restored after."""
    import torch

    was_training = model.training
    checkpointing = getattr(model, "is_gradient_checkpointing", False)
    model.eval()  # type: ignore[no-untyped-call]
    if checkpointing:
        model.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]
    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=spec.train.precision == "bf16")
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        if checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
        model.train(was_training)


def _by_length(rows: Dataset, tokens: int) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    """Batches of rows of similar length, each at most `tokens` with padding (one row may be longer)."""
    every = sorted(zip(rows["input_ids"], rows["labels"], strict=True), key=lambda row: len(row[0]), reverse=True)
    batch: list[tuple[list[int], list[int]]] = []
    for row in every:
        if batch and len(batch[0][0]) * (len(batch) + 1) > tokens:
            yield [ids for ids, _ in batch], [labels for _, labels in batch]
            batch = []
        batch.append(row)
    if batch:
        yield [ids for ids, _ in batch], [labels for _, labels in batch]


def _padded(rows: list[list[int]], value: int, side: str) -> Tensor:
    """(row, longest) int64."""
    import torch

    longest = max(len(row) for row in rows)
    pads = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([row + pad if side == "right" else pad + row for row, pad in zip(rows, pads, strict=True)])


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-sequence tokens of the model and of the tokenizer; either ends an answer."""
    config = getattr(model, "generation_config", None)
    known = getattr(config, "eos_token_id", None)
    ids = known if isinstance(known, list) else [known]
    return sorted({token for token in (*ids, tokenizer.eos_token_id) if token is not None})
