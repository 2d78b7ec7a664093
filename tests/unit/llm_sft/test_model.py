"""Models that people really bring: what of them is refused before anything starts, and what is told apart."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny

from ray_peft.errors import ModelError
from ray_peft.spec import ModelSpec, TrialSpec
from ray_peft.tasks.llm_sft import model as models

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny.build_model(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return tiny.build_model(tmp_path_factory.mktemp("models") / "untied", talkative=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path / "cache"))


def copied(source: Path, target: Path, **settings: Any) -> Path:
    """A copy with other settings in its config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    return target


def state(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def store(folder: Path, weights: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sharded(source: Path, target: Path) -> Path:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source).save_pretrained(target, max_shard_size="150KB")
    return target


def check(folder: Path, **settings: Any) -> None:
    models.check(ModelSpec(name=str(folder), dtype="float32", **settings))


def loaded(folder: Path) -> Any:
    return models.load_model(TrialSpec.from_plain(tiny.plain_spec(folder, "rows")), "cpu")


def refused(folder: Path, **settings: Any) -> str:
    with pytest.raises(ModelError) as error:
        check(folder, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_good_models_pass_and_load_whole(whole, tmp_path):
    check(whole)
    shards = sharded(whole, tmp_path / "sharded")
    assert len(list(shards.glob("model-*.safetensors"))) > 1
    check(shards)
    assert state(whole)["model.norm.weight"].equal(loaded(shards).state_dict()["model.norm.weight"])


def test_old_tables_and_a_missing_prefix_are_no_reason_to_refuse(tmp_path):
    """GPT-2 as its hub files have it: saved without `transformer.`, with the causal mask as a buffer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=272, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
    gpt2.transformer.save_pretrained(folder)
    store(folder, state(folder) | {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.ones(1)})
    check(folder)
    assert loaded(folder).transformer.wte.weight.equal(gpt2.transformer.wte.weight)
    store(folder, state(folder) | {"h.2.ln_1.bias": torch.ones(32)})
    assert "no place in config.json (1): h.2.*" in refused(folder)


def test_a_layer_more_or_less_than_the_files_have_is_refused(whole, tmp_path):
    more = refused(copied(whole, tmp_path / "more", num_hidden_layers=3))
    assert "config.json that are not in the files (9): model.layers.2.*" in more
    less = refused(copied(whole, tmp_path / "less", num_hidden_layers=1))
    assert "in the files that have no place in config.json (9): model.layers.1.*" in less


def test_other_shapes_are_refused(whole, untied, tmp_path):
    assert "[272, 64] in the files and [272, 32]" in refused(copied(whole, tmp_path / "narrow", hidden_size=32))
    assert "lm_head.weight has [272, 64]" in refused(copied(untied, tmp_path / "words", vocab_size=300))


def test_an_output_layer_may_only_be_missing_where_it_is_tied(untied, tmp_path):
    folder = copied(untied, tmp_path / "headless")
    store(folder, {name: value for name, value in state(folder).items() if name != "lm_head.weight"})
    assert "not in the files (1): lm_head.weight" in refused(folder)
    check(copied(folder, tmp_path / "tied", tie_word_embeddings=True))


def test_weights_that_change_after_the_check_are_found_when_they_are_loaded(whole, tmp_path):
    """The second net: transformers' own report of what it loaded."""
    folder = copied(whole, tmp_path / "model")
    weights = state(folder)
    del weights["model.layers.1.mlp.up_proj.weight"]
    store(folder, weights)
    with pytest.raises(ModelError, match=r"not in the files \(1\): model.layers.1.\*"):
        models.from_folder(ModelSpec(name=str(folder)), str(folder), "float32", None, "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_that_is_no_number_is_named(whole, tmp_path, monkeypatch, dtype):
    from ray_peft.tasks.llm_sft import weight_files

    folder = copied(whole, tmp_path / "nan")
    weights = state(folder)
    weights["model.layers.1.self_attn.q_proj.weight"][3, 5] = float("nan")
    store(folder, weights)
    words = r"weight model.layers.1.self_attn.q_proj.weight holds NaN"
    assert "model.layers.1.self_attn.q_proj.weight holds NaN" in refused(folder)
    monkeypatch.setattr(weight_files, "WHOLE", 0)  # as a large model, of which plan reads headers alone
    check(folder)
    for method in ({"name": "lora"}, {"name": "qlora", "compute_dtype": "float32"}):
        plain = tiny.plain_spec(folder, "rows", method=method, model__dtype=dtype)
        with pytest.raises(ModelError, match=words):
            models.load_model(TrialSpec.from_plain(plain), "cpu")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "pointer of Git LFS"),
        (b"../../.git/annex/objects/aa/bb/key", "pointer of git-annex"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"", "is an empty file"),
        (b"PK\x03\x04 and so on", "torch or zip archive"),
        (b"\x10\0\0\0\0\0\0\0{not json at all", "cut or damaged"),
    ],
)
def test_what_is_no_weight_file_is_said(whole, tmp_path, content, words):
    folder = copied(whole, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    said = refused(folder)
    assert words in said
    assert str(folder / "model.safetensors") in said


def test_a_cut_file_and_missing_shards_are_said(whole, tmp_path):
    folder = copied(whole, tmp_path / "cut")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert f"it has {len(content) // 2:,} of {len(content):,} bytes" in refused(folder)
    shards = sharded(whole, tmp_path / "sharded")
    last = sorted(shards.glob("model-*.safetensors"))[-1]
    last.unlink()
    assert f"1 of the 3 files that it names are missing: {last.name}" in refused(shards)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"metadata": {}, "weight_map": {"a": "../whole/model.safetensors"}}, "not inside the model's folder"),
        ({"metadata": {}, "weight_map": {"a": "/model.safetensors"}}, "not inside the model's folder"),
        ({"metadata": {}}, "weight_map does not say"),
        ({"weight_map": {"a": "model-1.safetensors"}}, 'no "metadata"'),
        ([], "must hold a JSON object"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(whole, tmp_path, index, words):
    folder = copied(whole, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    assert words in refused(folder)


def test_a_hundred_shards_are_checked_from_their_headers(whole, tmp_path):
    folder = copied(whole, tmp_path / "model", num_hidden_layers=2)
    weights = state(folder)
    (folder / "model.safetensors").unlink()
    names = {}
    for place, (name, value) in enumerate(weights.items()):
        file = f"model-{place + 1:05}-of-{len(weights):05}.safetensors"
        store(folder, {name: value})
        (folder / "model.safetensors").rename(folder / file)
        names[name] = file
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
    check(folder)
    assert models.fingerprint(ModelSpec(name=str(folder))) != ""


def test_variants_and_torch_archives_are_loaded(whole, tmp_path):
    import torch

    variant = copied(whole, tmp_path / "variant")
    (variant / "model.safetensors").rename(variant / "model.fp16.safetensors")
    check(variant)
    archive = copied(whole, tmp_path / "archive")
    torch.save(state(archive), archive / "pytorch_model.bin")
    (archive / "model.safetensors").unlink()
    check(archive)
    for folder in (variant, archive):
        assert loaded(folder).model.norm.weight.equal(state(whole)["model.norm.weight"])
    (variant / "model.int8.safetensors").write_bytes(b"")
    assert "variants fp16, int8" in refused(variant)


class _Code:
    """What a hostile archive holds: unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self._file,)


def test_code_in_a_torch_archive_is_not_run(whole, tmp_path):
    import torch

    folder = copied(whole, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"a": _Code(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert "could run code" in refused(folder)
    assert not (tmp_path / "ran").exists()


def test_models_that_are_not_causal_are_refused(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    size = {"vocab_size": 272, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(hidden_size=32, intermediate_size=64, **size)).save_pretrained(tmp_path / "bert")
    assert "each token sees those after it" in refused(tmp_path / "bert")
    assert "causal language model" in refused(tmp_path / "bert", random_weights=True)
    t5 = T5Config(vocab_size=272, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    assert "an encoder and a decoder" in refused(tmp_path / "t5")
    check(copied(tmp_path / "bert", tmp_path / "decoder", is_decoder=True), random_weights=True)


def test_a_decoder_by_another_name_passes(tmp_path):
    """GPT-NeoX writes `is_decoder: false`, and is causal."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=272, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    assert json.loads((tmp_path / "neox" / "config.json").read_text(encoding="utf-8"))["is_decoder"] is False
    check(tmp_path / "neox")


def test_what_is_no_model_folder_is_refused_with_the_way_out(whole, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is empty" in refused(tmp_path / "empty")
    assert f"give the folder that does: {whole}" in refused(whole.parent)
    assert f"config.json: {whole}" in refused(whole / "model.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "GGUF" in refused(tmp_path / "model.gguf")
    assert "no such folder" in refused(tmp_path / "gone")
    bare = copied(whole, tmp_path / "bare")
    (bare / "model.safetensors").rename(bare / "tf_model.h5")
    assert "tf_model.h5, but TensorFlow" in refused(bare)
    check(bare, random_weights=True)
    shards = sharded(whole, tmp_path / "sharded")
    (shards / INDEX).unlink()
    assert INDEX in refused(shards)


def test_an_adapter_is_no_model(whole, tmp_path):
    folder = copied(whole, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}), encoding="utf-8")
    assert "give some/base" in refused(folder), "with config.json beside it: transformers would load some/base"
    (folder / "config.json").unlink()
    assert "give some/base" in refused(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "names no model_type"),
        ('{"model_type": "no_such_type"}', "no_such_type"),
    ],
)
def test_a_config_that_is_none_is_refused(whole, tmp_path, content, words):
    folder = copied(whole, tmp_path / "model")
    (folder / "config.json").write_text(content, encoding="utf-8")
    assert words in refused(folder)


def test_settings_that_make_no_model_are_refused(whole, tmp_path):
    assert "hidden_size" in refused(copied(whole, tmp_path / "text", hidden_size="64"))
    assert "number of attention heads (5)" in refused(
        copied(whole, tmp_path / "heads", num_attention_heads=5, head_dim=None)
    )
    said = refused(copied(whole, tmp_path / "stored", quantization_config={"quant_method": "gptq", "bits": 4}))
    assert "stored quantised (gptq)" in said


def test_a_word_that_a_config_s_class_does_not_know_is_said_as_such(whole, tmp_path):
    with pytest.raises(ModelError, match="no model can be built from its config.json: .*gelooo.* is not known"):
        models.check(ModelSpec(name=str(copied(whole, tmp_path / "copy", hidden_act="gelooo"))))


@pytest.mark.skipif(any(map(find_spec, ("flash_attn", "kernels"))), reason="flash attention is installed")
def test_attention_that_is_not_installed_is_refused(whole):
    with pytest.raises(ModelError, match="^model.attention: flash_attention_2 needs the package flash-attn"):
        models.check(ModelSpec(name=str(whole), attention="flash_attention_2"))
    models.check(ModelSpec(name=str(whole), attention="eager"))


def test_a_generation_config_may_be_missing_but_its_ids_are_tokens(whole, tmp_path):
    folder = copied(whole, tmp_path / "model")
    file = folder / "generation_config.json"
    file.unlink(missing_ok=True)
    check(folder)
    file.write_text('{"eos_token_id": [257, 10], "temperature": 0.0}', encoding="utf-8")
    check(folder)
    file.write_text('{"eos_token_id": "<|im_end|>"}', encoding="utf-8")
    assert "eos_token_id must be the number of a token" in refused(folder)


def test_a_fingerprint_is_content_and_no_path(whole, tmp_path):
    def of(folder: Path, **settings: Any) -> str:
        return models.fingerprint(ModelSpec(name=str(folder), **settings))

    first = of(whole)
    assert of(copied(whole, tmp_path / "elsewhere")) != "", "another spelling of config.json"
    shutil.copytree(whole, tmp_path / "copy")
    assert of(tmp_path / "copy") == first
    weights = state(whole)
    weights["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1
    size = (tmp_path / "copy" / "model.safetensors").stat().st_size
    store(tmp_path / "copy", weights)
    assert (tmp_path / "copy" / "model.safetensors").stat().st_size == size
    assert of(tmp_path / "copy") != first
    assert of(tmp_path / "copy", random_weights=True) == of(whole, random_weights=True) != first


def test_a_large_model_is_told_apart_by_samples_of_each_weight(whole, tmp_path, monkeypatch):
    from ray_peft.tasks.llm_sft import weight_files

    monkeypatch.setattr(weight_files, "WHOLE", 0)
    files = weight_files.weight_files(whole)
    first = weight_files.digest(files)
    shutil.copytree(whole, tmp_path / "copy")
    weights = {name: value * 1.001 if "q_proj" in name else value for name, value in state(whole).items()}
    store(tmp_path / "copy", weights)
    assert weight_files.digest(weight_files.weight_files(tmp_path / "copy")) != first
    assert weight_files.digest(files) == first
