"""Rows against a model's embedding and positions, before weights are loaded."""

import json

import pytest
import tiny

from ray_peft.errors import DataError, ModelError, RayPeftError
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.tasks.llm_sft import fits
from ray_peft.tasks.llm_sft.data import prepare
from ray_peft.tasks.llm_sft.tokenizer import load_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def configs():
    """Architectures by how they know positions; each has 64 of them."""
    import transformers as hf

    gpt2 = {"vocab_size": 272, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    opt = {"word_embed_proj_dim": 16, "ffn_dim": 32}
    rotary = {"vocab_size": 272, "max_position_embeddings": 64}
    return {
        "gpt2": hf.GPT2Config(**gpt2),
        "gptj": hf.GPTJConfig(**gpt2, rotary_dim=4),
        "gpt_neo": hf.GPTNeoConfig(
            vocab_size=272, hidden_size=16, num_layers=1, num_heads=2, max_position_embeddings=64,
            attention_types=[[["global"], 1]],
        ),
        "opt": hf.OPTConfig(**rotary, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **opt),
        "llama": hf.LlamaConfig(**rotary, **SIZES),
        "neox": hf.GPTNeoXConfig(**rotary, **SIZES),
        "phi": hf.PhiConfig(**rotary, **SIZES),
        "qwen2": hf.Qwen2Config(**rotary, **SIZES, num_key_value_heads=2),
    }  # fmt: skip


FIXED = {"gpt2", "gptj", "gpt_neo", "opt"}


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gpt_neo", "opt", "llama", "neox", "phi", "qwen2"])
def test_the_model_s_own_code_fails_where_it_is_said_to(name):
    """A pass one token longer than the positions, on real weights."""
    import torch
    from transformers import AutoModelForCausalLM

    config = configs()[name]
    assert fits.has_fixed_positions(config, 64) == (name in FIXED)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model(torch.ones(1, 64, dtype=torch.long))
        if name in FIXED:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.ones(1, 65, dtype=torch.long))
        else:
            model(torch.ones(1, 65, dtype=torch.long))


@pytest.fixture(scope="module")
def spec(tiny_model, questions):
    return TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, data__max_length=96))


@pytest.fixture(scope="module")
def prepared(spec):
    return prepare(spec, load_tokenizer(spec))


def asked(spec, **changes):
    plain = spec.plain()
    plain["evaluation"] |= changes
    return TrialSpec.from_plain(plain)


def test_positions_beyond_a_table_are_refused_and_beyond_rotary_ones_said(spec, prepared):
    longest = prepared.facts.longest
    assert longest == max(map(len, (*prepared.train["input_ids"], *prepared.test["input_ids"]))) > 64
    with pytest.raises(
        DataError, match=rf"64 positions.*the longest row has {longest} tokens; .*max_length to at most 64"
    ):
        fits.check(spec, spec.model, configs()["gpt2"], prepared)
    cautions = fits.check(spec, spec.model, configs()["llama"], prepared)
    assert any(f"the longest row has {longest} tokens, more than the 64 positions" in said for said in cautions)


def test_a_prompt_and_its_answer_must_have_positions_too(spec, prepared):
    import transformers as hf

    config = hf.GPT2Config(vocab_size=272, n_embd=16, n_layer=1, n_head=2, n_positions=128)
    prompt = max(map(len, prepared.test["prompt_ids"][:4]))  # the rows that are answered
    assert fits.check(asked(spec, max_new_tokens=128 - prompt), spec.model, config, prepared) == []
    with pytest.raises(DataError, match=rf"make 129 tokens; lower evaluation.max_new_tokens to at most {128 - prompt}"):
        fits.check(asked(spec, max_new_tokens=129 - prompt), spec.model, config, prepared)
    assert fits.check(asked(spec, max_new_tokens=500, generate=False), spec.model, config, prepared) == []


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        (None, 64),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "dynamic", "factor": 3.0}, 192),
    ],
)
def test_scaled_rotary_embeddings_reach_further(rope, positions):
    import transformers as hf

    settings = {} if rope is None else {"rope_parameters": {"rope_theta": 10000.0, **rope}}
    config = hf.LlamaConfig(vocab_size=272, max_position_embeddings=64, **SIZES, **settings)
    assert fits._positions(config) == positions


def test_tokens_beyond_the_embedding_are_refused_and_unused_ones_said(spec, prepared):
    def with_words(count):
        config = configs()["llama"]
        config.vocab_size, config.max_position_embeddings = count, 512
        return config

    facts = prepared.facts
    assert (facts.vocabulary, facts.largest, facts.pad) == (259, 257, 258)
    assert fits.check(spec, spec.model, with_words(259), prepared) == []
    with pytest.raises(ModelError, match=r"257 tokens .* a row holds token number 257 \('<\|im_end\|>'\)"):
        fits.check(spec, spec.model, with_words(257), prepared)
    with pytest.raises(ModelError, match=r"258 tokens .* padded with token number 258 \('<\|pad\|>'\)"):
        fits.check(spec, spec.model, with_words(258), prepared)


def test_a_tokenizer_with_one_word_more_than_the_embedding_is_no_error(tiny_model, questions, tmp_path):
    """As Gemma 3's with 262,145 words on a vocabulary of 262,144: the last one stands for images."""
    from transformers import AutoTokenizer

    larger = AutoTokenizer.from_pretrained(tiny_model)
    larger.add_special_tokens({"additional_special_tokens": [f"<extra_{i}>" for i in range(14)]})
    larger.save_pretrained(tmp_path / "larger")
    plain = tiny.plain_spec(tiny_model, questions)
    plain["model"]["tokenizer"] = str(tmp_path / "larger")
    spec = TrialSpec.from_plain(plain)
    notes = TASKS["llm_sft"].inspect(spec).notes
    assert any("the tokenizer has 273 tokens and the model's embedding 272; no row holds" in note for note in notes)
    rows = [{**row, "completion": f"{row['completion']} <extra_13>"} for row in tiny.QUESTIONS]
    plain["data"]["sources"][0]["path"] = str(tiny.write_rows(tmp_path / "rows.jsonl", rows))
    assert TASKS["llm_sft"].inspect(TrialSpec.from_plain(plain)).notes  # text by default: no such token
    plain["data"]["special_tokens"] = "control"
    with pytest.raises(ModelError, match=r"a row holds token number 272 \('<extra_13>'\)"):
        TASKS["llm_sft"].inspect(TrialSpec.from_plain(plain))


def test_a_plan_says_so_before_weights_are_read(tiny_model, questions, tmp_path):
    import shutil

    shutil.copytree(tiny_model, tmp_path / "small")
    path = tmp_path / "small" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"vocab_size": 257, "pad_token_id": None}
    path.write_text(json.dumps(config), encoding="utf-8")
    plain = tiny.plain_spec(tmp_path / "small", questions, model__random_weights=True)
    with pytest.raises(RayPeftError, match="embedding of 257 tokens"):
        TASKS["llm_sft"].inspect(TrialSpec.from_plain(plain))
