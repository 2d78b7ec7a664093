"""Mean ROUGE-L as a metric of Hugging Face `evaluate`, without the random bootstrap of `evaluate.load("rouge")`."""

import evaluate
from datasets import Features, Sequence, Value

from ray_peft.metrics.scripts import RougeTokenizer
from ray_peft.metrics.text_scores import Reference, rouge_l


class RougeL(evaluate.Metric):  # type: ignore[misc]
    """`compute(predictions=..., references=...)` returns {"rouge_l": score in [0, 1]}; see `text_scores.rouge_l`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean over rows of the ROUGE-L f-measure in [0, 1]: no stemming.",
            citation="Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, W04-1013",
            inputs_description="predictions: one text a row; references: one text, or a list of texts, a row.",
            features=[
                Features({"predictions": Value("string"), "references": Value("string")}),
                Features({"predictions": Value("string"), "references": Sequence(Value("string"))}),
            ],
        )

    def _compute(
        self, predictions: list[str], references: list[Reference], tokenizer: RougeTokenizer | None = None
    ) -> dict[str, float]:
        return {"rouge_l": rouge_l(predictions, references, tokenizer)}
