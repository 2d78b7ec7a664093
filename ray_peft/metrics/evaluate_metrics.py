"""The scores of answers as metrics of Hugging Face `evaluate`, without the downloads that `evaluate.load` needs.

`compute(predictions=..., references=...)` of each returns its score in [0, 1], by its name.
"""

import evaluate
from datasets import Features, Sequence, Value

from ray_peft.metrics.chrf_scores import chrf
from ray_peft.metrics.scripts import RougeTokenizer
from ray_peft.metrics.text_scores import Reference, bleu4, rouge_l


class Bleu4(evaluate.Metric):  # type: ignore[misc]
    """`bleu4`: see `text_scores.bleu4`."""

    def _info(self) -> evaluate.MetricInfo:
        return _of_texts(
            "Corpus BLEU-4 in [0, 1]: sacrebleu's tokens for the script of the references, no smoothing.",
            "Papineni et al. 2002, Bleu: a Method for Automatic Evaluation of Machine Translation, P02-1040",
        )

    def _compute(
        self, predictions: list[str], references: list[Reference], tokenizer: str | None = None
    ) -> dict[str, float]:
        return {"bleu4": bleu4(predictions, references, tokenizer)}


class RougeL(evaluate.Metric):  # type: ignore[misc]
    """`rouge_l`, without the random bootstrap of `evaluate.load("rouge")`: see `text_scores.rouge_l`."""

    def _info(self) -> evaluate.MetricInfo:
        return _of_texts(
            "Mean over rows of the ROUGE-L f-measure in [0, 1]: no stemming.",
            "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, W04-1013",
        )

    def _compute(
        self, predictions: list[str], references: list[Reference], tokenizer: RougeTokenizer | None = None
    ) -> dict[str, float]:
        return {"rouge_l": rouge_l(predictions, references, tokenizer)}


class Chrf(evaluate.Metric):  # type: ignore[misc]
    """`chrf`: see `chrf_scores.chrf`."""

    def _info(self) -> evaluate.MetricInfo:
        return _of_texts(
            "Corpus chrF2 in [0, 1]: n-grams of 1 to 6 characters, white space left out.",
            "Popovic 2015, chrF: character n-gram F-score for automatic MT evaluation, W15-3049",
        )

    def _compute(self, predictions: list[str], references: list[Reference]) -> dict[str, float]:
        return {"chrf": chrf(predictions, references)}


def _of_texts(description: str, citation: str) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description="predictions: one text a row; references: one text, or a list of texts, a row.",
        features=[
            Features({"predictions": Value("string"), "references": Value("string")}),
            Features({"predictions": Value("string"), "references": Sequence(Value("string"))}),
        ],
    )
