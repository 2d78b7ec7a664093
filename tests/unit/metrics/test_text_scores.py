"""BLEU-4 and ROUGE-L: numbers worked out by hand, equality with Hugging Face evaluate, and the edges."""

import math
import random
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from ray_peft.metrics.text_scores import (
    bleu4,
    bleu4_from_statistics,
    bleu_row_statistics,
    rouge_l,
    rouge_l_rows,
)

PREDICTION = "the cat sat on the mat"
REFERENCE = "the cat sat on the red mat"

ODD_TOKENS = [
    *["the", "cat", "The", "e.g.", "3.14", "1,000", "10-20", "-", "--", "-\n", "\n", "\n\n", "\r\n", "\t", " ", ""],
    *[
        "well-\nknown",
        "&quot;",
        "&amp;lt;",
        "<skipped>",
        "don't",
        "(a)",
        "a/b",
        "...",
        ",",
        ".",
        "3.",
        ".5",
        "né",
        "猫",
    ],
    *["\u00a0", "\u2028", "\x0b", "\x1c", "🙂", "{x}", "[y]", "`z`", "a_b", "50%", "$5", "A&B", "!", "?!", ":", ";"],
]


def nmt_bleu(predictions: list[str], references: list[list[str]]) -> float:
    """BLEU as evaluate's `bleu` computes it (tensorflow/nmt compute_bleu), written again from its definition."""
    tokenize = Tokenizer13a()
    hypotheses = [tokenize(text).split() for text in predictions]
    answers = [[tokenize(text).split() for text in texts] for texts in references]
    precisions = []
    for order in (1, 2, 3, 4):
        matches = possible = 0
        for hypothesis, several in zip(hypotheses, answers, strict=True):
            found = windows(hypothesis, order)
            matches += sum(min(found.count(w), max(windows(a, order).count(w) for a in several)) for w in set(found))
            possible += len(found)
        precisions.append(matches / possible if possible else 0.0)
    geometric_mean = math.prod(precisions) ** 0.25
    ratio = sum(map(len, hypotheses)) / sum(min(map(len, several)) for several in answers)
    return geometric_mean * (1.0 if ratio > 1.0 else math.exp(1.0 - 1.0 / ratio))


def windows(tokens: list[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]


def odd_text(rng: random.Random) -> str:
    return rng.choice([" ", "", "  "]).join(rng.choices(ODD_TOKENS, k=rng.randrange(14)))


def near_copy(text: str, rng: random.Random) -> str:
    """`text` with some characters lost and some text added, so that 4-grams match often but not always."""
    kept = "".join(c for c in text if rng.random() > 0.03)
    return kept + (odd_text(rng) if rng.random() < 0.3 else "")


def test_bleu4_of_one_row_worked_by_hand():
    # 6 of 6, 4 of 5, 3 of 4 and 2 of 3 n-grams match; 6 tokens against 7.
    assert bleu4([PREDICTION], [REFERENCE]) == pytest.approx(0.4**0.25 * math.exp(1 - 7 / 6), abs=1e-15)


def test_row_statistics_worked_by_hand():
    rows = bleu_row_statistics([PREDICTION, "the the", ""], [REFERENCE, "the", "a b c d e"])
    assert rows.tolist() == [
        [6, 4, 3, 2, 6, 5, 4, 3, 6, 7],
        [1, 0, 0, 0, 2, 1, 0, 0, 2, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 5],
    ]
    assert rows.dtype == np.int64


def test_corpus_bleu4_pools_counts_before_dividing():
    # 10 of 11, 7 of 9, 5 of 7 and 3 of 5 n-grams match over both rows; 11 tokens against 12.
    predictions, references = [PREDICTION, "a b c d x"], [REFERENCE, "a b c d e"]
    expected = (10 / 11 * 7 / 9 * 5 / 7 * 3 / 5) ** 0.25 * math.exp(1 - 12 / 11)
    assert bleu4(predictions, references) == pytest.approx(expected, abs=1e-15)


def test_bleu4_of_a_copy_is_exactly_one():
    assert bleu4([REFERENCE, "x y"], [REFERENCE, "x y"]) == 1.0


def test_bleu4_has_no_penalty_for_length():
    assert bleu4(["a b c d e"], ["a b c d"]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, abs=1e-15)


def test_bleu4_equals_evaluate_on_random_corpora():
    rng = random.Random(0)
    compared = positive = 0
    for _ in range(500):
        references = [odd_text(rng) for _ in range(rng.randrange(1, 8))]
        predictions = [near_copy(text, rng) for text in references]
        try:
            expected = nmt_bleu(predictions, [[text] for text in references])
        except ZeroDivisionError:
            assert bleu4(predictions, references) == 0.0
            continue
        assert bleu4(predictions, references) == pytest.approx(expected, abs=1e-12)
        compared += 1
        positive += expected > 0
    assert compared > 400
    assert positive > 250


def test_bleu4_equals_evaluate_with_several_references():
    rng = random.Random(1)
    positive = 0
    for _ in range(200):
        sources = [odd_text(rng) + " the cat sat" for _ in range(rng.randrange(1, 6))]
        references = [[near_copy(text, rng) for _ in range(rng.randrange(1, 4))] for text in sources]
        predictions = [near_copy(text, rng) for text in sources]
        expected = nmt_bleu(predictions, references)
        assert bleu4(predictions, references) == pytest.approx(expected, abs=1e-12)
        positive += expected > 0
    assert positive > 100


def test_bleu4_equals_sacrebleu_on_one_line_texts():
    rng = random.Random(2)
    for _ in range(100):
        references = [" ".join(odd_text(rng).split()) for _ in range(rng.randrange(1, 8))]
        predictions = [" ".join(near_copy(text, rng).split()) for text in references]
        expected = sacrebleu.corpus_bleu(predictions, [references], smooth_method="none", force=True).score / 100
        assert bleu4(predictions, references) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("end", ["-\n", "\n", "\n\n\n", " -\n", "-\n\n", "\r\n", " \n ", "-"])
def test_bleu4_treats_the_end_of_a_text_as_evaluate_does(end):
    predictions, references = ["a b c d e" + end, "a b c d f"], ["a b c d e", "a b c d f" + end]
    expected = nmt_bleu(predictions, [[text] for text in references])
    assert bleu4(predictions, references) == pytest.approx(expected, abs=1e-15)


def test_a_dash_before_the_last_line_break_is_removed():
    assert bleu4(["a b c d e-\n"], ["a b c d e"]) == 1.0
    assert sacrebleu.corpus_bleu(["a b c d e-\n"], [["a b c d e"]], smooth_method="none").score < 100


def test_bleu4_is_zero_where_evaluate_divides_by_zero():
    for predictions, references in [(["", " \n"], ["a b c d", "e"]), (["a b c d"], [""]), ([""], [""])]:
        with pytest.raises(ZeroDivisionError):
            nmt_bleu(predictions, [[text] for text in references])
        assert bleu4(predictions, references) == 0.0


def test_bleu4_is_zero_below_four_tokens():
    assert bleu4(["a b c"], ["a b c"]) == 0.0


def test_the_shortest_of_several_references_sets_the_length():
    # The closest reference, which sacrebleu would take, has 6 tokens.
    assert bleu_row_statistics(["a b c d e"], [["a b c d e f", "a b"]])[0, -1] == 2


def test_scores_of_many_corpora_at_once():
    first = bleu_row_statistics([PREDICTION], [REFERENCE])[0]
    corpora = np.stack([[first, np.zeros_like(first)], [first * 3, first]])
    score = bleu4([PREDICTION], [REFERENCE])
    assert bleu4_from_statistics(corpora).tolist() == [[score, 0.0], [score, score]]


def test_rouge_l_worked_by_hand():
    # The longest common subsequence has 6 tokens: precision 6/6, recall 6/7.
    assert rouge_l_rows([PREDICTION], [REFERENCE]) == [pytest.approx(12 / 13, abs=1e-15)]
    assert rouge_l([PREDICTION, "nothing"], [REFERENCE, "common"]) == pytest.approx(6 / 13, abs=1e-15)


def test_rouge_l_does_not_stem_or_heed_case():
    assert rouge_l_rows(["Cats", "CAT"], ["cat", "cat"]) == [0.0, 1.0]


def test_rouge_l_equals_the_mean_of_rouge_score():
    rng = random.Random(3)
    references = [odd_text(rng) for _ in range(200)]
    predictions = [near_copy(text, rng) for text in references]
    scorer = RougeScorer(["rougeL"])
    expected = [scorer.score(r, p)["rougeL"].fmeasure for r, p in zip(references, predictions, strict=True)]
    assert rouge_l_rows(predictions, references) == expected
    assert rouge_l(predictions, references) == pytest.approx(sum(expected) / 200, abs=1e-12)
    assert rouge_l(predictions, references) == rouge_l(predictions, references)


def test_rouge_l_of_empty_texts_is_zero():
    assert rouge_l_rows(["", "a", "", "?"], ["a", "", "", "!"]) == [0.0] * 4


def test_rouge_l_takes_the_best_of_several_references():
    assert rouge_l_rows([PREDICTION], [["nothing", REFERENCE]]) == rouge_l_rows([PREDICTION], [REFERENCE])


@pytest.mark.parametrize("score", [bleu4, bleu_row_statistics, rouge_l, rouge_l_rows])
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "at least one row, found none"),
        (["a", "b"], ["a"], "2 != 1"),
        (["a", "b"], ["a", []], "row 1 has none"),
        ("ab", ["a", "b"], "single string"),
        (["a", "b"], "ab", "single string"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(score, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        score(predictions, references)


def test_the_package_imports_without_evaluate():
    code = "import sys, ray_peft.metrics, ray_peft.metrics.text_scores, ray_peft.metrics.intervals; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"evaluate", "datasets", "transformers", "torch", "sacrebleu", "rouge_score", "scipy"} & set(loaded)
