"""Settings of models of two layers of every kind of attention, by the name that transformers gives an architecture."""

SIZES = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 258,
}  # fmt: skip
WINDOW = {"head_dim": 16, "sliding_window": 16}
ARCHITECTURES = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 16},
    "mistral": SIZES | {"sliding_window": 16},
    "gemma2": SIZES | WINDOW | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": SIZES | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "granite": SIZES | {"logits_scaling": 4.0},
    "phi3": SIZES,
    "gpt_neox": SIZES,
    "gpt2": {
        "vocab_size": 272, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
}  # fmt: skip
