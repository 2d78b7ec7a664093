"""How answers are decoded: by the trial's settings, not by the generation config that comes with a model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.spec import LlmTrialSpec, ModelSpec
from ray_peft.tasks.llm_sft.gguf_model import opened

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_OF_NO_EFFECT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version")
"""Settings that do not change which token is chosen. The ids that end an answer are used."""
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "max_length", "max_new_tokens")
"""Settings that most chat models have; the trial's `max_new_tokens` and greedy decoding replace them."""
_BESIDE_ANSWERS = ("use_cache", "cache_implementation", "output_attentions", "output_hidden_states")
"""Settings of what is cached or returned beside the tokens; transformers writes them for every model it saves."""
_NEUTRAL: dict[str, float] = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "repetition_penalty": 1, "length_penalty": 1,
    "encoder_repetition_penalty": 1, "diversity_penalty": 0, "min_length": 0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "epsilon_cutoff": 0, "eta_cutoff": 0, "guidance_scale": 1,
}  # fmt: skip
"""Default values, which change nothing; transformers 4 and earlier wrote them out."""


@dataclass(frozen=True)
class End:
    """What ends an answer in the training rows."""

    tokens: tuple[int, ...] = ()
    """Special tokens, each of which ends an answer; empty if there is none."""
    text: str | None = None
    """Plain text that ends an answer; None if there is none."""


def end_of_answers(spec: LlmTrialSpec, tokenizer: PreTrainedTokenizerBase) -> End:
    """What the chat template writes after an answer, and what the model therefore learns to write there.

    This may differ from the end-of-sequence token. A base model that is trained with another model's chat template
    learns to end an answer with that template's <|im_end|>; if this did not stop it, it would write on.
    """
    from ray_peft.tasks.llm_sft.turns import end_of_answer_tokens

    tokens = end_of_answer_tokens(tokenizer, spec.data.template_date)
    if not tokens:
        return End()
    if tokens[0] in tokenizer.all_special_ids or tokens[0] in _added(tokenizer):
        return End(tokens=(tokens[0],))
    text = str(tokenizer.decode(list(tokens))).strip()
    return End(text=text) if text else End()  # white space alone occurs inside answers, too


def _added(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the added tokens that are marked as special."""
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


@contextlib.contextmanager
def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end: End | None = None
) -> Iterator[GenerationConfig]:
    """Greedy decoding without the model's own generation config; yields a config that ends answers at `stop_tokens`.

    `generate` takes what a config leaves open from the model's generation config. So that one is replaced, too, and put
    back afterwards.

    Args:
        model: adapted or not.
        tokenizer: of the model.
        end: what else ends an answer; its `text` is not used here, the caller must set it.
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
    """The tokens that end an answer, sorted: those of the model, of the tokenizer and of the training rows."""
    own = getattr(_generating(model), "generation_config", None)
    ids = getattr(own, "eos_token_id", None)
    known = (*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id, *end.tokens)
    return sorted({token for token in known if token is not None})


def unused_settings(model: ModelSpec) -> list[str]:
    """Names of the settings in a model's generation config that would change greedy answers; they are not used.

    Empty for a generation config that is missing or cannot be read: it is not needed.
    """
    settings = written_settings(opened(model.name), model.revision)
    ignored = (*_OF_NO_EFFECT, *_SAMPLING, *_BESIDE_ANSWERS)
    return sorted(
        name
        for name, value in settings.items()
        if name not in ignored and not name.startswith("_") and value not in (None, False, [], _NEUTRAL.get(name))
    )


def cautions(model: ModelSpec) -> list[str]:
    """At most one sentence: the settings of the model that are not used."""
    unused = unused_settings(model)
    return (
        [f"{model.name} sets {', '.join(unused)} for its answers, which are not used: answers are greedy"]
        if unused
        else []
    )


def in_place_of_invalid(folder: str, revision: str | None) -> GenerationConfig | None:
    """A generation config in place of one that transformers refuses to load; None if it accepts the model's own.

    It refuses, for example, several answers to a prompt without sampling. The ids that end an answer are copied.
    """
    from transformers import GenerationConfig

    settings = written_settings(folder, revision)
    try:
        GenerationConfig.from_dict(settings).validate()
    except (ValueError, TypeError, AttributeError):
        return GenerationConfig(  # type: ignore[no-untyped-call]
            **{name: settings[name] for name in _OF_NO_EFFECT[:3] if name in settings}
        )
    return None


def written_settings(name: str, revision: str | None) -> dict[str, Any]:
    """The content of a model's generation_config.json; empty if the file is missing or cannot be read."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(name, "generation_config.json", revision=revision)
        settings = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except Exception:  # the hub client raises a dozen unrelated types, and nothing depends on this file
        return {}
    return settings if isinstance(settings, dict) else {}


def _generating(model: PreTrainedModel) -> Any:
    """The model whose generation config `generate` reads: the base, if the model is adapted."""
    adapted: Any = model
    return adapted.get_base_model() if hasattr(model, "get_base_model") else model
