"""Whether a model's config is of a causal language model, and whether its files hold all of its weights."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ray_peft.errors import ModelError, first_line
from ray_peft.foundation.lists import some

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from ray_peft.spec import ModelSpec

_CAUSAL_ALL_THE_SAME = ("gpt_neox", "gpt_neox_japanese")
"""Their configs carry `is_decoder: false` from a common base, and nothing reads it (transformers 5.23)."""

_NOT_TRAINED = re.compile(
    r"rotary_emb\.inv_freq$|masked_bias$|(^|\.)attn\.bias$|position_ids$|(^|\.)v_head\.|(^|\.)mtp\.|"
    r"(^|\.)(vision_tower|vision_model|visual|vision_embed_tokens|audio_tower|audio_model|embed_vision|embed_audio|"
    r"multi_modal_projector|mm_projector|image_newline)(\.|$)"
)
"""Weights that a file may hold beside those of the language model: tables that are computed, old buffers, other heads
and the towers of models that also see or hear."""


def check_causal(name: str, config: PretrainedConfig) -> None:
    """Refuse a model whose tokens see those after them, or that reads its prompt with an encoder.

    Raises:
        ModelError: the config is of such a model.
    """
    from transformers import AutoModelForCausalLM

    kind = config.model_type
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    text_config = config if encoder_decoder else config.get_text_config(decoder=True)
    reason = None
    if encoder_decoder:
        reason = "has an encoder and a decoder"
    elif kind == "xlnet" or (kind == "xlm" and not getattr(config, "causal", False)):
        reason = "predicts tokens from both sides"
    elif getattr(config, "is_decoder", None) is False and kind not in _CAUSAL_ALL_THE_SAME:
        reason = "is an encoder: each token sees those after it (is_decoder: false)"
    elif getattr(text_config, "use_bidirectional_attention", None) in (True, "all"):
        reason = "lets each token see those after it (use_bidirectional_attention)"
    elif getattr(text_config, "is_causal", None) is False:
        reason = "lets each token see those after it (is_causal: false)"
    elif "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}) and type(config) not in (
        AutoModelForCausalLM._model_mapping  # noqa: SLF001 - the library has no public list of them
    ):
        reason = "has no class that predicts the next token"
    if reason is not None:
        architectures = ", ".join(config.architectures or []) or kind
        raise ModelError(
            f"model.name: {name} ({architectures}) {reason}; task llm_sft needs a causal language model, such as "
            "Llama, Qwen, Gemma or GPT-2"
        )


def check_weights(model: ModelSpec, config: PretrainedConfig, state: Mapping[str, Tensor]) -> None:
    """Compare the weights in the files with those of the config: transformers' own loading, on shapes alone.

    Args:
        model: the trial's.
        config: of the model.
        state: every weight of the files on the meta device.

    Raises:
        ModelError: a weight is missing, is left over, or has another shape; or the config is of no model.
    """
    _, report = on_shapes(model, config, dict(state))
    raise_if_incomplete(model.name, report)


def check_buildable(model: ModelSpec, config: PretrainedConfig) -> None:
    """Build the model on shapes.

    Raises:
        ModelError: that fails.
    """
    _built_type(model, config)


def on_shapes(
    model: ModelSpec, config: PretrainedConfig, state: dict[str, Tensor]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model on the meta device, and transformers' report of what `state` gave it."""
    kind = _built_type(model, config)
    with _quiet():
        try:
            built: PreTrainedModel
            report: dict[str, Any]
            built, report = kind.from_pretrained(  # type: ignore[misc]  # two values, if asked for them
                None,
                config=config,
                state_dict=state,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except Exception as error:  # a model's own code may raise anything
            raise ModelError(f"model.name: {model.name}: its weights cannot be loaded: {first_line(error)}") from None
    return built, report


def _built_type(model: ModelSpec, config: PretrainedConfig) -> type[PreTrainedModel]:
    import copy

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

    with _quiet(), no_init_weights(), torch.device("meta"), meta_device_safe_creation_ops():
        try:
            built = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                copy.deepcopy(config), trust_remote_code=model.trust_remote_code
            )
        except Exception as error:  # a model's own code may raise anything
            raise ModelError(
                f"model.name: {model.name}: no model can be built from its config.json: "
                f"{first_line(error)}{' is not known' if isinstance(error, KeyError) else ''}"
            ) from None
    return type(built)


def raise_if_incomplete(name: str, report: Mapping[str, Any]) -> None:
    """Refuse weights if some of the config's are missing, or some belong to no layer of it.

    Args:
        name: of the model.
        report: transformers' loading report, without the weights that it knows to be tied or ignored.

    Raises:
        ModelError: some are missing, left over, or of another shape.
    """
    missing = sorted(report["missing_keys"])
    left_over = sorted(key for key in report["unexpected_keys"] if not _NOT_TRAINED.search(key))
    mismatched = sorted(
        (key, tuple(file_shape), tuple(config_shape)) for key, file_shape, config_shape in report["mismatched_keys"]
    )
    problems = []
    if missing:
        problems.append(f"weights of config.json that are not in the files ({len(missing)}): {_layers(missing)}")
    if left_over:
        problems.append(
            f"weights in the files that have no place in config.json ({len(left_over)}): {_layers(left_over)}"
        )
    if mismatched:
        key, file_shape, config_shape = mismatched[0]
        problems.append(
            f"weights of another shape ({len(mismatched)}): {key} has {list(file_shape)} in the files and "
            f"{list(config_shape)} by config.json"
        )
    if problems:
        raise ModelError(
            f"model.name: {name}: its weights are not those of its config.json: {'; '.join(problems)}. Download both "
            "again, or correct config.json"
        )


def _layers(names: list[str]) -> str:
    """The first three names, with those of one layer as one."""
    return some(sorted({re.sub(r"(\.\d+)\..*", r"\1.*", name) for name in names}))


def not_finite(model: PreTrainedModel) -> str | None:
    """The first weight of a loaded model with a NaN or an infinity; None if there is none, or it is in 4 bits."""
    import torch

    floating = [(name, value) for name, value in model.named_parameters() if value.is_floating_point()]
    if not floating:
        return None
    # A sum takes no memory beside the weight, and a NaN or an infinity stays in it.
    sums = torch.stack([value.detach().sum(dtype=torch.float32) for _, value in floating])
    for (name, value), fine in zip(floating, torch.isfinite(sums).tolist(), strict=True):
        if not fine and not bool(torch.isfinite(value).all()):
            return name
    return None


def raise_not_finite(name: str, weight: str) -> None:
    """Raise for a weight that is no number.

    Raises:
        ModelError: always.
    """
    raise ModelError(
        f"model.name: {name}: weight {weight} holds NaN or infinite values, so every loss would be NaN whatever the "
        "settings; use another copy of the model"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and tables of keys, whose content becomes one error."""
    import logging

    from transformers.utils import logging as of_transformers

    verbosity, bars = of_transformers.get_verbosity(), of_transformers.is_progress_bar_enabled()
    of_transformers.set_verbosity(logging.CRITICAL)
    of_transformers.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        of_transformers.set_verbosity(verbosity)
        if bars:
            of_transformers.enable_progress_bar()  # type: ignore[no-untyped-call]
