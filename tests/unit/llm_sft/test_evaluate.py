"""The loss is the plain cross-entropy, and answers do not depend on how prompts are batched."""

import pytest
import tiny
import torch

from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft import evaluate
from ray_peft.tasks.llm_sft.task import LlmSft


@pytest.fixture(scope="module")
def bench(shared, questions):
    model = tiny.build_model(shared / "talkative", talkative=True)
    spec = TrialSpec.from_plain(tiny.plain_spec(model, questions, {"name": "none"}))
    return LlmSft().load(spec, "cpu")


def test_the_loss_is_the_mean_over_all_answer_tokens(bench, monkeypatch):
    total = count = 0
    with torch.no_grad():
        for row in bench.data.test:
            logits = bench.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            goal = torch.tensor(row["labels"])[1:]
            total += torch.nn.functional.cross_entropy(logits, goal, ignore_index=-100, reduction="sum").item()
            count += int((goal != -100).sum())
    assert bench.eval_loss() == pytest.approx(total / count, rel=1e-5)
    monkeypatch.setattr(evaluate, "LOSS_TOKENS", 1)
    assert bench.eval_loss() == pytest.approx(total / count, rel=1e-5)


def test_answers_keep_the_rows_order_and_do_not_depend_on_the_batch(bench):
    def answered(batch_size):
        plain = bench.spec.plain()
        plain["evaluation"]["batch_size"] = batch_size
        return evaluate.answers(TrialSpec.from_plain(plain), bench.model, bench.tokenizer, bench.data.test)

    alone = answered(1)
    assert len(set(alone)) > 1, "all answers are equal, so their order cannot be seen"
    assert answered(3) == alone
    assert answered(8) == alone


def test_evaluation_leaves_the_training_mode_as_it_was(bench):
    bench.model.train()
    bench.eval_loss()
    assert bench.model.training
    bench.model.eval()


def test_scored_holds_samples_and_every_answer(bench):
    scored = bench.evaluate()
    assert scored.scores.eval_rows == 8
    assert scored.scores.generated_rows == 4
    assert len(scored.samples) == 2
    assert len(scored.answers) == 4
    assert scored.samples[0].reference == scored.answers[0][1]
