"""The loss is the plain cross-entropy, and answers do not depend on how prompts are batched, nor on memory."""

import contextlib

import pytest
import tiny
import torch
from cramped import holds
from untracked import run

from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft import evaluate
from ray_peft.tasks.llm_sft.scores import row_losses, score_answers
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


def test_the_loss_of_every_row_is_kept_with_its_weight(bench, monkeypatch):
    scored = bench.evaluate()
    assert len(set(scored.loss_tokens)) > 1, "all answers have one length, so weights cannot be seen"
    with torch.no_grad():
        for row, loss, tokens in zip(bench.data.test, scored.losses, scored.loss_tokens, strict=True):
            logits = bench.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            goal = torch.tensor(row["labels"])[1:]
            assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, goal).item(), rel=1e-5)
            assert tokens == int((goal != -100).sum())
    weighed = sum(loss * tokens for loss, tokens in zip(scored.losses, scored.loss_tokens, strict=True))
    assert scored.scores.eval_loss == pytest.approx(weighed / sum(scored.loss_tokens), rel=1e-9)
    assert scored.scores.eval_loss == bench.eval_loss()


def test_a_row_without_answer_tokens_has_no_loss():
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": [[1, 2], [1, 2, 3], [1]], "labels": [[-100, 2], [5, -100, -100], [7]]})
    assert row_losses(rows, torch.tensor([-0.5])) == ([0.5, 0.0, 0.0], [1, 0, 0])


def test_scores_name_their_tokenizers_and_a_chinese_copy_is_perfect():
    given = ["是的，没有任何问题。", "不，我们明天再谈这件事。"] * 4
    found = score_answers(given, given)
    assert (found.bleu_tokenizer, found.rouge_tokenizer, found.generated_rows) == ("zh", "unicode", 8)
    assert (found.bleu4, found.rouge_l, found.chrf) == pytest.approx((1, 1, 1))
    english = score_answers(["the cat sat on the mat"], ["the cat sat on the red mat"])
    assert (english.bleu_tokenizer, english.rouge_tokenizer) == ("13a", "rouge_score")
    assert english.rouge_l == pytest.approx(12 / 13, abs=1e-12)


def log_probs(bench, lowered=None):
    return evaluate.token_log_probs(bench.spec, bench.model, bench.data.test, 258, lowered)


def test_where_memory_runs_out_the_loss_is_that_of_smaller_passes(bench):
    free, lowered = log_probs(bench), {}
    longest = max(map(len, bench.data.test["input_ids"]))
    with holds(bench.model.model, 3) as seen:
        cramped = log_probs(bench, lowered)
        assert seen == [8, 4, 2, 2, 2, 2]
        assert lowered == {evaluate.LOSS_BATCH: 2 * longest}
        again = log_probs(bench, lowered)
        assert max(seen[6:]) <= 3, "what was lowered stays so"
    for found in (cramped, again):
        assert torch.allclose(found, free, rtol=1e-6, atol=1e-6)
    with holds(bench.model.model, 0) as seen, pytest.raises(torch.OutOfMemoryError):
        log_probs(bench)
    assert seen == [8, 4, 2, 1]


def test_where_memory_runs_out_fewer_prompts_are_answered_at_a_time(bench):
    def answered(lowered=None):
        return evaluate.answers(bench.spec, bench.model, bench.tokenizer, bench.data.test, lowered=lowered)

    free, lowered = answered(), {}
    with holds(bench.model.model, 3) as seen:
        assert answered(lowered) == free
        assert lowered == {"evaluation.batch_size": 2}
        assert seen.count(4) == 1
        assert answered(lowered) == free
        assert seen.count(4) == 1, "what was lowered stays so"
    with holds(bench.model.model, 0), pytest.raises(torch.OutOfMemoryError):
        answered()


def test_another_error_is_no_lack_of_memory(bench):
    def broken(module, args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    handle = bench.model.model.register_forward_pre_hook(broken)
    try:
        for evaluated in (bench.eval_loss, bench.evaluate):
            with pytest.raises(RuntimeError, match="shapes"):
                evaluated()
    finally:
        handle.remove()
    assert bench.lowered == {}


def test_a_trial_whose_evaluation_runs_out_of_memory_scores_the_same_and_says_it(bench, tmp_path, monkeypatch):
    plain = bench.spec.plain() | {"method": {"name": "lora", "rank": 4, "lr": 0.01}}
    plain["train"]["eval_every"] = 2
    spec, load = TrialSpec.from_plain(plain), LlmSft.load
    free, _ = run(spec, tmp_path / "free")
    assert free.status == "finished", free.error
    assert free.lowered == {}

    def cramped(self, spec, device):
        found = load(self, spec, device)
        device_memory.enter_context(holds(found.model.model, 3, training=False))
        return found

    monkeypatch.setattr(LlmSft, "load", cramped)
    with contextlib.ExitStack() as device_memory:
        row, _ = run(spec, tmp_path / "cramped")
    assert row.status == "finished", row.error
    longest = max(map(len, bench.data.test["input_ids"]))
    assert row.lowered == {"evaluation.batch_size": 2, evaluate.LOSS_BATCH: 2 * longest}
    assert row.scores.eval_loss == pytest.approx(free.scores.eval_loss, rel=1e-6)
    assert row.scores.model_copy(update={"eval_loss": free.scores.eval_loss}) == free.scores
    assert (tmp_path / "cramped" / "answers.jsonl").read_text() == (tmp_path / "free" / "answers.jsonl").read_text()
