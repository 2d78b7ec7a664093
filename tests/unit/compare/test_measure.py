"""Which methods fit a GPU that is pretended, and what a comparison there asks for."""

import pytest
import tiny

from ray_peft.checks.trials import inspect_trials
from ray_peft.compare import measure
from ray_peft.compare.setup import looked_at, set_up
from ray_peft.compare.space_text import written
from ray_peft.compare.speed_trials import speed_space, without_imports
from ray_peft.foundation.audience import Silence
from ray_peft.schedule.decide import Node
from ray_peft.space.read import parse
from ray_peft.trial.speed import Speed

H100 = Node(16, 1, "NVIDIA H100 80GB HBM3", 79.0)
METHODS = ("full", "lora", "qlora", "galore")


@pytest.fixture
def setup(tiny_model, tmp_path):
    rows = [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in range(1200)]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    return set_up(looked_at(str(tiny_model), str(path), METHODS, "rouge_l"), name="a", methods=METHODS, nodes=[H100])


def test_on_a_gpu_trials_have_it_to_themselves_in_bf16_and_methods_that_do_not_fit_are_left_out(setup):
    space = speed_space(setup)
    parsed = parse(written(space, "", {}), "speed")
    trials = {trial.method.name: trial for trial in inspect_trials(parsed.trials, Silence()).trials}
    assert set(trials) == {"none", *METHODS}
    lora = trials["lora"]
    assert (lora.train.precision, lora.train.fit, lora.model.dtype) == ("bf16", "auto", "bfloat16")
    assert (lora.resources.gpus_per_worker, lora.train.batch_size) == (1, 16)
    left_out, memory_gib, settled = measure._fitting(setup, trials, None)
    assert left_out == {}
    assert set(memory_gib) == set(settled) == set(trials)
    assert settled["lora"].train.micro_batch_size == 16  # what fit: auto chooses there
    left_out, _, settled = measure._fitting(setup, trials, 0.85)
    assert set(left_out) == set(METHODS)
    assert set(settled) == {"none"}
    assert "more than 0.85 GiB hold" in left_out["full"]
    assert measure._device(setup) == H100.gpu_name


def test_the_imports_of_the_first_trial_are_taken_out_of_its_time():
    class Row:
        def __init__(self, started_at):
            self.provenance = type("Provenance", (), {"started_at": started_at})

    speeds = {name: Speed(row_tokens=9.0, rest_s=rest) for name, rest in (("a", 2.0), ("b", 12.0), ("c", 3.0))}
    rows = {"a": Row("10:00:30"), "b": Row("10:00:00"), "c": Row("10:00:20")}
    lighter, imports_s = without_imports(speeds, rows)
    assert imports_s == 9.0
    assert [lighter[name].rest_s for name in "abc"] == [2.0, 3.0, 3.0]
    assert without_imports({"a": speeds["a"]}, rows) == ({"a": speeds["a"]}, 0.0)
