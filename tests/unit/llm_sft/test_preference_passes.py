"""Pairs in lanes, or padded, in passes of any size: the same losses and gradients."""

import judged
import pytest
import tiny
import torch

from ray_peft.engine.contract import Share
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.preference.packed import PackedPreferenceLoss, PackedPreferenceRows
from ray_peft.tasks.llm_sft.preference.padded import PreferenceLoss
from ray_peft.tasks.llm_sft.preference.steps import PreferenceRows
from ray_peft.tasks.llm_sft.task import LlmSft


@pytest.fixture(scope="module")
def pairs(shared):
    return tiny.write_rows(shared / "pairs.jsonl", judged.PAIRS)


def gradients(model, computation, parts):
    """The loss of a step and the gradients of what is trained."""
    model.zero_grad()
    total = 0.0
    for part in parts:
        loss = computation.loss(*computation.inputs(part))
        loss.backward()
        total += float(loss.detach())
    return total, [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]


OBJECTIVES = {
    "dpo": {},
    "dpo, ipo": {"train__preference": {"loss": "ipo"}},
    "orpo": {},
    "orpo, all": {"train__loss": "all"},
    "kto": {},
}


@pytest.mark.parametrize("case", OBJECTIVES)
def test_lanes_and_pass_sizes_change_no_loss_and_no_gradient(case, tiny_model, pairs):
    plain = judged.plain_spec(tiny_model, pairs, train__objective=case[:4].strip(","), **OBJECTIVES[case])
    spec = TrialSpec.from_plain(plain)
    bench = LlmSft().load(spec, "cpu")
    ((stage, _),) = spec.method.stages(8)
    bench.attach(stage)
    with torch.no_grad():  # else the adapter gives the model before training, and half of the gradients are zero
        for weight in bench.model.parameters():
            if weight.requires_grad:
                weight.add_(0.02 * torch.randn_like(weight))
    rows = PreferenceRows(spec, bench.judged.get("train", bench.data.train))
    padded, packed = PreferenceLoss(spec, bench.model, 258), PackedPreferenceLoss(spec, bench.model)
    loss, expected = gradients(bench.model, padded, rows.parts(1, Share(), 4))
    in_lanes = PackedPreferenceRows(rows)
    ways = {
        "one pair a pass": (padded, rows.parts(1, Share(), 1)),
        "few lanes": (packed, in_lanes.parts(1, Share(), 1)),
        "many lanes": (packed, in_lanes.parts(1, Share(), 8)),
    }
    assert len(ways["few lanes"][1]) > len(ways["many lanes"][1])
    if case != "kto":  # which one process computes alone
        by_two = [part for rank in (0, 1) for part in rows.parts(1, Share(rank, 2), 2)]
        assert len(by_two) == 4
        ways["two workers"] = padded, by_two
    if case == "kto":  # the pairs are taken apart, and the first passes are not trained on
        assert [part.divergence for part in ways["many lanes"][1]] == [True, False]
        assert {len(row.sides) for part in ways["one pair a pass"][1] for row in part.judged} == {1}
    for way, (computation, parts) in ways.items():
        value, found = gradients(bench.model, computation, parts)
        assert value == pytest.approx(loss, rel=1e-5), way
        for gradient, wanted in zip(found, expected, strict=True):
            assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-7), way


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_the_log_likelihood_by_which_lanes_are_tried_is_that_of_padded_rows(objective, tiny_model, pairs):
    plain = judged.plain_spec(tiny_model, pairs, train__objective=objective)
    spec = TrialSpec.from_plain(plain)
    bench = LlmSft().load(spec, "cpu")
    rows = PreferenceRows(spec, bench.judged.get("train", bench.data.train))
    part = PackedPreferenceRows(rows).heaviest(range(1), 4)
    padded, packed = PreferenceLoss(spec, bench.model, 258), PackedPreferenceLoss(spec, bench.model)
    with torch.no_grad():
        expected = padded.compared(*padded.inputs(part.unpacked()))
        assert float(packed.compared(*packed.inputs(part))) == pytest.approx(float(expected), rel=1e-5)
    answers = sum(side.scored.answer_tokens for row in part.unpacked().judged for side in row.sides)
    assert 3 < -float(expected) / answers < 8  # nats a token: a model of random weights knows 272 of them
