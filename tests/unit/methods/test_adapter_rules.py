"""What storage and adapters change around a trial: the same numbers under two names, and rules with the way out."""

from __future__ import annotations

import pytest
import tiny
import tiny_architectures
import torch
from pydantic import ValidationError

from ray_peft.methods.adapters.ia3 import IA3
from ray_peft.methods.optimizers import trainable
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS


def plain(model, rows, method, **changes):
    return TrialSpec.from_plain(tiny.plain_spec(model, rows, method, **changes))


def trained(spec, folder):
    """The bench of a trial after its steps, and its losses."""
    bench = TASKS["llm_sft"].load(spec, "cpu")
    ((stage, steps),) = spec.method.stages(bench.total_steps())
    bench.attach(stage)
    return bench, bench.train(stage, steps, 0, folder, lambda *_: None)


def test_lora_on_nf4_is_qlora_under_another_name(tiny_model, questions, tmp_path):
    qlora = plain(tiny_model, questions, {"name": "qlora", "rank": 4, "lr": 0.01})
    lora = plain(tiny_model, questions, {"name": "lora", "rank": 4, "lr": 0.01}, model__quantization="nf4")
    losses = [trained(spec, tmp_path / spec.method.name)[1].losses for spec in (qlora, lora)]
    assert losses[0] == losses[1]
    texts = [spec.method.arithmetic("float32", 0.8, spec.quantization) for spec in (qlora, lora)]
    assert texts[0] == texts[1]
    assert "80% of its weights in nf4 computed in bfloat16" in texts[0]


def test_a_base_in_eight_bits_trains_is_counted_and_merges(tiny_model, questions, tmp_path):
    spec = plain(tiny_model, questions, {"name": "lora", "rank": 4, "lr": 0.01}, model__quantization="int8")
    bench, result = trained(spec, tmp_path / "stage")
    assert result.losses[-1] < result.losses[0]
    count, total = bench.parameters()
    layers = sum(p.numel() for p in bench.model.parameters() if p.dtype == torch.int8)
    rows = sum(len(p) for p in bench.model.parameters() if p.dtype == torch.int8)
    assert bench.storage()["int8"] == layers + 4 * rows
    assert bench.four_bit_share() == pytest.approx(layers / (total - count))
    before = bench.eval_loss()
    bench.merge(spec.method)
    assert not any(p.dtype == torch.int8 for p in bench.model.parameters())
    assert bench.eval_loss() == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "adalora", "rank": 4, "target_rank": 2},
        {"name": "pissa", "rank": 4},
        {"name": "prompt_tuning", "virtual_tokens": 3},
        {"name": "prefix_tuning", "virtual_tokens": 3},
    ],
    ids=lambda method: method["name"],
)
def test_a_trial_is_scored_saved_and_goes_on(method, tiny_model, questions, tmp_path):
    spec = plain(tiny_model, questions, {**method, "lr": 0.01}, train__checkpoint_every=2, train__save_dtype="float32")
    bench, first = trained(spec, tmp_path / "stage")
    scored = bench.evaluate()
    assert len(scored.answers) == 4
    bench.save(tmp_path / "adapter")
    again = TASKS["llm_sft"].load_trained(spec, tmp_path / "adapter", "cpu")
    assert again.eval_loss() == pytest.approx(scored.scores.eval_loss, abs=1e-4)
    assert again.answer(bench.data.test.select(range(4))) == [answer for answer, _ in scored.answers]
    resumed, second = trained(spec, tmp_path / "stage")
    assert second.resumed_from_step == 2
    assert second.losses[-1] == pytest.approx(first.losses[-1], rel=1e-5)
    assert resumed.eval_loss() == pytest.approx(scored.scores.eval_loss, rel=1e-5)


def test_adalora_ends_with_the_ranks_of_its_target(tiny_model, questions, tmp_path):
    method = {"name": "adalora", "rank": 4, "target_rank": 1, "begin": 0.0, "end": 0.3, "lr": 0.01}
    bench, _ = trained(plain(tiny_model, questions, method, train__steps=8), tmp_path / "stage")
    left = sum(int((p != 0).sum()) for name, p in bench.model.named_parameters() if "lora_E" in name)
    assert 0 < left <= 14 * 1  # 14 target layers, one rank each on average


def test_lora_plus_has_two_rates_and_lora_fa_one_matrix(tiny_model, questions):
    plus = plain(tiny_model, questions, {"name": "lora_plus", "rank": 4, "lr": 0.001, "ratio": 4.0})
    bench = TASKS["llm_sft"].load(plus, "cpu")
    bench.attach(plus.method)
    groups = plus.method.optimizer(bench.model).param_groups
    assert [group["lr"] for group in groups] == [0.001, 0.004]
    assert all(len(p) == 4 for p in groups[0]["params"])
    assert all(p.shape[1] == 4 for p in groups[1]["params"])
    fixed = plain(tiny_model, questions, {"name": "lora_fa", "rank": 4})
    bench = TASKS["llm_sft"].load(fixed, "cpu")
    bench.attach(fixed.method)
    # Each of 2 layers: q, o 64 rows, k, v 32, gate, up 128, down 64, all of rank 4.
    assert sum(p.numel() for p in trainable(bench.model)) == 2 * 4 * (64 + 64 + 32 + 32 + 128 + 128 + 64)


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ({"name": "dora"}, {"model__quantization": "int8"}, "dora cannot be trained on a base in int8"),
        ({"name": "pissa"}, {"model__quantization": "nf4"}, "saved adapter would belong to another base"),
        ({"name": "peft", "adapter": "loha"}, {"model__quantization": "nf4"}, "plain weights"),
        ({"name": "oft"}, {"train__engine": "trl"}, "trains lora and qlora alone"),
        ({"name": "prefix_tuning"}, {"train__gradient_checkpointing": True}, "use method prompt_tuning"),
        ({"name": "prompt_tuning"}, {"evaluation__benchmarks": {"tasks": ["x"]}}, "virtual tokens .*shift"),
        ({"name": "adalora", "begin": 0.6, "end": 0.5}, {}, "leave no steps"),
        ({"name": "adalora", "rank": 4}, {}, r"target_rank \(8\) is above rank \(4\)"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(method, changes, words):
    with pytest.raises(ValidationError, match=words):
        plain("m/m", "d/d", method, **changes)


def test_members_with_virtual_tokens_are_refused():
    sources = [{"recipe": "prompt_completion", "path": "d/d", "train": 40, "test": 8, "validation": 8}]
    members = [{"method": {"name": "prompt_tuning"}}, {"method": {"name": "lora"}}]
    with pytest.raises(ValidationError, match="prompt_tuning puts virtual tokens before each row"):
        plain("m/m", "d/d", {"name": "ensemble", "members": members}, data__sources=sources)


def test_a_base_that_a_trial_may_change_is_not_kept_for_the_next(tiny_model, questions):
    from ray_peft.tasks.llm_sft.model import base_key

    assert base_key(plain(tiny_model, questions, {"name": "hra"}), "cpu") is not None
    assert base_key(plain(tiny_model, questions, {"name": "pissa"}), "cpu") is None
    assert base_key(plain(tiny_model, questions, {"name": "lora"}, model__quantization="int8"), "cpu") is None


@pytest.mark.parametrize(
    ("architecture", "settings", "layers", "feedforward"),
    [
        ("llama", {}, {"k_proj", "v_proj", "down_proj"}, {"down_proj"}),
        ("gpt2", {}, {"c_attn", "c_proj"}, {"c_proj"}),
        ("gpt2", {"feedforward": ()}, {"c_attn", "c_proj"}, set()),
        ("gpt_neox", {}, {"query_key_value", "dense_4h_to_h"}, {"dense_4h_to_h"}),
        ("opt", {}, {"q_proj", "k_proj", "fc2"}, {"fc2"}),
    ],
)
def test_ia3_goes_where_the_architecture_has_its_layers(architecture, settings, layers, feedforward):
    from peft.tuners.ia3.layer import IA3Layer

    adapted = IA3(**settings).attach(tiny_architectures.on_meta(architecture))
    placed = [(name, module) for name, module in adapted.named_modules() if isinstance(module, IA3Layer)]
    assert {name.rpartition(".")[2] for name, _ in placed} == layers
    assert {name.rpartition(".")[2] for name, module in placed if module.is_feedforward} == feedforward
    assert not any("attn.c_proj" in name for name, _ in placed)
