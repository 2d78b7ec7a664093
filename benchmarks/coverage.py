"""How often intervals hold the true difference, and how often equal systems are told apart: no model, a CPU, a minute.

    python benchmarks/coverage.py benchmarks/results/coverage.json

A population of 500 held-out rows is drawn once for each kind of score; its own difference is the truth. Test sets are
drawn from it with replacement. For coverage, the interval of the package stands beside the percentile bootstrap that it
replaced. For false differences, several systems are made equal by dealing out each row's scores at random, and a
comparison of all pairs counts as false if it shows any difference.

A negative result stands beside them: of gains that are rare and large (`skewed`) small test sets say too little, since
most hold hardly any of them; the shares of intervals that lie below and above the truth are given, too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from provenance import write

from ray_peft.metrics.intervals import bleu4_parts, compare, interval, mean_parts
from ray_peft.metrics.text_scores import bleu_row_statistics

POPULATION = 500
ROWS = (8, 12, 16, 30, 50, 100, 200)
SAMPLES = 2000
"""Test sets for each coverage; its standard error is 0.005."""
BOOTSTRAPPED = 4
"""One in so many test sets is resampled, which takes the longest."""
FAMILIES = 400
"""Comparisons for each rate of false differences; its standard error is 0.011 at 5 %."""
FAMILY_ROWS = (8, 16, 50, 200)
SYSTEMS = 5
WORDS = [f"w{number}" for number in range(40)]

Numbers = NDArray[np.float64]
Generator = np.random.Generator


def main(out: Path) -> None:
    """Measure, print and write."""
    start = time.perf_counter()
    coverages = {name: coverage(make(np.random.default_rng(1))) for name, make in DIFFERENCES.items()}
    coverages["bleu4"] = bleu_coverage(np.random.default_rng(2))
    rare = skewed(np.random.default_rng(1))
    negative = {"rare large gains": coverage(rare, sides=True)}
    false = {
        f"{name}, {systems} systems": false_differences(make(np.random.default_rng(3), systems))
        for name, make in SCORES.items()
        for systems in (2, SYSTEMS)
    }
    for title, found in {**coverages, **negative, **false}.items():
        print(f"{title:30}", *(f"{key}: {value}" for key, value in found.items()))
    print(f"{time.perf_counter() - start:.0f} s")
    write(out, {
        "population": POPULATION, "samples": SAMPLES, "families": FAMILIES, "coverage": coverages,
        "negative": negative, "rare_share": RARE, "rare_skewness": skewness(rare[:, 0] - rare[:, 1]),
        "false_differences": false,
    })  # fmt: skip


def rouge_l(generator: Generator, systems: int) -> Numbers:
    """(row, system): rows are hard or easy for all; some answers share no word with the reference, some are copies."""
    hard = generator.beta(1.2, 3, POPULATION)[:, None]
    scores = np.clip(hard + generator.normal(0, 0.15, (POPULATION, systems)), 0, 1)
    scores[generator.random(scores.shape) < 0.2] = 0
    scores[generator.random(scores.shape) < 0.08] = 1
    return scores


def alike(generator: Generator, systems: int) -> Numbers:
    """(row, system) of systems that give the same answer to every second row, as two seeds of one method do."""
    scores = rouge_l(generator, systems)
    same = generator.random(POPULATION) < 0.5
    scores[same] = scores[same, :1]
    return scores


def losses(generator: Generator, systems: int) -> Numbers:
    """(row, system): mean losses of answers; rows differ far more than systems do."""
    return generator.gamma(3.0, 0.6, POPULATION)[:, None] * np.exp(generator.normal(0, 0.08, (POPULATION, systems)))


def yes_or_no(generator: Generator, systems: int) -> Numbers:
    """(row, system): short answers that are right or wrong."""
    hard = generator.beta(1.5, 1.5, POPULATION)[:, None]
    return (generator.random((POPULATION, systems)) < hard).astype(np.float64)


SCORES: dict[str, Callable[[Generator, int], Numbers]] = {
    "rouge_l": rouge_l,
    "rouge_l, alike": alike,
    "loss": losses,
    "right or wrong": yes_or_no,
}


def _tuned(generator: Generator) -> Numbers:
    """(row, 2) of ROUGE-L: fine-tuning helps on most rows, and much on some."""
    scores = rouge_l(generator, 2)
    scores[:, 1] = np.clip(scores[:, 1] + 0.05 + generator.gamma(0.5, 0.1, POPULATION), 0, 1)
    return scores


RARE = 0.12
"""Share of rows with a large gain."""


def skewed(generator: Generator) -> Numbers:
    """(row, 2) of ROUGE-L: fine-tuning gains much on every eighth row or so, and changes the others hardly at all."""
    before = np.clip(generator.beta(1.2, 3, POPULATION), 0, 0.4)
    rare = generator.random(POPULATION) < RARE
    gains = np.where(rare, generator.uniform(0.3, 0.6, POPULATION), generator.normal(0, 0.01, POPULATION))
    return np.stack([np.clip(before + gains, 0, 1), before], axis=1)


def skewness(differences: Numbers) -> float:
    """Third standardised moment."""
    return round(float(np.mean(((differences - differences.mean()) / differences.std()) ** 3)), 2)


DIFFERENCES: dict[str, Callable[[Generator], Numbers]] = {
    **{name: (lambda generator, make=make: make(generator, 2)) for name, make in SCORES.items()},
    "rouge_l, tuned": _tuned,
}


def coverage(scores: Numbers, *, sides: bool = False) -> dict[str, Any]:
    """By rows of a test set, the share of intervals that hold the population's difference.

    With `sides` also the shares that lie wholly below and wholly above it.
    """
    differences = scores[:, 0] - scores[:, 1]
    truth = differences.mean()
    found = {}
    for rows in ROWS:
        generator = np.random.default_rng(rows)
        inside = before = below = 0
        for sample in range(SAMPLES):
            drawn = differences[generator.integers(0, POPULATION, rows)]
            now = interval(mean_parts(drawn))
            inside += now.low <= truth <= now.high
            below += now.high < truth
            if sample % BOOTSTRAPPED:
                continue
            means = drawn[generator.integers(0, rows, (400, rows))].mean(axis=1)
            low, high = np.quantile(means, (0.025, 0.975))
            before += low <= truth <= high
        found[str(rows)] = {"now": inside / SAMPLES, "bootstrap": before * BOOTSTRAPPED / SAMPLES}
        if sides:
            found[str(rows)] |= {"below": below / SAMPLES, "above": (SAMPLES - inside - below) / SAMPLES}
    return found


def bleu_coverage(generator: Generator) -> dict[str, Any]:
    """The same of corpus BLEU-4, of answers that keep most words of their reference."""
    references = [generator.choice(WORDS, generator.integers(6, 40)).tolist() for _ in range(POPULATION)]

    def statistics(changed: float) -> NDArray[np.int64]:
        answers = [
            [str(generator.choice(WORDS)) if generator.random() < changed else word for word in words]
            for words in references
        ]
        return bleu_row_statistics([" ".join(words) for words in answers], [" ".join(words) for words in references])

    first, second = statistics(0.25), statistics(0.35)
    truth = bleu4_parts(first).mean() - bleu4_parts(second).mean()
    found = {}
    for rows in ROWS:
        inside = 0
        for _ in range(SAMPLES):
            drawn = generator.integers(0, POPULATION, rows)
            now = interval(bleu4_parts(first[drawn]) - bleu4_parts(second[drawn]))
            inside += now.low <= truth <= now.high
        found[str(rows)] = {"now": inside / SAMPLES}
    return found


def false_differences(scores: Numbers) -> dict[str, float]:
    """By rows of a test set, the share of comparisons of all pairs of equal systems that show any difference."""
    systems = scores.shape[1]
    found = {}
    for rows in FAMILY_ROWS:
        generator = np.random.default_rng(rows)
        false = 0
        for _ in range(FAMILIES):
            drawn = scores[generator.integers(0, POPULATION, rows)]
            dealt = generator.permuted(drawn, axis=1)
            pairs = [(dealt[:, a], dealt[:, b]) for a, b in combinations(range(systems), 2)]
            false += any(each.shown for each in compare(pairs))
        found[str(rows)] = false / FAMILIES
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
