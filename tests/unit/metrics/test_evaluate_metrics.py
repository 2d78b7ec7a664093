"""The metrics through the interface of Hugging Face evaluate; the only test file that pays for its import."""

import evaluate
import pytest

from ray_peft.metrics.chrf_scores import chrf
from ray_peft.metrics.evaluate_metrics import Bleu4, Chrf, RougeL
from ray_peft.metrics.text_scores import bleu4, rouge_l

PREDICTIONS = ["the cat sat on the mat", "well-\nknown facts, 3.14 or so-\n", ""]
REFERENCES = ["the cat sat on the red mat", "well-known facts, 3.14 or more\n", "an answer"]
METRICS = [(Bleu4, "bleu4", bleu4), (RougeL, "rouge_l", rouge_l), (Chrf, "chrf", chrf)]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))


@pytest.mark.parametrize(("metric", "name", "score"), METRICS)
def test_compute_equals_the_function(metric, name, score):
    expected = {name: score(PREDICTIONS, REFERENCES)}
    assert 0 < expected[name] < 1
    assert metric().compute(predictions=PREDICTIONS, references=REFERENCES) == expected
    assert metric(keep_in_memory=True).compute(predictions=PREDICTIONS, references=REFERENCES) == expected


@pytest.mark.parametrize(("metric", "name", "score"), METRICS)
def test_compute_takes_lists_of_references(metric, name, score):
    one = [[text] for text in REFERENCES]
    two = [[text, "the cat sat on the mat"] for text in REFERENCES]
    assert metric().compute(predictions=PREDICTIONS, references=one) == {name: score(PREDICTIONS, REFERENCES)}
    assert metric().compute(predictions=PREDICTIONS, references=two) == {name: score(PREDICTIONS, two)}


@pytest.mark.parametrize(("metric", "name", "score"), METRICS)
def test_rows_may_arrive_in_batches(metric, name, score):
    loaded = metric()
    loaded.add_batch(predictions=PREDICTIONS[:2], references=REFERENCES[:2])
    loaded.add(prediction=PREDICTIONS[2], reference=REFERENCES[2])
    assert loaded.compute() == {name: score(PREDICTIONS, REFERENCES)}


@pytest.mark.parametrize(("metric", "name", "score"), METRICS)
def test_a_metric_is_named_as_its_score(metric, name, score):
    assert metric().name == name


@pytest.mark.parametrize(("metric", "name", "score"), METRICS)
def test_unequal_numbers_of_rows_are_refused(metric, name, score):
    with pytest.raises(ValueError, match="Mismatch in the number of predictions"):
        metric().compute(predictions=PREDICTIONS, references=REFERENCES[:2])


def test_bleu4_of_empty_predictions_is_zero():
    assert Bleu4().compute(predictions=["", ""], references=["a", "b"]) == {"bleu4": 0.0}


def test_the_two_combine():
    combined = evaluate.combine([Bleu4(), RougeL()])
    assert combined.compute(predictions=PREDICTIONS, references=REFERENCES) == {
        "bleu4": bleu4(PREDICTIONS, REFERENCES),
        "rouge_l": rouge_l(PREDICTIONS, REFERENCES),
    }
