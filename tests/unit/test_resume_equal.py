"""A trial that is stopped and goes on is the trial that nobody stopped: row, logged points and weights."""

from __future__ import annotations

import pytest
import tiny
import tiny_diffusion
from gone_on import assert_same_trial, attempt
from untracked import HYBRID

from ray_peft.spec import TrialSpec

LORA = {"name": "lora", "rank": 4, "lr": 0.01}
QLORA = {"name": "qlora", "rank": 4, "lr": 0.01, "compute_dtype": "float32"}
FULL = {"name": "full", "lr": 0.003, "weights": "float32"}
GALORE = {"name": "galore", "rank": 4, "lr": 0.01, "update_proj_gap": 4, "weights": "float32"}
CASES = {
    "lora": ("llm_sft", LORA, {}),
    "lora-dropout": ("llm_sft", LORA | {"dropout": 0.2}, {}),
    "qlora": ("llm_sft", QLORA | {"dropout": 0.1}, {}),
    "full": ("llm_sft", FULL, {}),
    "full-bfloat16": ("llm_sft", {"name": "full", "lr": 0.003}, {}),
    "galore": ("llm_sft", GALORE, {}),
    "galore-bfloat16": ("llm_sft", GALORE | {"weights": "bfloat16"}, {}),
    "galore-layerwise": (
        "llm_sft",
        GALORE | {"layerwise": True, "max_grad_norm": None},
        {"train__micro_batch_size": 8},
    ),
    "hybrid": ("llm_sft", HYBRID, {}),
    "images-lora": ("text_to_image", LORA, {"train__ema_decay": 0.9}),
    "images-dropout": ("text_to_image", LORA | {"dropout": 0.2}, {}),
    "images-qlora": ("text_to_image", QLORA, {}),
    "images-full": ("text_to_image", FULL, {"train__ema_decay": 0.9}),
}
STEPS = 12
SCHEDULE = {"train__steps": STEPS, "train__log_every": 2, "train__eval_every": 4, "train__warmup_steps": 3}


@pytest.fixture(scope="module")
def spec_of(request, tiny_model, questions):
    def spec(case, **changes):
        task, method, more = CASES[case]
        if task == "llm_sft":
            more = {"evaluation__generate": False, **SCHEDULE, **more, **changes}
            return TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, method, **more))
        painter, paintings = (request.getfixturevalue(name) for name in ("tiny_painter", "paintings"))
        more = {"evaluation__prompts": [], **SCHEDULE, **more, **changes}
        return TrialSpec.from_plain(tiny_diffusion.plain_spec(painter, paintings, method, **more))

    return spec


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_trial_is_the_undisturbed_one(spec_of, tmp_path, case):
    with tiny.one_thread():
        undisturbed = attempt(spec_of(case), tmp_path / "whole")
        spec = spec_of(case, train__checkpoint_every=3)
        # A hybrid's stages have four and eight steps or so: one stop in each.
        for stop_at in (4, 10):
            with pytest.raises(KeyboardInterrupt):
                attempt(spec, tmp_path / "stopped", stop_at)
        row, points = attempt(spec, tmp_path / "stopped")
    assert row.resumed_from_step == 9
    assert_same_trial(tmp_path / "stopped", row, points, (tmp_path / "whole", *undisturbed))
