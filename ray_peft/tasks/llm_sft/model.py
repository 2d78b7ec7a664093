"""Loading the base model: plain or 4-bit, with its own weights or random ones of its shape."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.errors import ModelError, first_line
from ray_peft.methods.base import Dtype, Quantization
from ray_peft.spec import LlmTrialSpec, ModelSpec, is_local
from ray_peft.tasks.cache import cache_folder, made_whole
from ray_peft.tasks.four_bit_layers import keep_as_stored
from ray_peft.tasks.llm_sft.decoding import in_place_of_invalid
from ray_peft.tasks.parameters import stored

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_config(model: ModelSpec) -> PretrainedConfig:
    """The model's config.json, without weights.

    Raises:
        ModelError: the model is not there, or its config cannot be read.
    """
    from transformers import AutoConfig

    if is_local(model.name) and not Path(model.name).is_dir():
        raise ModelError(f"model.name: {model.name}: no such folder")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ModelError(f"model.name: {model.name} cannot be loaded: {first_line(error)}") from None
    if is_local(model.name) and not model.random_weights and not _weight_files(Path(model.name)):
        raise ModelError(
            f"model.name: {model.name} holds no *.safetensors weights; give a folder with weights, or set "
            "model.random_weights: true to measure memory and speed only"
        )
    return config


def load_model(spec: LlmTrialSpec, device: str) -> PreTrainedModel:
    """The base model on `device`, in the dtype and storage that the method's first stage needs.

    Raises:
        ModelError: the model cannot be loaded.
    """
    load_config(spec.model)
    folder = str(random_model(spec.model)) if spec.model.random_weights else spec.model.name
    dtype = spec.method.weights_dtype(spec.model.dtype)
    model = from_folder(spec.model, folder, dtype, spec.quantization, device)
    model.requires_grad_(False)
    return model


def from_folder(
    spec: ModelSpec, folder: str, dtype: Dtype, quantization: Quantization | None, device: str
) -> PreTrainedModel:
    """Load weights from a folder or the hub.

    Raises:
        ModelError: they cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    settings: dict[str, Any] = {"dtype": getattr(torch, dtype), "device_map": {"": device}}
    if quantization is not None:
        from transformers import BitsAndBytesConfig

        settings["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.quant_type,
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
        )
    if spec.attention is not None:
        settings["attn_implementation"] = spec.attention
    if (valid := in_place_of_invalid(folder, spec.revision)) is not None:
        settings["generation_config"] = valid
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, revision=spec.revision, trust_remote_code=spec.trust_remote_code, **settings
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ModelError(f"model.name: {folder} cannot be loaded: {first_line(error)}") from error
    if quantization is not None:
        keep_as_stored(model)
    # Per-token log-probabilities in tiles: full logits of a 262,144-word vocabulary would fill a small GPU.
    add_fused_lm_head(model)
    return model


def random_model(model: ModelSpec) -> Path:
    """A folder with bf16 random weights of the model's shape, made once and kept in the cache."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(model)
    key = hashlib.sha256(config.to_json_string().encode()).hexdigest()[:24]
    folder = cache_folder() / "random" / key
    if (folder / "config.json").is_file():
        return folder
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    with torch.device(device):
        built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    torch.random.set_rng_state(generator_state)
    with made_whole(folder, "config.json") as partial:
        built.save_pretrained(partial)
    return folder


def fingerprint(model: ModelSpec) -> str:
    """SHA-256 over a local model's config and the names and sizes of its weights, or the hub commit."""
    if not is_local(model.name):
        config = load_config(model)
        return str(getattr(config, "_commit_hash", None) or model.revision or "unknown")
    digest = hashlib.sha256((Path(model.name) / "config.json").read_bytes())
    for file in _weight_files(Path(model.name)):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: Dtype) -> None:
    """Write the adapter, or all weights with the tokenizer, in `dtype`; the model itself keeps its own.

    Raises:
        TrialFailed: a weight is beyond the range of `dtype`.
    """
    adapter = hasattr(model, "peft_config")
    chosen = model.state_dict()
    if adapter:
        prefix = str(model.base_model.prefix)  # PEFT's word in the names of what an adapter adds
        chosen = {name: parameter for name, parameter in model.named_parameters() if prefix in name}
    converted: dict[int, Tensor] = {}  # tied weights are one tensor, and stay one: they are written once
    state = {}
    for name, tensor in chosen.items():
        address = tensor.data_ptr()
        if address not in converted:
            converted[address] = stored(name, tensor, dtype)
        state[name] = converted[address]
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True)
    if not adapter:
        config = folder / "config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps({**settings, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(str(folder))
