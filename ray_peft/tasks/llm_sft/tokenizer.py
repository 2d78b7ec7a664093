"""A trial's tokenizer, loaded and checked, with its new tokens and a chat template that works."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ray_peft.errors import DataError, ModelError, first_line
from ray_peft.spec import LlmTrialSpec, ModelSpec, is_local
from ray_peft.tasks.llm_sft.gguf_model import opened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def load_tokenizer(spec: LlmTrialSpec) -> PreTrainedTokenizerBase:
    """The tokenizer, with the new tokens and the chat template of the spec and padding on the left.

    Raises:
        ModelError: it cannot be loaded, has no usable chat template, or lacks a token that is needed.
        DataError: the file in data.chat_template is missing or no template.
    """
    name, tokenizer = opened(spec.model.tokenizer or spec.model.name), _grown(spec.model)
    if spec.data.chat_template is not None:
        tokenizer.chat_template = _template_text(Path(spec.data.chat_template))
    if any(source.recipe != "text" for source in spec.data.sources):
        _check_template(tokenizer, name, spec.data.chat_template)
    _check_tokens(tokenizer, name, [source.recipe for source in spec.data.sources])
    # Longer rows are cut and counted here; the tokenizer's own warning about them would come before that.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def new_token_ids(model: ModelSpec) -> list[int]:
    """The numbers of `model.new_tokens`, which a tokenizer gives in their order.

    Raises:
        ModelError: the tokenizer cannot be loaded, or has such a token.
    """
    if not model.new_tokens:
        return []
    return cast("list[int]", _grown(model).convert_tokens_to_ids(list(model.new_tokens)))


def _grown(model: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model with its new tokens.

    Raises:
        ModelError: it cannot be loaded, or has one of these tokens.
    """
    tokenizer = _read(model)
    vocabulary = tokenizer.get_vocab() if model.new_tokens else {}
    known = next((token for token in model.new_tokens if token in vocabulary), None)
    if known is not None:
        raise ModelError(
            f"model.new_tokens: {known} is token {vocabulary[known]} of the tokenizer already, with an embedding of "
            "its own; leave it out"
        )
    if model.new_tokens:
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in model.new_tokens])
    return tokenizer


def _read(model: ModelSpec) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    name = opened(model.tokenizer or model.name)
    if is_local(name) and not Path(name).is_dir():
        raise ModelError(f"model.{'tokenizer' if model.tokenizer else 'name'}: {name}: no such folder")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name,
            revision=model.revision if name == model.name else None,  # another repository has other commits
            trust_remote_code=model.trust_remote_code,
            padding_side="left",
        )
    except Exception as error:  # the hub client and tokenizers raise a dozen unrelated types
        reason = first_line(error)
        if is_local(name) and not (Path(name) / "tokenizer.json").exists():
            reason = f"it holds no tokenizer.json, and none can be made from its other files ({type(error).__name__})"
        way = "give a folder with its tokenizer's files, or name the tokenizer in model.tokenizer"
        raise ModelError(f"{name}: the tokenizer cannot be loaded: {reason}; {way}") from None
    return tokenizer


def _template_text(file: Path) -> str:
    """A template file as text: UTF-8, or UTF-16 with its byte order mark, as some editors save.

    Raises:
        DataError: it is missing, empty, or in another encoding.
    """
    if "{%" in str(file) or "{{" in str(file):
        raise DataError("data.chat_template: must be the path of a file; write this template into a .jinja file")
    if not file.is_file():
        problem = "is a folder; name a .jinja file" if file.is_dir() else "no such file"
        raise DataError(f"data.chat_template: {file}: {problem}")
    try:
        content = file.read_bytes()
        text = content.decode("utf-16" if content.startswith(_UTF16) else "utf-8-sig")
    except OSError as error:
        raise DataError(f"data.chat_template: {file}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.chat_template: {file}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    if "\0" in text:
        raise DataError(f"data.chat_template: {file}: holds NUL characters, so it is not UTF-8 text; save it as UTF-8")
    if not text.strip():
        raise DataError(f"data.chat_template: {file}: the file is empty; write a chat template in Jinja into it")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check_template(tokenizer: PreTrainedTokenizerBase, name: str, file: str | None) -> None:
    """Refuse a tokenizer whose conversations cannot be written, before a row is read.

    Raises:
        ModelError, DataError: no template, several without a default, or one that is not Jinja.
    """
    from jinja2 import TemplateSyntaxError

    template: object = tokenizer.chat_template
    if not template:
        raise ModelError(
            f"{name}: the tokenizer has no chat template, so conversations cannot be written for this model; "
            "use an instruction-tuned model, or name a .jinja file in data.chat_template"
        )
    if isinstance(template, dict) and "default" not in template:
        raise ModelError(
            f"{name}: the tokenizer has the chat templates {', '.join(sorted(map(str, template)))}, and none of them "
            "is named default; write the one that is meant into a .jinja file and name it in data.chat_template"
        )
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateSyntaxError as error:
        reason = f"the chat template is not valid Jinja: line {error.lineno}: {first_line(error.message)}"
        if file is not None:
            raise DataError(f"data.chat_template: {file}: {reason}") from None
        raise ModelError(f"{name}: {reason}; name a .jinja file that is in data.chat_template") from None
    except Exception:  # noqa: S110  # a template may refuse this conversation; that of a row says so with its place
        pass


def _check_tokens(tokenizer: PreTrainedTokenizerBase, name: str, recipes: list[str]) -> None:
    """Refuse a tokenizer that lacks what every row needs.

    Raises:
        ModelError: no token to pad with or to end plain text with, or no character offsets.
    """
    where = "set it in the tokenizer's tokenizer_config.json, or name another one in model.tokenizer"
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(
            f"{name}: the tokenizer has neither a pad_token nor an eos_token, so rows of different length cannot be "
            f"put into one batch; {where}"
        )
    if tokenizer.eos_token_id is None and "text" in recipes:
        raise ModelError(f"{name}: the tokenizer has no eos_token, which ends the rows of recipe text; {where}")
    if not tokenizer.is_fast and set(recipes) != {"text"}:
        raise ModelError(
            f"{name}: its tokenizer is written in Python and does not say which characters its tokens stand for, so "
            "answers cannot be told from questions; name one with a tokenizer.json in model.tokenizer"
        )
