"""Embeddings with room for `model.new_tokens`, whose rows start as the mean of those of all old tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray_peft.foundation.lists import some
from ray_peft.methods.new_tokens import mark
from ray_peft.reach.shared_weights import output_layer
from ray_peft.spec import ModelSpec
from ray_peft.tasks.llm_sft.preference.rows import side_columns
from ray_peft.tasks.llm_sft.tokenizer import new_token_ids

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


def grown_config(model: ModelSpec, config: PretrainedConfig) -> PretrainedConfig:
    """The config of a model with its new tokens; without new tokens, or where there is room for them, as it is.

    Raises:
        ModelError: as `new_token_ids`.
    """
    ids = new_token_ids(model)
    if not ids or ids[-1] < config.get_text_config().vocab_size:
        return config
    larger: PretrainedConfig = copy.deepcopy(config)
    larger.get_text_config().vocab_size = ids[-1] + 1
    return larger


def cautions(model: ModelSpec, rows: Dataset) -> list[str]:
    """Whether there are new tokens that no training row holds.

    Raises:
        ModelError: as `new_token_ids`.
    """
    ids = new_token_ids(model)
    if not ids:
        return []
    trained = {token for column, _ in side_columns(rows) for row in rows[column] for token in row}
    unseen = [token for token, number in zip(model.new_tokens, ids, strict=True) if number not in trained]
    if not unseen:
        return []
    return [
        f"model.new_tokens: {some(unseen)} {'is' if len(unseen) == 1 else 'are'} in no training row, so that nothing "
        "is learned of it"
    ]


def grow(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Make room for new tokens in a loaded model's embeddings, and start their rows.

    The mean of the old rows is where a new token is about as likely as an old one is on average, so that the others
    lose little (Hewitt 2021, "Initializing new word embeddings for pretrained language models").

    Args:
        model: any, on its device; embeddings are never quantised.
        ids: of the new tokens, ascending; all tokens before them are old ones. None of them leaves the model as it is.
    """
    import torch

    if not ids:
        return
    embedding: Any = model.get_input_embeddings()
    if ids[-1] >= len(embedding.weight):
        model.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
    with torch.no_grad():
        for weight in _vocabularies(model):
            # Rows from the first new token on belong to nobody: some vocabularies are padded to a round number.
            weight[list(ids)] = weight[: ids[0]].mean(dim=0, dtype=torch.float32).to(weight.dtype)
    mark(model, ids)


def _vocabularies(model: PreTrainedModel) -> list[Tensor]:
    """What holds an entry for each token: embeddings, the output layer if it is another, and its bias."""
    embedding: Any = model.get_input_embeddings()
    head: Any = output_layer(model)
    entries: dict[int, Tensor] = {}
    for tensor in (embedding.weight, getattr(head, "weight", None), getattr(head, "bias", None)):
        if tensor is not None:
            entries[tensor.data_ptr()] = tensor
    return list(entries.values())


def mark_on_shapes(model: PreTrainedModel, spec: ModelSpec) -> None:
    """Note on a model without weights, built from a grown config, as many rows as it has new tokens: the last ones."""
    rows = model.config.get_text_config().vocab_size
    mark(model, range(rows - len(spec.new_tokens), rows))
