"""Corpus chrF as a metric of Hugging Face `evaluate`, without the download that `evaluate.load("chrf")` needs."""

import evaluate
from datasets import Features, Sequence, Value

from ray_peft.metrics.chrf_scores import chrf
from ray_peft.metrics.text_scores import Reference


class Chrf(evaluate.Metric):  # type: ignore[misc]
    """`compute(predictions=..., references=...)` returns {"chrf": score in [0, 1]}; see `chrf_scores.chrf`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Corpus chrF2 in [0, 1]: n-grams of 1 to 6 characters, white space left out.",
            citation="Popovic 2015, chrF: character n-gram F-score for automatic MT evaluation, W15-3049",
            inputs_description="predictions: one text a row; references: one text, or a list of texts, a row.",
            features=[
                Features({"predictions": Value("string"), "references": Value("string")}),
                Features({"predictions": Value("string"), "references": Sequence(Value("string"))}),
            ],
        )

    def _compute(self, predictions: list[str], references: list[Reference]) -> dict[str, float]:
        return {"chrf": chrf(predictions, references)}
