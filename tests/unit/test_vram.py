"""Predicted bytes against bytes worked out by hand, and against what torch really keeps on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny

from ray_peft.foundation.units import GIB
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.memory import predict
from ray_peft.vram import ModelShape, nearest
from ray_peft.vram.cards import ANY, known

ROOT = Path(__file__).resolve().parents[2]
LAYERS, HIDDEN, INNER, VOCABULARY, KEYS = 2, 256, 512, 1024, 128
LINEARS = [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN), (INNER, HIDDEN), (INNER, HIDDEN),
           (HIDDEN, INNER)]  # fmt: skip
LINEAR = LAYERS * sum(rows * columns for rows, columns in LINEARS)
REST = VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
"""The tied embedding and the norms."""


@pytest.fixture(scope="module")
def shape(shared):
    from transformers import LlamaConfig

    return ModelShape.from_config(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        )
    )  # fmt: skip


def spec(method, **changes) -> TrialSpec:
    changes = {"train__precision": "bf16", "model__dtype": "bfloat16", **changes}
    return TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d", method=method, **changes))


def parts(shape, method, tokens=32, **changes):
    return predict(spec(method, **changes), shape, longest_tokens=tokens).components


def close(found: int, wanted: int, tensors: int) -> bool:
    """Equal, but for the allocator's rounding of each tensor up to 512 bytes, and the rotary frequencies."""
    return wanted <= found <= wanted + 512 * (tensors + 4)


def test_plain_weights_take_their_numbers_times_their_bytes(shape):
    prediction = predict(spec({"name": "none"}), shape, longest_tokens=32)
    assert close(prediction.peak_allocated, 2 * (LINEAR + REST), 20)
    assert prediction.components == {"weights": prediction.peak_allocated}
    assert prediction.evaluation > prediction.peak_allocated


def test_nf4_takes_half_a_byte_and_a_double_quantised_scale_for_64(shape):
    found = parts(shape, {"name": "qlora", "rank": 4})
    assert close(found["weights"], LINEAR // 2 + 2 * REST, 40)
    assert close(found["quantization"], LINEAR // 64 + LINEAR // 64 // 256 * 4, 2 * 14)
    single = parts(shape, {"name": "qlora", "rank": 4, "double_quant": False})
    assert close(single["quantization"], LINEAR // 64 * 4, 14)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_adapters_and_their_moments(shape, dtype, size):
    numbers = LAYERS * sum(4 * (rows + columns) for rows, columns in LINEARS)
    found = parts(shape, {"name": "lora", "rank": 4, "adapter_dtype": dtype})
    assert close(found["adapters"], size * numbers, 28)
    assert close(found["gradients"], size * numbers, 28), "two passes a step: gradients are there with activations"
    assert close(found["optimizer"], 2 * size * numbers, 3 * 28)


def test_moments_in_8_bits_have_a_scale_for_256_numbers(shape):
    full = {"name": "full", "weights": "float32"}
    assert close(parts(shape, full)["optimizer"], 8 * (LINEAR + REST), 3 * 20)
    large, norms = LINEAR + VOCABULARY * HIDDEN, (2 * LAYERS + 1) * HIDDEN
    wanted = 2 * (large + large // 256 * 4) + 8 * norms
    assert close(parts(shape, {**full, "optim": "adamw_8bit"})["optimizer"], wanted, 4 * 20)


BLOCK, OUTSIDE = LINEAR // LAYERS + 2 * HIDDEN, (VOCABULARY + 1) * HIDDEN
"""Numbers of a layer with its norms, and of the tied embedding with the last norm."""


@pytest.mark.parametrize("workers", [2, 4])
def test_a_worker_of_a_spread_model_holds_its_part_and_what_it_gathers(shape, workers):
    """In bfloat16: frozen weights are divided, adapters are not; two blocks and the buffer of one are gathered."""
    changes = {"train__batch_size": 8, "train__micro_batch_size": 2, "resources__num_workers": workers}
    alone = parts(shape, {"name": "lora", "rank": 4}, **changes)
    spread = parts(shape, {"name": "lora", "rank": 4}, **changes, resources__strategy="fsdp")
    assert close(spread["weights"], 2 * (LINEAR + REST) // workers, 30)
    assert close(spread["gathered"], 2 * (OUTSIDE + 3 * BLOCK), 0)
    for kind in ("adapters", "gradients", "optimizer"):
        assert spread[kind] == alone[kind]

    trained = parts(shape, {"name": "full"}, **changes, resources__strategy="fsdp")
    for kind, numbers in (("weights", 1), ("gradients", 1), ("optimizer", 2)):
        assert close(trained[kind], numbers * 2 * (LINEAR + REST) // workers, 30 * numbers)
    assert close(trained["gathered"], 2 * (2 * OUTSIDE + 5 * BLOCK), 0)


def test_an_evaluation_of_a_spread_model_gathers_it_as_training_does(shape):
    changes = {"train__batch_size": 8, "train__micro_batch_size": 2, "resources__num_workers": 2}
    alone, spread = (
        predict(spec({"name": "none"}, **changes, resources__strategy=strategy), shape, longest_tokens=32)
        for strategy in ("data", "fsdp")
    )
    assert alone.evaluation - spread.evaluation == (LINEAR + REST) - 2 * (OUTSIDE + 3 * BLOCK)


def test_paged_moments_of_large_weights_are_not_on_the_gpu(shape):
    paged = parts(shape, {"name": "full", "weights": "float32", "optim": "paged_adamw_32bit"})
    small = LAYERS * 2 * KEYS * HIDDEN + (2 * LAYERS + 1) * HIDDEN + LAYERS * 2 * HIDDEN * HIDDEN
    assert close(paged["optimizer"], 8 * small, 0)


def test_stochastic_rounding_keeps_moments_in_bfloat16(shape):
    assert close(parts(shape, {"name": "full"})["optimizer"], 4 * (LINEAR + REST), 2 * 20)


@pytest.mark.parametrize("weights", ["bfloat16", "bfloat16_stochastic"])
def test_galore_keeps_a_basis_and_low_rank_moments(shape, weights):
    found = parts(shape, {"name": "galore", "rank": 8, "weights": weights})
    basis = LAYERS * sum(8 * min(matrix) for matrix in LINEARS)
    moments = LAYERS * sum(8 * max(matrix) for matrix in LINEARS) + REST
    assert close(found["projectors"], 2 * basis, 14)
    assert close(found["optimizer"], 2 * 2 * moments, 2 * 20)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_a_galore_basis_holds_its_rank_of_vectors_and_not_the_whole_decomposition(shape, svd):
    found = parts(shape, {"name": "galore", "rank": 8, "weights": "float32", "svd": svd})
    assert close(found["projectors"], 4 * LAYERS * sum(8 * min(matrix) for matrix in LINEARS), 14)


def test_gradients_on_the_host_and_moments_in_8_bits_take_what_counting_says(shape, monkeypatch):
    monkeypatch.setattr("ray_peft.methods.host_gradients.SMALL", 2**12)
    method = {"name": "galore", "rank": 8, "gradients": "host", "moments": "8bit"}
    found = parts(shape, method, train__gradient_checkpointing=True)
    embedding, norms = VOCABULARY * HIDDEN, (2 * LAYERS + 1) * HIDDEN
    assert close(found["gradients"], 2 * (embedding + norms), 6), "of the linear layers there is none"
    small = [8 * max(matrix) for matrix in LINEARS]  # moments of fewer than 4,096 numbers stay in float32
    low = LAYERS * sum(4 * numbers if numbers < 4096 else numbers + numbers // 256 * 4 for numbers in small)
    rest = embedding + embedding // 256 * 4 + 4 * norms
    assert close(found["optimizer"], 2 * (low + rest), 80)


def test_layerwise_galore_never_holds_all_gradients(shape):
    method = {"name": "galore", "rank": 8, "max_grad_norm": None}
    one = {"train__batch_size": 1, "train__micro_batch_size": 1}
    whole = predict(spec(method, **one), shape, longest_tokens=8)
    layerwise = predict(spec({**method, "layerwise": True}, **one), shape, longest_tokens=8)
    assert whole.components["gradients"] > 2 * LINEAR
    assert layerwise.components.get("gradients", 0) < whole.components["gradients"] / 2
    assert layerwise.components["optimizer"] == whole.components["optimizer"]


LARGER, SMALLER = (LAYERS * sum(side(sizes) for sizes in LINEARS) for side in (max, min))
BLOCK = LINEAR // LAYERS + 2 * HIDDEN


@pytest.mark.parametrize(
    ("method", "state", "bases"),
    [
        ({"name": "fira", "rank": 8}, 2 * 8 * LARGER + 2 * REST, 8 * SMALLER),
        ({"name": "apollo", "rank": 8}, 2 * 8 * LARGER + 2 * REST, 0),
        ({"name": "apollo_mini"}, 2 * LARGER + 2 * REST, 0),
        ({"name": "muon"}, LINEAR + 2 * REST, 0),
        ({"name": "lisa", "layers": 1}, 2 * (BLOCK + REST - 2 * LAYERS * HIDDEN), 0),
        ({"name": "badam"}, 2 * BLOCK, 0),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_optimizers_of_whole_models_keep_what_counting_says(shape, method, state, bases):
    """In bfloat16, of norms that limit growth a number a matrix."""
    found = parts(shape, method)
    assert close(found["optimizer"], 2 * state, 3 * 7 * LAYERS + 20)
    assert close(found.get("projectors", 0), 2 * bases, 7 * LAYERS)


def test_layers_that_rest_have_no_gradients(shape):
    found = parts(shape, {"name": "badam"}, train__micro_batch_size=4)
    assert close(found["gradients"], 2 * BLOCK, 10)


def test_the_hybrid_takes_what_its_larger_stage_takes(shape):
    qlora, galore = {"name": "qlora", "rank": 4}, {"name": "galore", "rank": 8}
    hybrid = predict(spec({"name": "qlora_galore", "qlora": qlora, "galore": galore}), shape, longest_tokens=32)
    stages = [predict(spec(method), shape, longest_tokens=32) for method in (qlora, galore)]
    assert hybrid.peak_allocated == max(stage.peak_allocated for stage in stages)


def test_components_add_up_and_memory_grows_with_rows_and_shrinks_with_checkpointing(shape):
    lora = {"name": "lora", "rank": 4}
    small = predict(spec(lora, train__micro_batch_size=2), shape, longest_tokens=64)
    large = predict(spec(lora, train__micro_batch_size=8), shape, longest_tokens=64)
    again = predict(spec(lora, train__micro_batch_size=8, train__gradient_checkpointing=True), shape, longest_tokens=64)
    for each in (small, large, again):
        assert sum(each.components.values()) == each.peak_allocated < each.peak_reserved
    assert small.peak_allocated < large.peak_allocated
    assert again.components["activations"] < large.components["activations"] / 2


def test_activations_are_what_torch_keeps(shape):
    """The same model with real weights on the CPU in float32, and every tensor that autograd saves."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    trial = spec(
        {"name": "lora", "rank": 4}, model__dtype="float32", train__precision="fp32", train__micro_batch_size=4,
        train__cuda_graphs=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.plain()), dtype=torch.float32)
    add_fused_lm_head(model)
    model.requires_grad_(False)
    model = trial.method.attach(model).train()
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    kept: list[object] = []
    ids = torch.ones(4, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False, fused_lm_head=True)
    found = predict(trial, shape, longest_tokens=64, padded=False).components["activations"]
    assert found == pytest.approx(sum(saved.values()), rel=0.05)


def test_a_prediction_is_kept_on_disk(shape, tmp_path, monkeypatch):
    from ray_peft.tasks.llm_sft import memory as llm

    monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path))
    trial = spec({"name": "lora", "rank": 2})
    monkeypatch.setattr(sys.modules["ray_peft.vram.predict"], "_known", {})
    first = predict(trial, shape, longest_tokens=16)
    monkeypatch.setattr(sys.modules["ray_peft.vram.predict"], "_known", {})
    monkeypatch.setattr(llm, "components", lambda *_, **__: pytest.fail("computed again"))
    other = trial.model_copy(update={"method": trial.method.model_copy(update={"lr": 0.5})})
    assert predict(other, shape, longest_tokens=16) == first


def test_a_ledger_knows_an_operation_again_and_counts_the_same(shared):
    import torch

    from ray_peft.vram.pool import BLOCK
    from ray_peft.vram.tape import Tape

    def made(device: str) -> list[torch.Tensor]:
        x = torch.empty(4, 6, 256, device=device)
        w = torch.empty(256, 128, device=device)
        return [
            x.transpose(0, 1) * 2,
            x.transpose(0, 1).contiguous(),
            x.sum(0),
            x.sum(1),
            x.to(torch.bfloat16),
            torch.cat([x, x[:1]]),
            torch.cat([x, x], 2),
            x[1:3],
            torch.arange(300, device=device),
            torch.arange(600, device=device),
            x @ w,  # ends in a view that its schema does not call one
        ]

    wanted = [(each.shape, each.stride(), each.dtype) for each in made("cpu")]
    own = sum(-(-each.untyped_storage().nbytes() // BLOCK) * BLOCK for each in made("cpu"))
    peaks = []
    with Tape(truth=True) as tape:
        for _ in range(2):
            tape.restart()
            found = made("meta")
            peaks.append(tape.peak)
            assert [(each.shape, each.stride(), each.dtype) for each in found] == wanted
            assert tape.now == own  # the slice is a view, and holds all of x
            del found
            assert tape.now == 0
    assert peaks[0] == peaks[1]


def test_two_gradients_of_one_weight_are_added_in_place(shared):
    """Without a dispatch mode autograd does so where nothing else holds the first one; under one it takes a third."""
    import torch

    from ray_peft.vram.tape import Tape

    weight = torch.empty(512, 512, device="meta", requires_grad=True)
    with Tape(truth=True) as tape:
        x = torch.empty(4, 512, device="meta")
        loss = (x @ weight).sum() + (x @ weight).sum()
        tape.restart()
        torch.autograd.backward(loss)
    assert 2 < tape.peak / weight.nbytes < 2.1


def test_nothing_of_torch_stays_replaced(shape):
    import torch

    before = torch.optim.AdamW, torch.is_autocast_enabled, torch.nn.init.normal_
    predict(spec({"name": "lora", "rank": 3}), shape, longest_tokens=16)
    assert (torch.optim.AdamW, torch.is_autocast_enabled, torch.nn.init.normal_) == before
    assert not torch.is_autocast_enabled()


def test_gpus_are_known_by_name_and_others_get_the_safest_numbers():
    assert known("NVIDIA GeForce RTX 3060").memory_gib == 12
    assert known("NVIDIA GeForce RTX 3060 Laptop GPU").name == "NVIDIA GeForce RTX 3060"
    assert known("Unheard of") is ANY
    assert not ANY.holds(12 * GIB)


def test_suggestions_keep_the_training_where_that_is_enough(shape):
    trial = spec({"name": "lora", "rank": 4}, train__batch_size=16, train__micro_batch_size=16)

    def of(variant):
        return predict(variant, shape, longest_tokens=256)

    limit = of(trial.model_copy(update={"train": trial.train.model_copy(update={"micro_batch_size": 8})}))
    found = nearest(trial, of, lambda prediction: prediction.peak_allocated <= limit.peak_allocated)
    assert found[0].fits
    assert found[0].changes == {"train.micro_batch_size": 8}
    assert all(each.same_training for each in found)
    assert all(each.spec.train.batch_size == 16 for each in found)


def test_workers_that_are_there_are_suggested_to_share_the_weights(shape):
    trial = spec({"name": "full"}, train__batch_size=4, train__micro_batch_size=2, resources__num_workers=2)
    suggestions = nearest(
        trial, lambda variant: predict(variant, shape, longest_tokens=64), lambda p: "gathered" in p.components
    )
    assert suggestions[0].fits
    assert suggestions[0].same_training
    assert suggestions[0].changes["resources.strategy"] == "fsdp"


def test_suggestions_change_the_training_only_where_nothing_else_fits(shape):
    trial = spec({"name": "full", "weights": "float32"}, train__batch_size=4, train__micro_batch_size=4)
    found = nearest(
        trial, lambda variant: predict(variant, shape, longest_tokens=64), lambda p: "adapters" in p.components
    )
    assert [each.changes["method"]["name"] for each in found if each.fits] == ["lora", "qlora"]
    assert found[0].fits
    assert any("method.optim" in each.changes for each in found)
    assert found[-1].line().endswith("does not fit)")


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2"])
def test_other_families_need_no_code_of_their_own(shared, family):
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        family, vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    found = parts(ModelShape.from_config(json.loads(config.to_json_string())), {"name": "qlora", "rank": 2})
    assert {"weights", "quantization", "adapters", "activations"} <= set(found)


def mixture(family: str) -> ModelShape:
    from transformers import AutoConfig

    size = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "shared_expert_intermediate_size": 32}
    return ModelShape.from_config(AutoConfig.for_model(family, **size, **experts, **heads))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp32", "float32")])
def test_mixtures_of_experts_are_predicted(shared, family, precision, dtype):
    """Their products of experts have no shape function in float32, and PEFT's adapters of experts leave autocast."""
    settings = {"train__precision": precision, "model__dtype": dtype}
    size = {"bfloat16": 2, "float32": 4}[dtype]
    lora = {"name": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]}
    held = predict(spec({"name": "none"}, **settings), mixture(family), longest_tokens=16).components["weights"]
    found = parts(mixture(family), lora, 16, **settings)
    assert found["weights"] == held >= size * 2 * 4 * 3 * 32 * 64, "two layers, four experts of three matrices"
    assert found["adapters"] > 0


def test_values_narrower_than_queries_are_predicted(shared):
    """As in DeepSeek-V3, where attention's output is as wide as its values."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, q_lora_rank=16,
        num_attention_heads=4, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=8,
        first_k_dense_replace=2,
    )  # fmt: skip
    full = parts(ModelShape.from_config(config), {"name": "full"})
    assert full["activations"] > 0


def test_a_cubed_number_is_in_float32_as_under_cuda_s_autocast(shared):
    """GPT-2's GELU: three float32 tensors of its inner size are kept in each layer, not three in bfloat16."""
    import torch
    from transformers.activations import NewGELUActivation

    from ray_peft.vram.stand_ins import Autocast

    x = torch.empty(4, 8, device="meta", dtype=torch.bfloat16)
    with Autocast(torch.bfloat16):
        assert NewGELUActivation()(x).dtype == torch.float32
        assert (x + x).dtype == torch.bfloat16
    with Autocast(None):
        assert NewGELUActivation()(x).dtype == torch.bfloat16


def test_gpt2_s_layers_are_stored_in_4_bits_too(shared):
    from transformers import GPT2Config

    gpt2 = GPT2Config(vocab_size=512, n_embd=128, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    matrices, rest = 2 * 12 * 128 * 128, (512 + 64) * 128 + 2 * 13 * 128 + 2 * 128
    found = parts(ModelShape.from_config(gpt2), {"name": "qlora", "rank": 2, "targets": ["c_attn"]})
    assert close(found["weights"], matrices // 2 + 2 * rest, 30)


def test_only_a_method_s_own_settings_are_left_out_of_what_decides_memory():
    from ray_peft.methods.galore import GaLore
    from ray_peft.methods.lora import LoRA
    from ray_peft.vram import decides_memory

    assert {"alpha", "lr", "betas"}.isdisjoint(decides_memory(LoRA()))
    assert "rank" in decides_memory(LoRA())
    assert {"scale", "eps", "update_proj_gap"}.isdisjoint(decides_memory(GaLore()))

    class Other(LoRA):
        scale: int = 1
        """As a method might call what decides its memory."""

    assert "scale" in decides_memory(Other())


@pytest.mark.parametrize("task", ["llm_sft", "text_to_image"])
def test_predictions_on_disk_are_of_all_code_that_makes_them(task):
    """Every file of a task that its prediction runs or reads is in the key."""
    import ast
    import importlib

    memory = importlib.import_module(f"ray_peft.tasks.{task}.memory")
    nodes = ast.walk(ast.parse(Path(memory.__file__).read_text(encoding="utf-8")))
    imported = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {name.rpartition(".")[2] for name in imported if name.startswith(("ray_peft.tasks.", "ray_peft.engine."))}
    of_dropout = {"keyed_dropout", "dropped_attention"}  # what row_dropout calls
    assert {*own, *of_dropout, "memory"} <= {file.stem for file in memory.CODE}
    assert all(file.is_file() for file in memory.CODE)


def test_rows_that_are_scored_may_be_longer_than_those_trained_on(shape):
    lora = spec({"name": "lora", "rank": 4})
    plain = predict(lora, shape, longest_tokens=32)
    longer = predict(lora, shape, longest_tokens=32, longest_scored=96)
    assert plain == predict(lora, shape, longest_tokens=32, longest_scored=32)
    assert longer.peak_allocated == plain.peak_allocated  # training sees its own rows
    assert longer.evaluation > plain.evaluation
    assert longer.evaluation == predict(lora, shape, longest_tokens=96).evaluation


@pytest.mark.parametrize(("window", "grows"), [(None, 2), (64, 1)], ids=["all layers", "one layer of two"])
def test_answering_takes_the_cache_of_all_lanes(window, grows):
    """Keys and values of 9 lanes (8 and the spare one), 2 heads of 16 numbers in bf16; a window holds no more."""
    from transformers import AutoConfig

    from ray_peft.tasks.llm_sft import memory

    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": window} if window else {}
    config = AutoConfig.for_model(
        "gemma3_text" if window else "llama", vocab_size=272, hidden_size=64, intermediate_size=128, head_dim=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, **kinds,
    )  # fmt: skip

    def answering(new, batch=8):
        made = spec({"name": "none"}, evaluation__max_new_tokens=new, evaluation__batch_size=batch)
        return memory.evaluation(made, None, ModelShape.from_config(config), 128)["answering"]

    added = answering(2000) - answering(1000)
    cache = grows * 9 * 1000 * 2 * 2 * 16 * 2
    assert cache <= added <= cache * 1.2 + 9 * 1000 * 8  # with the answers' tokens, and what is seen of the places
    assert answering(1000, batch=16) > 1.7 * answering(1000)
