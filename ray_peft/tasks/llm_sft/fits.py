"""Whether prepared rows fit a model: token numbers against its embedding, lengths against its positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ray_peft.errors import DataError, ModelError
from ray_peft.spec import LlmTrialSpec, ModelSpec
from ray_peft.tasks.llm_sft.counts import TokenFacts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ray_peft.tasks.llm_sft.data import PreparedData

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
"""Names that configs give the number of positions, the common ones first."""


def check(spec: LlmTrialSpec, model: ModelSpec, config: PretrainedConfig, prepared: PreparedData) -> list[str]:
    """What a reader must know of how a trial's rows fit a model; empty if there is nothing to say.

    Args:
        spec: the trial.
        model: its model, or that of a member.
        config: of that model.
        prepared: the trial's rows.

    Raises:
        ModelError: a token is beyond the embedding.
        DataError: a row or an answer is longer than the model has positions for.
    """
    from ray_peft.tasks.llm_sft.scores import answered_rows

    text = config.get_text_config()
    cautions = _check_embedding(model, getattr(text, "vocab_size", None), prepared.facts)
    positions = _positions(text)
    if positions is None:
        return cautions
    needs = [(prepared.facts.longest, "the longest row", f"lower data.max_length to at most {positions}")]
    if spec.evaluation.generate:
        answered = answered_rows(spec, prepared.held_out(spec.evaluation.split))
        prompt = max(map(len, answered["prompt_ids"]), default=0)
        new = spec.evaluation.max_new_tokens
        length = f"the longest prompt ({prompt} tokens) and evaluation.max_new_tokens ({new})"
        way = f"lower evaluation.max_new_tokens to at most {positions - prompt}" if prompt < positions else needs[0][2]
        needs.append((prompt + new, length, way))
    longer = [need for need in needs if need[0] > positions]
    fixed = bool(longer) and has_fixed_positions(config, positions)
    for tokens, length, way in longer:
        have = f"{length} has {tokens:,} tokens" if length == needs[0][1] else f"{length} make {tokens:,} tokens"
        if fixed:
            raise DataError(
                f"model.name: {model.name} has {positions:,} positions and cannot go beyond, but {have}; {way}"
            )
        cautions.append(
            f"{model.name}: {have}, more than the {positions:,} positions that the model was made for: expect worse "
            f"text beyond them; {way}"
        )
    return cautions


def _check_embedding(model: ModelSpec, vocabulary: int | None, facts: TokenFacts) -> list[str]:
    """Token numbers against the rows of the embedding."""
    if vocabulary is None:
        return []
    for token, name, where in (
        (facts.largest, facts.largest_name, "a row holds"),
        (facts.pad, facts.pad_name, "shorter rows are padded with"),
    ):
        if token >= vocabulary:
            raise ModelError(
                f"model.name: {model.name} has an embedding of {vocabulary:,} tokens (vocab_size in config.json), but "
                f"{where} token number {token:,} ({name!a}) of a tokenizer with {facts.vocabulary:,}; name "
                "the model's own tokenizer in model.tokenizer, or a model whose embedding was resized for this one"
            )
    if facts.vocabulary > vocabulary:
        return [
            f"{model.name}: the tokenizer has {facts.vocabulary:,} tokens and the model's embedding {vocabulary:,}; no "
            "row holds one of those beyond"
        ]
    return []


def _positions(config: PretrainedConfig) -> int | None:
    """Positions that a model is made for, with the scaling of rotary embeddings; None if its config names none."""
    for name in _POSITIONS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return max([value, *_scaled(config, value)])
    return None


def _scaled(config: PretrainedConfig, positions: int) -> Iterator[int]:
    """Positions within reach of rotary embeddings that are scaled."""
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    layers = [rope, *rope.values()] if isinstance(rope, Mapping) else []
    for settings in layers:
        factor = settings.get("factor") if isinstance(settings, Mapping) else None
        if isinstance(factor, int | float) and factor > 0:
            yield int((settings.get("original_max_position_embeddings") or positions) * factor)


def has_fixed_positions(config: PretrainedConfig, positions: int) -> bool:
    """True if the model holds a table of its positions, learned or computed, and so fails behind its end.

    The model is built on the meta device: a second embedding, or a buffer, with a place for each position tells it.
    Rotary models compute what they need.
    """
    import torch
    from transformers import AutoModelForCausalLM

    sizes = range(positions, positions + 3)  # OPT's table has two places more
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception:  # what cannot be built is refused elsewhere, with its reason
        return False
    words = model.get_input_embeddings()
    tables = [part for part in model.modules() if isinstance(part, torch.nn.Embedding) and part is not words]
    learned = any(table.num_embeddings in sizes for table in tables)
    computed = any(size in sizes for _, buffer in model.named_buffers() for size in buffer.shape)
    return learned or computed or config.model_type == "mpt"  # MPT's bias by distance ends with its positions
