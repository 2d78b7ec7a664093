"""How answers are decoded: as the trial says, whatever generation settings a model brings along."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.spec import LlmTrialSpec, ModelSpec

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_OF_NO_EFFECT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version")
"""Settings that do not change which token is chosen, and the ids that end an answer, which are used."""
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "max_length", "max_new_tokens")
"""Settings that nearly every chat model brings along; the trial's `max_new_tokens` and greedy decoding replace them."""
_BESIDE_ANSWERS = ("use_cache", "cache_implementation", "output_attentions", "output_hidden_states")
"""What is computed or handed back beside the tokens: transformers writes it into every model that it saves."""
_NEUTRAL: dict[str, float] = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "repetition_penalty": 1, "length_penalty": 1,
    "encoder_repetition_penalty": 1, "diversity_penalty": 0, "min_length": 0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "epsilon_cutoff": 0, "eta_cutoff": 0, "guidance_scale": 1,
}  # fmt: skip
"""Values that transformers 4 and earlier wrote out though they are the defaults, and change nothing."""


@dataclass(frozen=True)
class End:
    """What ends an answer in the training rows."""

    tokens: tuple[int, ...] = ()
    """Special tokens, each of which ends an answer; empty if there is none."""
    text: str | None = None
    """Plain text that does; None if there is none."""


def end_of_answers(spec: LlmTrialSpec, tokenizer: PreTrainedTokenizerBase) -> End:
    """What the chat template writes behind an answer, which the model learns to write there.

    It need be none of the end-of-sequence tokens: a base model with a chat template of somebody else's learns to end
    with that template's <|im_end|>, and would write on behind it.
    """
    from ray_peft.tasks.llm_sft.turns import end_of_answer_tokens

    tokens = end_of_answer_tokens(tokenizer, spec.data.template_date)
    if not tokens:
        return End()
    if tokens[0] in tokenizer.all_special_ids or tokens[0] in _added(tokenizer):
        return End(tokens=(tokens[0],))
    text = str(tokenizer.decode(list(tokens))).strip()
    return End(text=text) if text else End()  # white space alone stands inside of answers, too


def _added(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Added tokens that are special, whatever their role."""
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


@contextlib.contextmanager
def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end: End | None = None
) -> Iterator[GenerationConfig]:
    """Greedy decoding without any setting of the model's own; yields the config, which ends answers at `stop_tokens`.

    `generate` fills what a config leaves open from the model's own generation config, so that is replaced, too; the
    model has it back afterwards.

    Args:
        model: adapted or not.
        tokenizer: of the model.
        end: what ends an answer beside its end-of-sequence tokens; of it, text is left to the caller.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=stop_tokens(model, tokenizer, end or End()),
        pad_token_id=tokenizer.pad_token_id,
    )
    owner = _generating(model)
    own = owner.generation_config
    owner.generation_config = config
    try:
        yield config
    finally:
        owner.generation_config = own


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end: End) -> list[int]:
    """The tokens each of which ends an answer, sorted: of the model, of the tokenizer, and of the training rows."""
    own = getattr(_generating(model), "generation_config", None)
    ids = getattr(own, "eos_token_id", None)
    known = (*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id, *end.tokens)
    return sorted({token for token in known if token is not None})


def unused_settings(model: ModelSpec) -> list[str]:
    """Names of the settings in a model's generation config that would change greedy answers, and are not used.

    An absent or unreadable generation config has none: it is not needed.
    """
    settings = _written(model.name, model.revision)
    unsaid = (*_OF_NO_EFFECT, *_SAMPLING, *_BESIDE_ANSWERS)
    return sorted(
        name
        for name, value in settings.items()
        if name not in unsaid and not name.startswith("_") and value not in (None, False, [], _NEUTRAL.get(name))
    )


def cautions(model: ModelSpec) -> list[str]:
    """What is said of them, at most one sentence."""
    unused = unused_settings(model)
    return (
        [f"{model.name} sets {', '.join(unused)} for its answers, which are not used: answers are greedy"]
        if unused
        else []
    )


def in_place_of_invalid(folder: str, revision: str | None) -> GenerationConfig | None:
    """What a model is given in place of a generation config that transformers refuses to load; None if it does not.

    Such as one with several answers a prompt without sampling. The ids that end an answer are taken over.
    """
    from transformers import GenerationConfig

    settings = _written(folder, revision)
    try:
        GenerationConfig.from_dict(settings).validate()
    except (ValueError, TypeError, AttributeError):
        return GenerationConfig(  # type: ignore[no-untyped-call]
            **{name: settings[name] for name in _OF_NO_EFFECT[:3] if name in settings}
        )
    return None


def _written(name: str, revision: str | None) -> dict[str, Any]:
    """A model's generation_config.json; empty where there is none, or none that can be read."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(name, "generation_config.json", revision=revision)
        settings = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except Exception:  # the hub client raises a dozen unrelated types, and nothing depends on this file
        return {}
    return settings if isinstance(settings, dict) else {}


def _generating(model: PreTrainedModel) -> Any:
    """The model whose generation config `generate` reads: of an adapted model, its base."""
    adapted: Any = model
    return adapted.get_base_model() if hasattr(model, "get_base_model") else model
