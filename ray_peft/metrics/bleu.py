"""Corpus BLEU-4 as a metric of Hugging Face `evaluate`, without the download that `evaluate.load("bleu")` needs."""

import evaluate
from datasets import Features, Sequence, Value

from ray_peft.metrics.text_scores import Reference, bleu4


class Bleu4(evaluate.Metric):  # type: ignore[misc]
    """`compute(predictions=..., references=...)` returns {"bleu4": score in [0, 1]}; see `text_scores.bleu4`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Corpus BLEU-4 in [0, 1]: sacrebleu's tokens for the script of the references, no smoothing.",
            citation="Papineni et al. 2002, Bleu: a Method for Automatic Evaluation of Machine Translation, P02-1040",
            inputs_description="predictions: one text a row; references: one text, or a list of texts, a row.",
            features=[
                Features({"predictions": Value("string"), "references": Value("string")}),
                Features({"predictions": Value("string"), "references": Sequence(Value("string"))}),
            ],
        )

    def _compute(
        self, predictions: list[str], references: list[Reference], tokenizer: str | None = None
    ) -> dict[str, float]:
        return {"bleu4": bleu4(predictions, references, tokenizer)}
