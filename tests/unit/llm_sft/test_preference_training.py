"""The reference of every method is the model before training, and held-out pairs are scored against it."""

import json
import math

import judged
import pytest
import tiny
import torch

from ray_peft.metrics.scores import RowReward
from ray_peft.spec import PreferenceSpec, TrialSpec
from ray_peft.tasks.llm_sft import evaluate
from ray_peft.tasks.llm_sft.preference import losses
from ray_peft.tasks.llm_sft.preference import reference as reference_module
from ray_peft.tasks.llm_sft.preference.reference import side_log_probs
from ray_peft.tasks.llm_sft.preference.scores import rewards
from ray_peft.tasks.llm_sft.preference.steps import REFERENCE
from ray_peft.tasks.llm_sft.task import LlmSft


@pytest.fixture(scope="module")
def pairs(shared):
    return tiny.write_rows(shared / "pairs.jsonl", judged.PAIRS)


def answers(log_probs, reference, tokens=4.0):
    """One pair."""
    return losses.Answers(torch.tensor([log_probs]), torch.tensor([reference]), torch.full((1, 2), tokens))


def test_losses_worked_out_by_hand():
    pair = answers([-8.0, -12.0], [-10.0, -11.0])  # rises of 2 and -1, so with beta 0.1 a margin of 0.3
    sigmoid = math.log(1 + math.exp(-0.3))
    flipped = math.log(1 + math.exp(0.3))
    by_hand = {
        "sigmoid": (0.0, sigmoid),
        "sigmoid, smoothed": (0.2, 0.8 * sigmoid + 0.2 * flipped),
        "robust": (0.2, (0.8 * sigmoid - 0.2 * flipped) / 0.6),
        "hinge": (0.0, 0.7),
        "ipo": (0.0, (3 / 4 - 5) ** 2),
    }
    for name, (smoothing, value) in by_hand.items():
        settings = PreferenceSpec(loss=name.partition(",")[0], label_smoothing=smoothing)
        assert float(losses.dpo(settings, pair)) == pytest.approx(value, rel=1e-6), name
    odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in (-2.0, -3.0)]
    expected = -0.1 * math.log(1 / (1 + odds[1] / odds[0]))
    assert float(losses.odds_ratio(PreferenceSpec(), pair)) == pytest.approx(expected, rel=1e-5)
    row = losses.Answers(torch.tensor([[-8.0]]), torch.tensor([[-10.0]]), torch.ones(1, 1))
    for desirable, weight in ((1.0, 0.5), (0.0, 2.0)):
        settings = PreferenceSpec(desirable_weight=0.5, undesirable_weight=2.0)
        value = losses.kto(settings, row, torch.tensor([desirable]), torch.tensor(3.0))
        sign = 1 if desirable else -1
        assert float(value) == pytest.approx(weight * (1 - 1 / (1 + math.exp(-0.1 * sign * (2 - 3)))), rel=1e-6)


def test_labels_that_are_flipped_at_random_leave_the_robust_loss_as_it_is():
    settings = PreferenceSpec(loss="robust", label_smoothing=0.3)
    pair, other_way = answers([-8.0, -12.0], [-10.0, -11.0]), answers([-12.0, -8.0], [-11.0, -10.0])
    expectation = 0.7 * losses.dpo(settings, pair) + 0.3 * losses.dpo(settings, other_way)
    assert float(expectation) == pytest.approx(float(losses.dpo(PreferenceSpec(), pair)), rel=1e-5)


METHODS = {
    "lora": {"name": "lora", "rank": 4, "lr": 0.003},
    "full": {"name": "full", "lr": 0.001, "weights": "float32"},
    "hybrid": {
        "name": "qlora_galore", "switch_at": 0.5,
        "qlora": {"name": "qlora", "rank": 4, "lr": 0.003, "compute_dtype": "float32"},
        "galore": {"name": "galore", "rank": 4, "lr": 0.001, "weights": "float32"},
    },
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_is_what_the_untouched_model_says_even_after_training(method, tiny_model, pairs, tmp_path):
    plain = judged.plain_spec(tiny_model, pairs, METHODS[method], train__steps=6)
    log, bench = judged.trained(plain, tmp_path)
    assert log[0]["train_loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    spec = TrialSpec.from_plain(plain)
    live = LlmSft().load(spec, "cpu")  # a second copy, which `bench` has never seen
    rows = bench.judged["train"]
    for kept, said in zip(rows[REFERENCE], side_log_probs(spec, live.model, rows, 258, {}), strict=True):
        assert kept == pytest.approx(said, rel=1e-5)


def test_it_is_computed_once_for_all_trials_on_a_base_and_not_by_a_resumed_one(
    tiny_model, pairs, tmp_path, monkeypatch
):
    computed = []

    def counted(spec, model, rows, *more):
        computed.append(len(rows))
        return side_log_probs(spec, model, rows, *more)

    monkeypatch.setattr(reference_module, "side_log_probs", counted)
    monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path / "cache"))
    changes = {"train__steps": 8, "train__checkpoint_every": 4}
    whole, _ = judged.trained(judged.plain_spec(tiny_model, pairs, **changes), tmp_path / "whole")
    assert sorted(computed) == [8, 40]  # the held-out rows, and those that are trained on
    judged.trained(judged.plain_spec(tiny_model, pairs, {"name": "lora", "rank": 8}, **changes), tmp_path / "other")
    assert len(computed) == 2

    class Killed(Exception):
        """Stands for a trial that ends in mid-training."""

    spec = TrialSpec.from_plain(judged.plain_spec(tiny_model, pairs, **changes))
    rest = []
    for killed_at in (6, None):

        def report(metrics, step, killed_at=killed_at):
            if killed_at is None:
                rest.append(metrics["train_loss"])
            elif step == killed_at:
                raise Killed

        bench = LlmSft().load(spec, "cpu")
        ((stage, steps),) = spec.method.stages(8)
        bench.attach(stage)
        if killed_at is None:
            assert bench.train(stage, steps, 0, tmp_path / "killed", report).resumed_from_step == 4
        else:
            with pytest.raises(Killed):
                bench.train(stage, steps, 0, tmp_path / "killed", report)
    assert len(computed) == 2
    assert rest == pytest.approx([line["train_loss"] for line in whole[4:]], rel=1e-4)


OBJECTIVES = {"dpo": "pairs", "orpo": "pairs", "sft": "pairs", "kto on labelled rows": "labelled"}


@pytest.mark.parametrize("case", OBJECTIVES)
def test_training_raises_reward_accuracy_and_margin_on_held_out_rows(case, tiny_model, shared, tmp_path):
    rows = judged.PAIRS if OBJECTIVES[case] == "pairs" else judged.LABELLED
    path = tiny.write_rows(shared / f"{OBJECTIVES[case]}.jsonl", rows)
    plain = judged.plain_spec(tiny_model, path, train__objective=case.split()[0], train__steps=16)
    plain["method"]["lr"] = 0.01
    untouched = LlmSft().load(TrialSpec.from_plain(plain), "cpu").evaluate()
    _, bench = judged.trained(plain, tmp_path)
    scored = bench.evaluate()
    before, after = untouched.scores, scored.scores
    assert (before.reward_accuracy, before.reward_margin) == (0.5, 0.0)
    assert after.reward_accuracy > 0.8
    assert after.reward_margin > 0.05
    assert after.reward_margin == pytest.approx(sum(row.margin for row in scored.rewards) / len(scored.rewards))
    assert len(scored.rewards) == 8
    if case == "dpo":
        assert before.preference_loss == pytest.approx(math.log(2))
        assert after.preference_loss < before.preference_loss
    if case == "kto on labelled rows":
        held_out = bench.data.test
        assert after.eval_rows == sum(held_out["desirable"]) < len(held_out)


def test_held_out_pairs_pass_the_trained_model_once(tiny_model, pairs, tmp_path, monkeypatch):
    _, bench = judged.trained(judged.plain_spec(tiny_model, pairs, train__steps=4), tmp_path)
    rows = bench.judged["test"]
    sides = side_log_probs(bench.spec, bench.model, rows, 258, {})
    scored, passed = evaluate.token_log_probs, []

    def counted(spec, model, rows, *more):
        passed.append(len(rows))
        return scored(spec, model, rows, *more)

    monkeypatch.setattr(evaluate, "token_log_probs", counted)
    outputs = bench.compute_outputs()
    assert passed == [8, 8]  # the chosen answers, and the rejected ones
    assert outputs.rewards == rewards(bench.spec, rows, sides)


@pytest.mark.parametrize("answered", [None, 2])
def test_the_workload_of_labelled_rows_counts_those_that_are_scored_and_answered(answered, tiny_model, shared):
    path = tiny.write_rows(shared / "labelled.jsonl", judged.LABELLED)
    changes = {"train__objective": "kto", "evaluation__generate": True, "evaluation__rows": answered}
    bench = LlmSft().load(TrialSpec.from_plain(judged.plain_spec(tiny_model, path, **changes)), "cpu")
    workload, scored = bench.workload(), bench.evaluate()
    assert workload.scored_rows == scored.scores.eval_rows == sum(bench.data.test["desirable"]) < 8
    assert workload.answered_rows == len(scored.answers) == (answered or workload.scored_rows)


@pytest.mark.parametrize(("margin", "right"), [(0.2, 1.0), (-0.1, 0.0), (0.0, 0.5)])
def test_an_equal_reward_counts_half(margin, right):
    assert RowReward(row=0, margin=margin).right == right


def test_a_pair_s_memory_is_that_of_two_rows(tiny_model, pairs):
    from ray_peft.vram.cards import ANY

    def predicted(**changes):
        spec = TrialSpec.from_plain(judged.plain_spec(tiny_model, pairs, train__cuda_graphs=False, **changes))
        return LlmSft().predictor(spec)(spec, ANY)

    one_pair = predicted(train__micro_batch_size=1)
    two_rows = predicted(train__micro_batch_size=2, train__objective="sft")
    assert one_pair.peak_allocated >= two_rows.peak_allocated
    assert one_pair.peak_allocated < 1.2 * two_rows.peak_allocated


def test_a_trial_keeps_the_rewards_of_its_rows(tiny_model, pairs, tmp_path):
    from untracked import run

    plain = judged.plain_spec(tiny_model, pairs, train__steps=4)
    row, _ = run(TrialSpec.from_plain(plain), tmp_path / "trial")
    assert row.status == "finished", row.error
    lines = [json.loads(line) for line in (tmp_path / "trial/rewards.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(8))
    assert row.scores.reward_margin == pytest.approx(sum(line["margin"] for line in lines) / 8)
