"""Any adapter of PEFT's by its config: what is known of each kind, and settings that are refused with the way out."""

from __future__ import annotations

import pytest
import tiny
import torch
from pydantic import ValidationError

from ray_peft.errors import ModelError, SpecError
from ray_peft.methods.adapters.peft_config import AnyAdapter
from ray_peft.methods.kinds import KINDS, config_type, known
from ray_peft.spec import TrialSpec

SETTINGS = {
    "ADALORA": {"total_step": 10, "target_r": 2, "init_r": 4},
    "C3A": {"block_size": 32},
    "IA3": {"feedforward_modules": []},
    "PREFIX_TUNING": {"num_virtual_tokens": 2},
    "PROMPT_TUNING": {"num_virtual_tokens": 2},
    "P_TUNING": {"num_virtual_tokens": 2, "encoder_hidden_size": 8},
    "ROAD": {"group_size": 32},
    "VBLORA": {"vector_length": 32, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 10},
}
"""What a kind needs on layers of 64 by 64; others have defaults, with rank 4."""
SERVING = [kind for kind, known_of in KINDS.items() if known_of.serves is None]


def test_the_table_has_peft_s_kinds():
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    assert set(KINDS) == {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


@pytest.mark.parametrize("kind", SERVING)
def test_a_kind_trains_on_four_bits_as_the_table_says(kind, tiny_model):
    from peft import get_peft_model

    from ray_peft.tasks.llm_sft.model import load_model

    plain = tiny.plain_spec(tiny_model, "d/d", model__quantization={"quant_type": "nf4", "compute_dtype": "float32"})
    base = load_model(TrialSpec.from_plain(plain), "cpu")

    fields = config_type(kind).__dataclass_fields__
    settings = {"r": 4} if fields.get("r") and kind != "ADALORA" else {}
    settings |= {"oft_block_size": 16, "r": 0} if kind == "OFT" else {}
    settings |= {"target_modules": ["v_proj"]} if "target_modules" in fields else {}
    settings |= {"target_modules": ["input_layernorm"]} if kind == "LN_TUNING" else {}
    ids = torch.arange(16)[None]

    def gradients():
        adapted = get_peft_model(base, config_type(kind)(task_type="CAUSAL_LM", **settings, **SETTINGS.get(kind, {})))
        adapted(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in adapted.parameters() if p.requires_grad and p.grad is not None]

    try:
        trains = any(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients())
    except (RuntimeError, TypeError, ValueError):
        trains = False
    assert trains == (KINDS[kind].quantised is None)


def spec(model, **method):
    return TrialSpec.from_plain(tiny.plain_spec(model, "d/d", {"name": "peft", **method}))


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("lokrr", "PEFT has no adapter 'lokrr', did you mean lokr?"),
        ("xlora", "cannot be trained here: it needs more than rows: trained LoRA adapters"),
        ("poly", "the task of each row"),
    ],
)
def test_a_kind_that_cannot_serve_is_refused_at_once(adapter, words):
    with pytest.raises(ValidationError, match=words):
        spec("m/m", adapter=adapter)
    with pytest.raises(ValueError, match=words):
        known(adapter)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            {"adapter": "lokr", "config": {"rnk": 4}},
            r"config.rnk: PEFT's LoKrConfig has no such field .*it has rank_pattern, ",
        ),
        ({"adapter": "lokr", "config": {"alpah": 4}}, "did you mean alpha?"),
        ({"adapter": "lokr", "config": {"r": "4"}}, r"config.r: must be int \(found '4'\)"),
        ({"adapter": "lokr", "config": {"target_modules": ["q_proj"]}}, "is method.targets here"),
        ({"adapter": "lora", "config": {"init_lora_weights": "pissa"}}, "use method pissa or olora"),
        ({"adapter": "adalora"}, "use method adalora"),
        ({"adapter": "p_tuning", "config": {"num_virtual_tokens": 2}, "targets": "q_proj"}, "changes no layers"),
        ({"adapter": "delora", "config": {"r": 0}}, "PEFT refuses these settings of peft: `r` must be a positive"),
    ],
)
def test_a_field_that_peft_does_not_have_is_refused_before_anything_starts(method, words, tiny_model):
    from ray_peft.tasks.llm_sft import targets

    with pytest.raises(SpecError, match=words):
        targets.check(spec(tiny_model, **method))


def test_names_that_are_not_in_the_model_are_refused_with_those_that_are(tiny_model):
    from ray_peft.tasks.llm_sft import targets

    for method, words in [
        ({"name": "hra", "targets": "qkv_proj"}, "qkv_proj is no layer of .*end in q_proj"),
        ({"name": "ln_tuning", "targets": "q_proj"}, "q_proj is no norm of .*end in input_layernorm"),
        ({"name": "lora", "modules_to_save": ["norms"]}, "norms is no module of .* with weights of its own"),
        ({"name": "lora", "modules_to_save": ["lm_head"]}, "lm_head is the output layer"),
        ({"name": "lora", "rank_pattern": {"fc1": 4}}, "rank_pattern: fc1 matches no target layer"),
    ]:
        trial = TrialSpec.from_plain(tiny.plain_spec(tiny_model, "d/d", method))
        with pytest.raises((ModelError, SpecError), match=words):
            targets.check(trial)


def test_a_kind_without_a_method_says_how_many_parameters_it_trains(tiny_model):
    from ray_peft.tasks.llm_sft import targets

    (note,) = targets.check(spec(tiny_model, adapter="C3A", config={"block_size": 32}, targets=["q_proj"]))
    # 2 layers of 64 x 64 in blocks of 32: 2 x 2 kernels of 32 numbers each.
    assert note.startswith("peft: 256 parameters are trained, ")
    assert AnyAdapter(adapter="C3A").peft_kind == "C3A"
