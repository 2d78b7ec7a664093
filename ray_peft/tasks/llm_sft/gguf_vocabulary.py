"""A tokenizer as metadata of a GGUF file, from its tokenizer.json: BPE over bytes (Llama 3, Qwen), or SentencePiece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.errors import SpecError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Kinds of tokens, as `gguf.TokenType` numbers them."""

_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
"""llama.cpp's names for regular expressions that split text before its bytes are merged."""


def add_vocabulary(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write tokens, merges, special tokens and the chat template.

    Args:
        writer: of the file.
        folder: with tokenizer.json, tokenizer_config.json and config.json.
        vocab_size: rows of the embedding, which may be more than there are tokens.

    Raises:
        SpecError: GGUF has no name for such a tokenizer.
    """
    from gguf import SpecialVocab

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise SpecError("its tokenizer has no tokenizer.json, from which GGUF's vocabulary is made")
    plain = json.loads(path.read_text(encoding="utf-8"))
    model = plain["model"]
    if model.get("type") != "BPE":
        raise SpecError(f"its tokenizer is of the kind {model.get('type')}, and BPE alone is written to GGUF")
    tokens, kinds = _tokens(plain, vocab_size)
    sentence_piece = bool(model.get("byte_fallback"))
    if sentence_piece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        # SentencePiece merges the pair whose token has the greatest score: a BPE vocabulary is in the order of merging.
        writer.add_token_scores([-float(number) for number in range(len(tokens))])
        writer.add_add_space_prefix(_prepends_space(plain))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(plain))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    SpecialVocab(folder, load_merges=not sentence_piece, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def _tokens(plain: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Every token by its id, with its kind; ids without a token are padding."""
    vocabulary: dict[str, int] = plain["model"]["vocab"]
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [_UNUSED] * vocab_size
    fallback = bool(plain["model"].get("byte_fallback"))
    for token, number in vocabulary.items():
        if number < vocab_size:
            is_byte = fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            tokens[number], kinds[number] = token, _BYTE if is_byte else _NORMAL
    for added in plain.get("added_tokens", []):
        number, token = int(added["id"]), str(added["content"])
        if number >= vocab_size:
            raise SpecError(f"its token {token!r} has the id {number}, and the model has {vocab_size} only")
        is_unknown = token == plain["model"].get("unk_token")
        special = _UNKNOWN if is_unknown and fallback else _CONTROL
        tokens[number], kinds[number] = token, special if added.get("special") else _USER_DEFINED
    return tokens, kinds


def _split_name(plain: dict[str, Any]) -> str:
    """llama.cpp's name of how the tokenizer splits text before it merges bytes.

    Raises:
        SpecError: it has none that is known here.
    """
    splitter = plain.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    pattern = steps[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    if pattern in _SPLITS:
        return _SPLITS[pattern]
    raise SpecError(
        f"its tokenizer splits text by {', '.join(map(str, kinds)) or 'nothing'}"
        f"{f' ({pattern})' if pattern else ''}, for which GGUF's name is not known here"
    )


def _prepends_space(plain: dict[str, Any]) -> bool:
    """Whether a text gets a space before its first word."""
    text = json.dumps([plain.get("normalizer"), plain.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "always"' in text or '"prepend_scheme": "first"' in text
