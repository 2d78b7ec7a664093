"""Which layers targets mean, and what is refused, on shapes alone."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import tiny_architectures
from pydantic import ValidationError

from ray_peft.errors import ModelError, SpecError
from ray_peft.methods.galore import GaLore
from ray_peft.methods.lora import LoRA
from ray_peft.methods.qlora_galore import QLoRAThenGaLore

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
OF = {"of": "a model", "key": "method"}

model = cache(tiny_architectures.on_meta)


def adapted(architecture, **settings):
    """Names of the layers and parameters that really carry an adapter after PEFT has put it there."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    attached = LoRA(rank=4, **settings).attach(copy.deepcopy(model(architecture)))
    found = set()
    for name, module in attached.named_modules():
        if isinstance(module, BaseTunerLayer):
            short = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found.add(f"{short}.{module.parameter_name}" if hasattr(module, "parameter_name") else short)
    return found


def each_layer(prefix, names):
    return {prefix.format(layer) + name for layer in (0, 1) for name in names}


@pytest.mark.parametrize(
    ("architecture", "names", "experts"),
    [
        ("llama", SEVEN, ()),
        ("gpt2", ("c_attn", "c_proj", "c_fc"), ()),
        ("gpt_neox", NEOX, ()),
        ("falcon", NEOX, ()),
        ("bloom", NEOX, ()),
        ("phi3", ("o_proj", "qkv_proj", "gate_up_proj", "down_proj"), ()),
        ("opt", ("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"), ()),
        ("mpt", ("Wqkv", "out_proj", "up_proj", "down_proj"), ()),
        ("mixtral", ("q_proj", "k_proj", "v_proj", "o_proj"), EXPERTS),
        ("qwen3_moe", ("q_proj", "k_proj", "v_proj", "o_proj"), EXPERTS),
        ("deepseek_v3", ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), EXPERTS),
        ("mamba", ("in_proj", "x_proj", "dt_proj"), ()),
    ],
)
def test_the_default_means_the_layers_of_a_block_by_the_names_of_the_architecture(architecture, names, experts):
    placed = LoRA().placed(model(architecture))
    assert (placed.modules, placed.parameters) == (names, experts)
    assert adapted(architecture) == {*placed.layers, *placed.experts}
    assert len(placed.layers) >= 2 * len(names) - (architecture == "mamba")


def test_project_layers_outside_of_the_blocks_get_none():
    assert not [name for name in LoRA().placed(model("opt")).layers if "project" in name]


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("q_proj",), ("q_proj",)),
        (("self_attn.q_proj", "v_proj"), ("q_proj", "v_proj")),
        ((".*q_proj",), ("q_proj",)),
        (("q_proj|v_proj",), ("q_proj", "v_proj")),
        ((r"model\.layers\.\d+\.self_attn\.[qv]_proj",), ("q_proj", "v_proj")),
    ],
)
def test_targets_are_ends_of_names_or_patterns(targets, names):
    assert adapted("llama", targets=targets) == each_layer("model.layers.{}.self_attn.", names)


def test_a_pattern_may_choose_layers_by_number():
    assert adapted("llama", targets=(r"layers\.1\..*_proj",)) == {
        name for name in LoRA().placed(model("llama")).layers if ".1." in name
    }


def test_all_linear_is_every_linear_layer_but_the_output_s():
    assert adapted("llama", targets=("all-linear",)) == adapted("llama")
    assert "model.decoder.project_in" in adapted("opt", targets=("all-linear",))


def test_one_name_needs_no_list():
    assert LoRA.from_plain({"targets": "all-linear"}) == LoRA(targets=("all-linear",))
    assert GaLore.from_plain({"targets": "mlp"}) == GaLore(targets=("mlp",))
    assert LoRA.from_plain({"targets": ["q_proj", "v_proj"]}).targets == ("q_proj", "v_proj")


@pytest.mark.parametrize("targets", [[""], ["q_proj", " "], ["("], ["[z-a]"], []])
def test_words_that_no_model_can_have_are_refused(targets):
    for method in (LoRA, GaLore):
        with pytest.raises(ValidationError, match="targets"):
            method.from_plain({"targets": targets})


@pytest.mark.parametrize(
    ("architecture", "targets", "words"),
    [
        ("llama", ("q_proj", "vv_proj"), r"^method.targets: vv_proj is no layer of a model; did you mean v_proj\?"),
        ("llama", ("Q_Proj",), r"did you mean q_proj\?"),
        ("llama", (" k_proj",), r"did you mean k_proj\?"),
        ("llama", ("q_proj, v_proj",), r"did you mean \[q_proj, v_proj\]\?"),
        ("llama", ("c_attn",), "c_attn is no layer .* end in embed_tokens, q_proj, k_proj, v_proj, o_proj"),
        ("gpt2", ("q_proj",), "q_proj is no layer .* end in wpe, c_attn, c_proj, c_fc$"),
        ("llama", (".*qq.*",), "is no layer"),
        ("llama", ("input_layernorm",), "is a LlamaRMSNorm of a model, beside which no adapter"),
        ("llama", ("q_proj", "mlp"), "mlp is a LlamaMLP of a model, which holds layers"),
        ("llama", ("lm_head",), "lm_head is the output layer"),
        ("llama", (".*",), "lm_head is the output layer"),
        ("gpt2", ("wte",), r"wte of a model shares its weight with lm_head \(tied"),
        ("gpt2", ("c_fc", "lm_head"), "lm_head is the output layer"),
        ("mixtral", ("w1",), "w1 is no layer .* experts.gate_up_proj, experts.down_proj$"),
        ("deepseek_v3", ("gate_proj",), "PEFT takes gate_proj of this architecture for its fused experts"),
        ("mamba", ("out_proj",), "out_proj is a Linear of a model, beside which no adapter"),
    ],
)
def test_what_cannot_be_trained_is_one_error_with_the_names_that_are_there(architecture, targets, words):
    with pytest.raises(ModelError, match=words) as caught:
        LoRA(targets=targets).check(model(architecture), **OF)
    assert len(str(caught.value).splitlines()) == 1


def test_fused_experts_are_named_like_layers():
    assert adapted("mixtral", targets=("gate_up_proj", "q_proj")) == {
        *each_layer("model.layers.{}.mlp.experts.", ["gate_up_proj"]),
        *each_layer("model.layers.{}.self_attn.", ["q_proj"]),
    }


def test_dropout_on_fused_experts_is_refused():
    with pytest.raises(SpecError, match=r"^method.dropout: 0.1 cannot be put on the input of fused experts"):
        LoRA(dropout=0.1).check(model("mixtral"), **OF)
    assert LoRA(dropout=0.1, targets=("q_proj",)).check(model("mixtral"), **OF) == []


def test_an_embedding_of_its_own_weight_may_have_an_adapter():
    assert adapted("llama", targets=("embed_tokens",)) == {"model.embed_tokens"}


def test_what_the_default_does_not_reach_is_said():
    assert LoRA().check(model("llama"), **OF) == []
    (where,) = LoRA(rank=4).check(model("gpt2"), **OF)
    assert where == "lora: adapters go beside c_attn, c_proj, c_fc, the layers of a block of a model"
    _, left = LoRA(rank=4).check(model("deepseek_v3"), **OF)
    assert "adapters reach 58%" in left
    assert "shared_experts.down_proj (3%)" in left


def test_a_rank_above_the_layers_is_said():
    (said,) = LoRA(rank=500).check(model("llama"), **OF)
    assert "rank of 500 is above the smaller side of every target layer (32 to 64)" in said
    (said,) = LoRA(rank=48).check(model("llama"), **OF)
    assert "above the smaller side of 4 of 14 target layers (32)" in said
    said = GaLore(rank=64).check(model("llama"), **OF)
    assert "above the smaller side of 4 of 14" in said[-1]


@pytest.mark.parametrize(
    ("architecture", "share"), [("llama", 68), ("gpt2", 65), ("gpt_neox", 64), ("mixtral", 10), ("opt", 58)]
)
def test_galore_says_which_share_it_projects(architecture, share):
    stage = GaLore(rank=8)
    (said,) = stage.check(model(architecture), **OF)
    shapes = model(architecture)
    counted = sum(p.numel() for p in stage.target_weights(shapes)) / sum(p.numel() for p in shapes.parameters())
    assert (
        said == f"galore: {counted:.0%} of the trained weights of a model are projected; plain AdamW trains the others"
    )
    assert round(100 * counted) == share


def test_galore_targets_are_parts_of_names_patterns_or_all():
    shapes = model("llama")
    assert len(GaLore(targets=("q_proj",)).target_weights(shapes)) == 2
    assert len(GaLore(targets=(r"\.[qk]_proj$",)).target_weights(shapes)) == 4
    assert len(GaLore(targets=("all-linear",)).target_weights(shapes)) == 14
    with pytest.raises(
        SpecError, match=r"^method.targets: no linear layer's name contains any of vv_proj; .* of a mod"
    ):
        GaLore(targets=("mlp", "vv_proj")).check(shapes, **OF)


def test_parts_of_a_hybrid_have_their_place_in_the_settings():
    assert [key for key, _ in QLoRAThenGaLore().parts()] == ["method.qlora", "method.galore"]
    assert [key for key, _ in LoRA().parts()] == ["method"]
