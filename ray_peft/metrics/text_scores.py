"""Corpus BLEU-4, chrF and ROUGE-L of texts, with what each row adds to them."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import chain
from statistics import fmean
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ray_peft.metrics.scripts import BLEU_TOKENIZERS, RougeTokenizer, rouge_words, tokenizers, words

ORDERS = 4
"""BLEU-4 counts n-grams of 1 to 4 tokens."""

_ORDERS = range(1, ORDERS + 1)

BLEU_COLUMNS = 2 * ORDERS + 2
"""Columns of a BLEU statistics array: 4 matches, 4 totals, hypothesis length, reference length."""

Reference: TypeAlias = str | Sequence[str]
"""One reference text of a prediction, or several."""


def bleu4(predictions: Sequence[str], references: Sequence[Reference], tokenizer: str | None = None) -> float:
    """Corpus BLEU-4 in [0, 1], without smoothing; on Latin text equal to `bleu` of Hugging Face evaluate.

    Where evaluate divides by zero (every prediction, or every reference, has no token) the score is 0.

    Args:
        predictions: one text a row.
        references: one text, or several, a row.
        tokenizer: as `bleu_row_statistics` takes it.

    Raises:
        ValueError: no rows, unequal numbers of rows, a row without a reference, or an unknown tokenizer.

    Source: Papineni et al. 2002, ACL, P02-1040.
    """
    return float(bleu4_from_statistics(bleu_row_statistics(predictions, references, tokenizer).sum(axis=0)))


def bleu_row_statistics(
    predictions: Sequence[str], references: Sequence[Reference], tokenizer: str | None = None
) -> NDArray[np.int64]:
    """What each row adds to corpus BLEU-4; the sum over rows is all that the score depends on.

    With several references, a match may come from any of them, and the length is that of the shortest (as in evaluate;
    sacrebleu takes the closest).

    Args:
        predictions: one text a row.
        references: one text, or several, a row.
        tokenizer: of sacrebleu, one of `scripts.BLEU_TOKENIZERS`; None takes the one that suits all references.

    Returns:
        (row, 10) int64: matches of 1- to 4-grams, 1- to 4-grams in the prediction, tokens in the prediction, tokens in
        the reference.

    Raises:
        ValueError: no rows, unequal numbers of rows, a row without a reference, or an unknown tokenizer.
    """
    pairs = list(row_pairs(predictions, references))
    name = tokenizer or tokenizers(chain.from_iterable(texts for _, texts in pairs)).bleu
    tokenize = _tokenizer(name)
    rows = [_row_statistics(tokenize(prediction).split(), texts, name) for prediction, texts in pairs]
    return np.array(rows, dtype=np.int64)


def bleu4_from_statistics(statistics: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
    """BLEU-4 in [0, 1] of corpora given by their summed statistics.

    Args:
        statistics: (..., 10), sums over rows of `bleu_row_statistics`.

    Returns:
        (...) float64; 0 where some order has no match.
    """
    matches = np.asarray(statistics[..., :ORDERS], dtype=np.float64)
    totals = np.asarray(statistics[..., ORDERS : 2 * ORDERS], dtype=np.float64)
    hypothesis_length, reference_length = statistics[..., -2], statistics[..., -1]
    # A match in every order implies that no divisor is zero.
    defined = matches.min(axis=-1) > 0
    precisions = np.divide(matches, totals, out=np.ones_like(matches), where=defined[..., None])
    length_ratio = np.divide(reference_length, hypothesis_length, out=np.ones(defined.shape), where=defined)
    log_brevity_penalty = np.minimum(0.0, 1.0 - length_ratio)
    return np.where(defined, np.exp(np.log(precisions).mean(axis=-1) + log_brevity_penalty), 0.0)


def rouge_l(
    predictions: Sequence[str], references: Sequence[Reference], tokenizer: RougeTokenizer | None = None
) -> float:
    """Mean over rows of the ROUGE-L f-measure, in [0, 1], without stemming.

    This is the plain mean. `rouge` of Hugging Face evaluate reports the median of a bootstrap instead, which lies near
    the mean and depends on numpy's global seed.

    Args:
        predictions: one text a row.
        references: one text, or several, a row.
        tokenizer: as `rouge_l_rows` takes it.

    Raises:
        ValueError: no rows, unequal numbers of rows, or a row without a reference.

    Source: Lin 2004, ACL workshop "Text Summarization Branches Out", W04-1013.
    """
    return fmean(rouge_l_rows(predictions, references, tokenizer))


def rouge_l_rows(
    predictions: Sequence[str], references: Sequence[Reference], tokenizer: RougeTokenizer | None = None
) -> list[float]:
    """ROUGE-L f-measure of each row, in [0, 1], without stemming; with several references, that of the best one.

    Args:
        predictions: one text a row.
        references: one text, or several, a row.
        tokenizer: `rouge_score` equals the package of that name, but for rows in other scripts (`scripts.rouge_words`);
            `unicode` takes words of Unicode in all rows; None takes the one that suits all references.

    Raises:
        ValueError: no rows, unequal numbers of rows, or a row without a reference.
    """
    pairs = list(row_pairs(predictions, references))
    name = tokenizer or tokenizers(chain.from_iterable(texts for _, texts in pairs)).rouge
    return [max(_rouge_l(prediction, text, name) for text in texts) for prediction, texts in pairs]


def _rouge_l(prediction: str, reference: str, tokenizer: RougeTokenizer) -> float:
    from rouge_score.tokenize import tokenize

    if rouge_words(reference, tokenizer):
        return _rouge_l_of_tokens(words(reference), words(prediction))
    return _rouge_l_of_tokens(tokenize(reference, None), tokenize(prediction, None))


def _rouge_l_of_tokens(reference: list[str], prediction: list[str]) -> float:
    """F-measure of the longest common subsequence, in the same arithmetic as rouge_score."""
    if not reference or not prediction:
        return 0.0
    common = _common_subsequence(reference, prediction)
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def _common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence.

    A column of the usual table is one whole number with a bit for each token of `first`: hundreds of times faster than
    rouge_score's own loops, which take minutes for the answers of a sweep. Source: Hyyro 2004, "Bit-parallel LCS-length
    computation revisited", AWOCA.
    """
    places: dict[str, int] = {}
    for index, token in enumerate(first):
        places[token] = places.get(token, 0) | (1 << index)
    everywhere = (1 << len(first)) - 1
    column = everywhere
    for token in second:
        matches = column & places.get(token, 0)
        column = ((column + matches) | (column - matches)) & everywhere
    return len(first) - column.bit_count()


def row_pairs(predictions: Sequence[str], references: Sequence[Reference]) -> Iterator[tuple[str, Sequence[str]]]:
    """Each prediction with its references, checked before the first is handed out."""
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError("predictions and references must be lists with one entry a row, found a single string")
    if len(predictions) != len(references):
        raise ValueError(f"every row needs a prediction and a reference: {len(predictions)} != {len(references)}")
    if not predictions:
        raise ValueError("a score needs at least one row, found none")
    several = [[entry] if isinstance(entry, str) else entry for entry in references]
    for row, texts in enumerate(several):
        if not texts:
            raise ValueError(f"every row needs at least one reference, row {row} has none")
    return zip(predictions, several, strict=True)


@lru_cache(maxsize=1024)  # the trials of a sweep answer the same rows
def _reference_counts(reference: str, tokenizer: str) -> tuple[Counter[tuple[str, ...]], int]:
    """N-grams and tokens of a reference; not to be changed."""
    tokens = _tokenizer(tokenizer)(reference).split()
    return _ngrams(tokens), len(tokens)


@cache
def _tokenizer(name: str) -> Callable[[str], str]:
    from sacrebleu.metrics.bleu import _get_tokenizer

    if name not in BLEU_TOKENIZERS:
        raise ValueError(f"tokenizer must be one of {', '.join(BLEU_TOKENIZERS)}, found {name}")
    # The tokenizer is called on the raw text, as evaluate does. sacrebleu.corpus_bleu strips the right end of the line
    # first, which keeps the dash of a text ending in "-\n" and changes the score (sacrebleu 2.6.0).
    tokenizer: Callable[[str], str] = _get_tokenizer(name)()
    return tokenizer


def _row_statistics(prediction: list[str], references: Sequence[str], tokenizer: str) -> list[int]:
    counted = [_reference_counts(reference, tokenizer) for reference in references]
    expected = counted[0][0]
    for more, _ in counted[1:]:
        expected = expected | more
    predicted = _ngrams(prediction)
    matches = [0] * ORDERS
    for ngram in predicted.keys() & expected.keys():
        matches[len(ngram) - 1] += min(predicted[ngram], expected[ngram])
    totals = [max(0, len(prediction) - order) for order in range(ORDERS)]
    return [*matches, *totals, len(prediction), min(length for _, length in counted)]


def _ngrams(tokens: list[str]) -> Counter[tuple[str, ...]]:
    """How often each n-gram of 1 to 4 tokens occurs."""
    return Counter(
        chain.from_iterable(zip(*(tokens[start:] for start in range(order)), strict=False) for order in _ORDERS)
    )
