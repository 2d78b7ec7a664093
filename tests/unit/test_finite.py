"""Where numbers are not finite, the way out names settings that the trial has and that are not there yet."""

from __future__ import annotations

import pytest
import tiny
from untracked import HYBRID, run

from ray_peft.spec import TrialSpec
from ray_peft.tasks.finite import ways_out
from ray_peft.tasks.llm_sft.task import LlmBench


@pytest.mark.parametrize(
    ("method", "changes", "place", "words"),
    [
        ({"name": "lora"}, {}, 0, "lower method.lr, or add train.warmup_steps"),
        ({"name": "lora"}, {"train__warmup_ratio": 0.1}, 0, "lower method.lr"),
        (HYBRID, {"train__warmup_steps": 2}, 0, "lower method.qlora.lr"),
        (HYBRID, {"train__warmup_steps": 2}, 1, "lower method.galore.lr"),
        (
            {"name": "lora"},
            {"train__precision": "bf16", "model__dtype": "float16"},
            0,
            "lower method.lr, add train.warmup_steps, use train.precision: fp32, "
            "or use model.dtype: float32 or bfloat16",
        ),
        (
            {"name": "qlora", "compute_dtype": "float16"},
            {"train__warmup_steps": 2},
            0,
            "lower method.lr, or use compute_dtype: float32 or bfloat16 for the 4-bit base",
        ),
        ({"name": "none"}, {}, None, "look for NaN and infinity in the weights of org/tiny"),
        (
            {"name": "none"},
            {"train__precision": "bf16"},
            None,
            "use train.precision: fp32, or look for NaN and infinity in the weights of org/tiny",
        ),
    ],
)
def test_the_ways_out_are_the_trial_s_own(method, changes, place, words):
    plain = tiny.plain_spec("org/tiny", "a.jsonl", method, **changes)
    spec = TrialSpec.from_plain(plain)
    stage = None if place is None else spec.method.stages(10)[place][0]
    assert ways_out(spec, stage) == words


def test_a_base_with_nan_in_its_weights_is_told_so(tiny_model, questions, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    spec = TrialSpec.from_plain(tiny.plain_spec(broken, questions, {"name": "none"}))
    result, _ = run(spec, tmp_path / "out")
    assert result.status == "failed"
    assert "weight model.layers.0.mlp.up_proj.weight holds NaN or infinite values" in result.error
    assert "lower method.lr" not in result.error


def test_a_loss_between_stages_that_is_not_finite_ends_the_trial(tiny_model, questions, tmp_path, monkeypatch):
    spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, HYBRID))
    merge = LlmBench.merge

    def overflow(bench, stage):
        merge(bench, stage)
        next(bench.model.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(LlmBench, "merge", overflow)
    result, tracker = run(spec, tmp_path)
    assert result.status == "failed"
    assert result.error.startswith("the held-out loss is nan after merge 1; lower method.qlora.lr")
    assert result.boundary_losses["after stage 1"] > 0
    assert str(result.boundary_losses["after merge 1"]) == "nan"
    assert tracker.rows == [result]
