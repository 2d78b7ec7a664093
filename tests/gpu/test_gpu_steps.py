"""Between two lines of the log nothing waits for the GPU: torch raises where something does."""

from __future__ import annotations

import pytest
import tiny
import torch

from ray_peft.engine.loop import Engine
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.task import LlmSft

pytestmark = pytest.mark.gpu

METHODS = [
    {"name": "lora", "rank": 4},
    {"name": "full"},
    {"name": "full", "weights": "float32"},
    {"name": "galore", "rank": 4, "weight_decay": 0.1},
    {"name": "galore", "rank": 4, "weights": "float32"},
    {"name": "galore", "rank": 4, "moments": "8bit", "gradients": "host"},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: ", ".join(map(str, method.values())))
def test_a_step_waits_for_nothing(tiny_model, tmp_path, monkeypatch, method):
    monkeypatch.setattr("ray_peft.methods.host_gradients.SMALL", 100)
    rows = [{"prompt": "Say it.", "completion": "word " * 8}] * 64
    questions = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    changes = {"train__steps": 9, "train__log_every": 100, "train__micro_batch_size": 4, "train__precision": "bf16"}
    plain = tiny.plain_spec(tiny_model, questions, method, **changes)
    plain["data"]["contamination"] = {"action": "allow"}
    spec = TrialSpec.from_plain(plain)
    bench = LlmSft().load(spec, "cuda:0")
    usual, watched = Engine._round, []

    def step(self, number):
        if 4 <= number < 8:  # the first ones load libraries, record passes and find subspaces; the last one is the end
            torch.cuda.set_sync_debug_mode("error")
            watched.append(number)
        try:
            usual(self, number)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Engine, "_round", step)
    ((stage, steps),) = spec.method.stages(bench.total_steps())
    bench.attach(stage)
    outcome = bench.train(stage, steps, 0, tmp_path / "out", lambda metrics, step: None)
    assert outcome.passes == "recorded"
    assert watched == [4, 5, 6, 7]
