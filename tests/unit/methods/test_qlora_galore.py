"""The hybrid: no step is lost, and the loss on both sides of the merge is the same to a small number."""

import pytest
import tiny
from pydantic import ValidationError

from ray_peft.errors import SpecError
from ray_peft.methods.qlora_galore import QLoRAThenGaLore
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.task import LlmSft

METHOD = {
    "name": "qlora_galore",
    "switch_at": 0.5,
    "qlora": {"rank": 4, "lr": 0.01, "compute_dtype": "float32"},
    "galore": {"rank": 8, "lr": 0.01},
}


def test_the_studys_split_gives_two_epochs_of_three():
    (first, one), (second, two) = QLoRAThenGaLore().stages(2814)
    assert (first.name, one, second.name, two) == ("qlora", 1876, "galore", 938)


def test_a_stage_without_steps_is_refused():
    with pytest.raises(SpecError, match="of 1 steps leaves GaLore without a step"):
        QLoRAThenGaLore().stages(1)
    with pytest.raises(SpecError, match="leaves QLoRA without a step"):
        QLoRAThenGaLore(switch_at=0.01).stages(10)


def test_the_second_stage_s_rules_hold():
    method = {**METHOD, "galore": {"layerwise": True}}
    with pytest.raises(ValidationError, match="cannot accumulate"):
        TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d", method))


def test_stages_train_on_and_the_merge_costs_little(tiny_model, questions, tmp_path):
    spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, METHOD, train__steps=16))
    bench = LlmSft().load(spec, "cpu")
    losses = [bench.eval_loss()]
    done = 0
    for index, (stage, steps) in enumerate(spec.method.stages(bench.total_steps())):
        bench.attach(stage)
        outcome = bench.train(stage, steps, done, tmp_path / str(index), lambda metrics, step: None)
        done += outcome.steps
        losses.append(bench.eval_loss())
        if index == 0:
            bench.merge(stage)
            losses.append(bench.eval_loss())
            assert not any(hasattr(parameter, "quant_state") for parameter in bench.model.parameters())
    before, after_qlora, after_merge, after_galore = losses
    assert done == 16
    assert after_qlora < before - 0.1
    assert after_merge == pytest.approx(after_qlora, abs=0.02)
    assert after_galore < after_merge - 0.1
    assert bench.parameters()[0] == bench.parameters()[1]
