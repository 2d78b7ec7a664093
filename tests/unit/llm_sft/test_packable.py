"""Which trials may share a base is a rule on settings."""

import pytest
import tiny

from ray_peft.errors import SpecError
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.packable import check, packs, why_alone


def spec(method=None, **changes):
    return TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d", {"name": "lora", **(method or {})}, **changes))


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        (spec({"name": "full"}), "method full has no adapter"),
        (spec({"name": "galore"}), "method galore has no adapter"),
        (spec({"optim": "adamw_8bit"}), "method.optim adamw_8bit .*; use optim: adamw"),
        (spec(train__engine="trl"), "train.engine trl .*; use engine: own"),
        (spec(resources__num_workers=2), "resources.num_workers is 2"),
    ],
)
def test_who_shares_with_none(trial, words):
    with pytest.raises(SpecError, match=f"trial {trial.trial_id} cannot train together with others: {words}"):
        check([spec(), trial])
    assert [len(group) for group in packs([spec(), trial, spec(seed=9), trial])] == [2, 1, 1]


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        (spec(model__name="m/other"), "model.name is m/m and m/other"),
        (spec(model__dtype="bfloat16"), "model.dtype is float32 and bfloat16"),
        (spec({"name": "qlora"}), "the base's quantization is None and {"),
        (spec({"adapter_dtype": "bfloat16"}), "method.adapter_dtype is float32 and bfloat16"),
        (spec(train__precision="bf16"), "train.precision is fp32 and bf16"),
    ],
)
def test_what_all_must_share(trial, words):
    assert why_alone(trial) is None
    with pytest.raises(SpecError, match=words):
        check([spec(), trial])
    assert [len(group) for group in packs([spec(), trial, spec(seed=9)])] == [2, 1]


def test_what_may_differ():
    trials = [
        spec(
            {
                "rank": 64,
                "alpha": 3,
                "dropout": 0.1,
                "lr": 1.0,
                "weight_decay": 0.1,
                "max_grad_norm": None,
                "targets": ["q_proj"],
            }
        ),
        spec(train__steps=9, train__batch_size=12, train__schedule="linear", train__warmup_steps=2, seed=9),
        spec(train__loss="all", train__eval_every=2, data__max_length=48),
    ]
    check([spec(), *trials])
    assert len(packs([spec(), *trials])) == 1
