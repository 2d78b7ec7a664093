"""Loss on answer tokens and greedy answers on held-out rows, the same for every method."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ray_peft.engine.recovery import in_parts
from ray_peft.spec import LlmTrialSpec
from ray_peft.spec.keys import EVALUATION_BATCH
from ray_peft.tasks.llm_sft.data import IGNORED
from ray_peft.tasks.llm_sft.decoding import end_of_answers, greedy

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

LOSS_TOKENS = 4096
"""Tokens, padding included, of one forward pass that measures the loss."""

LOSS_BATCH = "evaluation.loss_tokens"
"""What memory forced `LOSS_TOKENS` down to, as a key of `Bench.lowered`. It is none of the trial's settings, and apart
from the rows that are answered at a time: passes of few tokens must not make answers slow."""


def answer_loss(
    spec: LlmTrialSpec, model: PreTrainedModel, rows: Dataset, pad: int, lowered: dict[str, int] | None = None
) -> float:
    """Mean negative log-likelihood of the answers' tokens over all rows [nats].

    Every token counts once: it is the loss of one batch that holds all rows. `lowered` is as for `token_log_probs`.
    """
    return -float(token_log_probs(spec, model, rows, pad, lowered).mean())


def token_log_probs(
    spec: LlmTrialSpec, model: PreTrainedModel, rows: Dataset, pad: int, lowered: dict[str, int] | None = None
) -> Tensor:
    """Log-probabilities of all answer tokens of all rows (answer tokens,) float64 on the CPU, the longest row first.

    Where memory runs out, passes hold half as many rows, and later ones no more tokens than those.

    Args:
        spec: how to evaluate.
        model: in any mode; its mode is restored.
        rows: with `input_ids` and `labels`.
        pad: the padding token.
        lowered: `Bench.lowered`, read and written at `LOSS_BATCH`; null remembers nothing.

    Raises:
        ValueError: there is none.
        torch.OutOfMemoryError: a single row does not fit.
    """
    import torch

    lowered = {} if lowered is None else lowered

    def score(part: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        ids, labels = [row[0] for row in part], [row[1] for row in part]
        output = model(
            input_ids=padded(ids, pad, "right").to(model.device),
            attention_mask=padded([[1] * len(row) for row in ids], 0, "right").to(model.device),
            labels=padded(labels, IGNORED, "right").to(model.device),
            fused_lm_head=True,  # never holds the logits of a whole batch: see model.py
        )
        return [output.log_probs[output.label_mask].double().cpu()]

    left = sorted(zip(rows["input_ids"], rows["labels"], strict=True), key=lambda row: len(row[0]), reverse=True)
    found: list[Tensor] = []
    with inference(spec, model):
        while left:
            longest = len(left[0][0])
            batch = left[: max(1, lowered.get(LOSS_BATCH, LOSS_TOKENS) // longest)]
            scored, size = in_parts(batch, len(batch), str(model.device), score)
            found, left = found + scored, left[len(batch) :]
            if size < len(batch):
                lowered[LOSS_BATCH] = size * longest
    if not any(part.numel() for part in found):
        raise ValueError("no held-out row has an answer token within data.max_length")
    return torch.cat(found)


def answers(
    spec: LlmTrialSpec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    others: Callable[[Tensor], LogitsProcessor] | None = None,
    *,
    lowered: dict[str, int] | None = None,
) -> list[str]:
    """The model's greedy answers, in the order of `rows`.

    Prompts are padded on the left and batched by length, so that little is padded. A batch that does not fit into
    memory is halved for the rest of the rows.

    Args:
        spec: how to evaluate.
        model: in any mode; its mode is restored.
        tokenizer: of the model.
        rows: with `prompt_ids`.
        others: given the attention mask of a batch's prompts (row, longest), what changes the next tokens' scores.
        lowered: `Bench.lowered`, read and written at `EVALUATION_BATCH`; null remembers nothing.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    import torch

    prompts: list[list[int]] = list(rows["prompt_ids"])
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)

    def answer(chosen: Sequence[int]) -> list[str]:
        batch = padded([prompts[row] for row in chosen], tokenizer.pad_token_id, "left").to(model.device)
        mask = padded([[1] * len(prompts[row]) for row in chosen], 0, "left").to(model.device)
        with torch.no_grad():
            output: Any = model.generate(  # type: ignore[operator]  # from GenerationMixin, in subclasses
                input_ids=batch,
                attention_mask=mask,
                generation_config=settings,
                tokenizer=tokenizer if end.text else None,  # finds the stop string in tokens
                logits_processor=[others(mask)] if others is not None else None,
            )
        texts = tokenizer.batch_decode(output[:, batch.shape[1] :], skip_special_tokens=True)
        return [(text.partition(end.text)[0] if end.text else text).strip() for text in texts]

    end = end_of_answers(spec, tokenizer)
    lowered = {} if lowered is None else lowered
    first = lowered.get(EVALUATION_BATCH, spec.evaluation.batch_size)
    with inference(spec, model), greedy(model, tokenizer, end) as settings:
        settings.stop_strings = [end.text] if end.text else None
        settings.max_new_tokens = spec.evaluation.max_new_tokens
        given, size = in_parts(order, first, str(model.device), answer)
    if size < first:
        lowered[EVALUATION_BATCH] = size
    found = dict(zip(order, given, strict=True))
    return [found[row] for row in range(len(prompts))]


@contextlib.contextmanager
def inference(spec: LlmTrialSpec, model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode in the spec's precision; training mode and checkpointing are restored after."""
    import torch

    from ray_peft.tasks.llm_sft.routers import switched_off

    was_training = model.training
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
        model.train(was_training)


def padded(rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
    """Rows of unequal length as one tensor (row, longest) int64, filled up with `value` on one side, left or right."""
    import torch

    longest = max(len(row) for row in rows)
    pads = [[value] * (longest - len(row)) for row in rows]
    filled = zip(rows, pads, strict=True)
    return torch.tensor([[*row, *pad] if side == "right" else [*pad, *row] for row, pad in filled])
