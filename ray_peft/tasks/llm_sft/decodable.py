"""Which models may answer prompts in lanes (continuous.py): those whose scores stay the same there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray_peft.methods.new_tokens import NOT_RECORDED, trains_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ray_peft.tasks.llm_sft.continuous import Voice

TRIED_TOKENS = (9, 6)
"""Most tokens of each of the two prompts that a model is tried on."""
TRIED_STEPS = 2
_ROUNDING = {True: 1e-4, False: 5e-2}
"""Largest allowed difference of scores, relative to the largest score: in float32 throughout (True) or not."""

EIGHT_BITS = "its base in 8 bits looks for outliers in all rows of a pass"
"""Why nothing is recorded, or put into lanes: LLM.int8() waits for the GPU to find the outliers."""

VIRTUAL_TOKENS = "virtual tokens are put before each row"
"""Why rows and prompts cannot lie in lanes: PEFT's wrapper adds these tokens, and lanes call the model inside it."""

_equal: set[str] = set()
"""Keys of the kinds of models whose scores were found equal in this process."""


def why_not(voice: Voice, prompts: Sequence[Sequence[int]], pad: int, dtype: Any) -> str | None:
    """Why a model must answer with its own `generate`; None if lanes give the same answers.

    Compares the scores of two short prompts both ways, once in a process for every kind of model.

    Args:
        voice: the model, in the mode and under the autocast in which it answers.
        prompts: token ids.
        pad: the padding token.
        dtype: of attention masks.

    Raises:
        torch.OutOfMemoryError: memory ran out.
    """
    if not all(prompts):
        return "a prompt is empty"
    reason = by_config(voice.model)
    if reason is not None:
        return reason
    model: Any = voice.model
    settings = model.config.to_json_string(), model.config._attn_implementation
    key = repr((type(model), *settings, model.device.type, dtype))
    if key not in _equal:
        reason = _by_trial(voice, prompts, pad, dtype)
        if reason is not None:
            return reason
        _equal.add(key)
    return None


def has_virtual_tokens(model: PreTrainedModel) -> bool:
    """Whether a model is PEFT's wrapper around one, which puts trained tokens before each row."""
    configs: Any = model.peft_config if hasattr(model, "peft_config") else {}
    return any(config.is_prompt_learning for config in configs.values())


def never_recorded(model: PreTrainedModel) -> str | None:
    """Why no pass of a model can be recorded, or have rows in lanes; None if its base and its adapter give no reason.

    Args:
        model: with its adapter, in PEFT's wrapper or without it.
    """
    if getattr(model, "is_loaded_in_8bit", False):
        return EIGHT_BITS
    if has_virtual_tokens(model):
        return VIRTUAL_TOKENS
    return NOT_RECORDED if trains_rows(model) else None


def by_config(model: PreTrainedModel) -> str | None:
    """Why a model cannot answer in lanes, by its config; None if the config gives no reason."""
    config: Any = model.config.get_text_config()
    reason = never_recorded(model)
    if reason is not None:
        return reason
    if not type(model).__module__.startswith("transformers."):
        return "its code is not part of transformers"
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if not getattr(model, "_can_compile_fullgraph", False):
        return "transformers has no static cache for it"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its layers share keys and values"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention is {config._attn_implementation}"
    by_length = _rope_types(getattr(config, "rope_parameters", None)) & {"dynamic", "longrope"}
    if by_length:
        return f"its positions ({', '.join(by_length)}) depend on the longest row of a batch"
    return None


def _rope_types(settings: Any) -> set[str]:
    """The kinds of rotary positions in a config, over all kinds of layers."""
    if not isinstance(settings, dict):
        return set()
    inner = [_rope_types(value) for value in settings.values()]
    return set().union({str(settings.get("rope_type", "default"))}, *inner)


def _by_trial(voice: Voice, prompts: Sequence[Sequence[int]], pad: int, dtype: Any) -> str | None:
    import torch

    from ray_peft.engine.recovery import is_out_of_memory
    from ray_peft.tasks.llm_sft.continuous import Ends, Lanes, Voice

    model: Any = voice.model
    device = model.device
    tried = [list(prompt[:most]) for prompt, most in zip((prompts[0], prompts[-1]), TRIED_TOKENS, strict=True)]
    longest = max(map(len, tried))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in tried], device=device)
    lengths = torch.tensor([len(prompt) for prompt in tried], device=device)
    exact = dtype == torch.float32 and not getattr(model, "is_loaded_in_4bit", False)
    try:
        alone = Voice(model, voice.at_work)
        lanes = Lanes([alone], 2, longest + TRIED_STEPS + 9, Ends(TRIED_STEPS + 1, ()), dtype)
        scores = [lanes.read(ids, lengths, torch.arange(2, device=device))]
        scores += [lanes.add(2, longest + TRIED_STEPS + 5) for _ in range(TRIED_STEPS)]
        for place, prompt in enumerate(tried):
            whole = torch.tensor([[*prompt, *lanes.answers[place].tolist()[:TRIED_STEPS]]], device=device)
            with voice.at_work():
                expected = model(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 :].float()
            ours = torch.stack([step[place] for step in scores])
            difference = float((expected - ours).abs().max() / expected.abs().max().clamp(min=1e-3))
            if not difference <= _ROUNDING[exact]:
                return f"its scores would differ by {difference:.2g} of the largest ({dtype})"
    except Exception as error:  # of a model's own code
        if is_out_of_memory(error):
            raise
        return f"it does not take a prompt in a lane ({type(error).__name__})"
    return None
