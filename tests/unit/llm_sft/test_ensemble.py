"""The ensemble: the best weights, the mixture worked out by hand, greedy answers, one base for two adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from cramped import holds

from ray_peft.errors import ModelError
from ray_peft.spec import TrialSpec
from ray_peft.tasks.base import MemberModel
from ray_peft.tasks.llm_sft.ensemble import LlmEnsemble, check_members, load_members, mixture_weights
from ray_peft.tasks.llm_sft.evaluate import answers, token_log_probs
from ray_peft.tasks.llm_sft.task import LlmSft

LORA = {"name": "lora", "rank": 4, "lr": 0.05}
FULL = {"name": "full", "lr": 0.01, "weights": "float32"}


def test_weights_are_the_likeliest():
    torch.manual_seed(0)
    log_probs = torch.log(torch.rand(3, 400, dtype=torch.float64))
    weights = torch.tensor(mixture_weights(log_probs), dtype=torch.float64)
    assert weights.sum().item() == pytest.approx(1)

    def likelihood(at):
        return torch.logsumexp(log_probs + at.log()[:, None], 0).mean().item()

    best = likelihood(weights)
    for _ in range(50):
        moved = (weights + 0.05 * torch.randn(3, dtype=torch.float64)).clamp(min=1e-9)
        assert likelihood(moved / moved.sum()) <= best


def test_a_member_that_is_always_right_gets_all_the_weight():
    first, second = torch.full((100,), -0.1), torch.full((100,), -3.0)
    assert mixture_weights(torch.stack([first, second]).double()) == [1.0, 0.0]


@pytest.fixture(scope="module")
def trained(talkative, questions, shared):
    """Specs of an ensemble and the folders of its trained members."""
    method = {"name": "ensemble", "members": [{"method": LORA}, {"method": FULL}, {"method": LORA, "seed": 9}]}
    plain = tiny.plain_spec(talkative, questions, method, train__save_dtype="float32")
    plain["data"]["sources"][0] |= {"validation": 6}
    spec = TrialSpec.from_plain(plain)
    members = []
    for member in spec.members():
        bench = LlmSft().load(member, "cpu")
        ((stage, steps),) = member.method.stages(bench.total_steps())
        folder = shared / "members" / member.trial_id
        bench.attach(stage)
        bench.train(stage, steps, 0, folder / "stage1", lambda metrics, step: None)
        bench.save(folder / "adapter")
        members.append((MemberModel(member, folder / "adapter"), bench))
    return spec, members


@pytest.fixture
def ensemble(trained):
    spec, members = trained
    bench = LlmSft().load_ensemble(spec, [member for member, _ in members], "cpu")
    assert isinstance(bench, LlmEnsemble)
    return bench


def test_with_all_the_weight_on_one_member_it_is_that_member(ensemble, trained):
    spec, members = trained
    found = []
    for place, (_, bench) in enumerate(members):
        ensemble.weights = [float(place == other) for other in range(3)]
        alone = answers(spec, bench.model, bench.tokenizer, bench.data.test)
        assert ensemble.answer(ensemble.data.test) == alone
        loss = -float(token_log_probs(spec, bench.model, bench.data.test, 258).mean())
        assert ensemble.eval_loss() == pytest.approx(loss, rel=1e-5)
        found.append(alone)
    assert found[0] != found[1] != found[2]  # else this test could not fail


def test_answers_follow_the_mixture_of_distributions_step_by_step(ensemble):
    ensemble.weights = [0.35, 0.4, 0.25]
    given = ensemble.answer(ensemble.data.test)
    for row, answer in enumerate(given):
        ids = list(ensemble.data.test[row]["prompt_ids"])
        expected: list[int] = []
        for _ in range(ensemble.spec.evaluation.max_new_tokens):
            mixed = 0
            for member, weight in zip(ensemble.members, ensemble.weights, strict=True):
                with member.at_work() as model, torch.no_grad():
                    mixed = mixed + weight * model(torch.tensor([ids + expected])).logits[0, -1].softmax(-1)
            expected.append(int(mixed.argmax()))
            if expected[-1] == 257:
                break
        assert answer == ensemble.tokenizer.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize("place", [0, 1])
def test_a_member_that_runs_out_of_memory_changes_no_answer(ensemble, place):
    ensemble.weights = [0.35, 0.4, 0.25]
    free, loss = ensemble.answer(ensemble.data.test), ensemble.eval_loss()
    model = ensemble.members[place].model
    with holds((model.get_base_model() if hasattr(model, "peft_config") else model).model, 3) as seen:
        assert ensemble.answer(ensemble.data.test) == free
        assert ensemble.lowered == {"evaluation.batch_size": 2}
        assert ensemble.eval_loss() == pytest.approx(loss, rel=1e-6)
    assert 4 in seen
    assert "evaluation.loss_tokens" in ensemble.lowered


def test_tuned_on_validation_it_is_at_least_as_good_there_as_its_best_member(ensemble):
    everything, ensemble.data = ensemble.data, replace(ensemble.data, test=None)  # the weights must not need it
    weights = ensemble.tune()
    ensemble.data = everything
    assert sum(weights) == pytest.approx(1)
    losses = -ensemble._log_probs(ensemble.data.validation).mean(dim=1)
    log_weights = torch.tensor(weights).double().log()[:, None]
    mixed = -torch.logsumexp(ensemble._log_probs(ensemble.data.validation) + log_weights, 0).mean()
    assert mixed <= losses.min() + 1e-6


def test_two_adapters_share_one_base_and_the_untouched_base_is_beneath_them(talkative, questions, trained):
    spec, members = trained
    loaded = load_members([members[0][0], members[2][0], MemberModel(spec.members()[0], None)], "cpu")
    assert len({id(member.model) for member in loaded}) == 1
    assert loaded[2].is_bare_base
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        outputs = []
        for member in loaded:
            with member.at_work() as model:
                outputs.append(model(ids).logits)
    plain = LlmSft().load(TrialSpec.from_plain(tiny.plain_spec(talkative, questions, {"name": "none"})), "cpu").model
    assert torch.equal(outputs[2], plain(ids).logits)
    assert not torch.equal(outputs[0], outputs[1])


def test_members_with_other_tokenizers_are_refused_before_training(tiny_model, questions, shared, trained):
    from transformers import AutoTokenizer

    other = tiny.build_model(shared / "other-tokens")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    spec, _ = trained
    plain = spec.plain()
    plain["method"]["members"][1]["model"] = str(other)
    with pytest.raises(ModelError, match="members.1.model: .*other-tokens: its tokenizer has 260 tokens"):
        check_members(TrialSpec.from_plain(plain))
