"""Loading the base model: plain or quantised, with its own weights or random ones of its shape."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.engine.recovery import free_memory, leave_out_imports
from ray_peft.engine.shards import whole
from ray_peft.errors import ModelError, first_line
from ray_peft.foundation.cache import cache_folder, entry, made_whole
from ray_peft.methods.base import ENOUGH_STEPS, Dtype, Quantization
from ray_peft.methods.lost_weights import REVISION
from ray_peft.methods.new_tokens import trains_rows
from ray_peft.spec import LlmTrialSpec, ModelSpec, is_local
from ray_peft.tasks import kept_base
from ray_peft.tasks.four_bit_layers import keep_as_stored
from ray_peft.tasks.llm_sft.decoding import in_place_of_invalid
from ray_peft.tasks.llm_sft.gguf_model import opened
from ray_peft.tasks.llm_sft.grown import grow
from ray_peft.tasks.llm_sft.saved_adapter import save_adapter
from ray_peft.tasks.llm_sft.tokenizer import new_token_ids
from ray_peft.tasks.model_content import commit_of, snapshot
from ray_peft.tasks.parameters import stored

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ray_peft.tasks.llm_sft.weight_files import WeightFiles

logger = logging.getLogger(__name__)

_CHECKING = (
    *(Path(__file__).with_name(name) for name in ("architecture.py", "weight_files.py")),
    Path(__file__).parents[1] / "safetensors_header.py",
)
"""The code that checks a model's files; what passed is remembered for this code only."""


def load_config(model: ModelSpec) -> PretrainedConfig:
    """The model's config.json, without weights.

    Raises:
        ModelError: the model is not there, is no causal language model, or its config cannot be read.
    """
    from transformers import AutoConfig

    from ray_peft.tasks.llm_sft.architecture import check_causal
    from ray_peft.tasks.llm_sft.model_folder import check_folder, check_no_adapter

    name = opened(model.name)
    if is_local(name):
        check_folder(Path(name).expanduser())
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        check_no_adapter(name, model.revision)
        lines = str(error).splitlines()[:2]  # errors of a config's values say on a second line which
        reason = " ".join(" ".join(lines).split()) if len(lines) > 1 and lines[0].endswith(":") else first_line(error)
        raise ModelError(f"model.name: {model.name} cannot be loaded: {reason}") from None
    check_causal(model.name, config)
    stored_as = getattr(config, "quantization_config", None)
    if stored_as is not None:
        how = stored_as if isinstance(stored_as, dict) else stored_as.to_dict()
        raise ModelError(
            f"model.name: {model.name}: its weights are stored quantised ({how.get('quant_method', 'unknown')}); give "
            "the plain model: method qlora, or model.quantization, quantises its weights while it is loaded"
        )
    if is_local(model.name) and not model.random_weights:
        files_of(model, config)
    return config


def files_of(model: ModelSpec, config: PretrainedConfig) -> WeightFiles | None:
    """The weight files, of a hub model those in the local cache; None if they are not there yet.

    Raises:
        ModelError: files of a local model are missing.
    """
    from ray_peft.tasks.llm_sft.weight_files import weight_files

    named = getattr(config, "transformers_weights", None)
    if is_local(model.name):
        return weight_files(Path(opened(model.name)).expanduser(), named)
    folder = snapshot(model.name, model.revision)
    if folder is None:
        return None
    try:
        return weight_files(folder, named)
    except ModelError:  # some are still to be downloaded
        return None


def check(model: ModelSpec) -> None:
    """Refuse a model that cannot be what its config says, from config, index and headers of its files.

    A small model's numbers are read, too, and must be finite. A hub model's files are looked at once they are here.
    What was found right is remembered in the cache until a file changes.

    Raises:
        ModelError: it cannot.
    """
    import transformers

    _check_attention(model)
    config = load_config(model)
    files = None if model.random_weights else files_of(model, config)
    code = [file.read_text(encoding="utf-8") for file in _CHECKING]
    decides = [model.name, model.trust_remote_code, config.to_json_string(), files and files.stamps()]
    key = hashlib.sha256(json.dumps([*decides, transformers.__version__, *code]).encode()).hexdigest()[:24]
    mark = cache_folder() / "checked" / key
    if not mark.is_file():
        _check(model, config, files)
        with contextlib.suppress(OSError):  # a cache that others keep may be read-only, or full
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def _check_attention(model: ModelSpec) -> None:
    """Refuse an implementation of attention that is not installed, which only loading would find out.

    Raises:
        ModelError: it is not.
    """
    # transformers also takes it from the hub, where `kernels` is installed.
    if model.attention == "flash_attention_2" and not any(map(importlib.util.find_spec, ("flash_attn", "kernels"))):
        raise ModelError(
            "model.attention: flash_attention_2 needs the package flash-attn, which is not installed here; install it "
            "here and where trials run, or take sdpa, which has kernels of the same kind and needs as much memory"
        )


def _check(model: ModelSpec, config: PretrainedConfig, files: WeightFiles | None) -> None:
    from ray_peft.tasks.llm_sft import architecture, weight_files

    if files is None:
        architecture.check_buildable(model, config)
        return
    architecture.check_weights(model, config, weight_files.on_meta(files))
    if files.num_bytes <= weight_files.WHOLE:
        _check_finite_files(model, files)


def _check_finite_files(model: ModelSpec, files: WeightFiles) -> None:
    from ray_peft.tasks.llm_sft import architecture, weight_files

    weight = weight_files.first_not_finite(files)
    if weight is not None:
        architecture.raise_not_finite(model.name, weight)


def load_model(spec: LlmTrialSpec, device: str, keep: str | None = None) -> PreTrainedModel:
    """The base model on `device`, in the dtype and storage that the method's first stage needs.

    Args:
        spec: the trial.
        device: where the weights are put.
        keep: keep the base under this key for the next trial, or take the one that is kept (`base_key`); None loads it.

    Raises:
        ModelError: the model cannot be loaded.
    """
    from trl.trainer.utils import add_fused_lm_head

    check(spec.model)
    kept_base.drop(unless=keep)
    model = kept_base.take(keep) if keep is not None else None
    if model is None:
        leave_out_imports()
        folder = str(random_model(spec.model)) if spec.model.random_weights else opened(spec.model.name)
        dtype = spec.method.weights_dtype(spec.model.dtype)
        if device.startswith("cuda"):
            free_memory(device)  # else weights would be put between what is left of other tensors, and stay there
        model = _from_folder(spec.model, folder, dtype, spec.quantization, device)
        _check_finite(spec, model)
        grow(model, new_token_ids(spec.model))
        model.requires_grad_(False)
        if keep is not None:
            model = kept_base.keep(keep, model)
    else:
        logger.info("%s: the base is the one of the trial before", spec.trial_id)
    setattr(model, REVISION, spec.model.revision)
    add_fused_lm_head(model)
    return model


def base_key(spec: LlmTrialSpec, device: str) -> str | None:
    """What the base of a trial depends on; None for a trial that may change the base, or whose loading may do more.

    A trial leaves the base as it is where it trains adapters in one stage, or nothing.
    """
    stages = [stage for stage, _ in spec.method.stages(ENOUGH_STEPS)]
    changes = len(stages) > 1 or any(stage.changes_base for stage in stages) or bool(spec.members())
    by_others = spec.train.engine != "own" or spec.resources.num_workers > 1 or spec.model.trust_remote_code
    eight_bit = spec.quantization is not None and spec.quantization.bits == 8  # its layers change in a forward pass
    if changes or by_others or eight_bit:
        return None
    quantization = spec.quantization.plain() if spec.quantization is not None else None
    dtype = spec.method.weights_dtype(spec.model.dtype)
    from ray_peft.tasks.llm_sft.decoding import written_settings

    # Loaded with the base; no part of its identity.
    generation = written_settings(opened(spec.model.name), spec.model.revision)
    known = [fingerprint(spec.model), spec.model.plain(), generation, dtype, quantization, device]
    return json.dumps(known, sort_keys=True)


def _check_finite(spec: LlmTrialSpec, model: PreTrainedModel) -> None:
    """Refuse a model with a weight that is no number; of 4-bit storage, that shows in its files alone."""
    from ray_peft.tasks.llm_sft import architecture, weight_files

    weight = architecture.not_finite(model)
    if weight is not None:
        architecture.raise_not_finite(spec.model.name, weight)
    files = None
    if spec.quantization is not None and not spec.model.random_weights:
        files = files_of(spec.model, load_config(spec.model))
    if files is not None and files.num_bytes > weight_files.WHOLE:  # smaller ones were read by `check`
        _check_finite_files(spec.model, files)


def from_folder(
    spec: ModelSpec, folder: str, dtype: Dtype, quantization: Quantization | None, device: str
) -> PreTrainedModel:
    """Load weights from a folder or the hub, for training and scoring.

    Raises:
        ModelError: they cannot be loaded.
    """
    from trl.trainer.utils import add_fused_lm_head

    model = _from_folder(spec, folder, dtype, quantization, device)
    # Per-token log-probabilities in tiles: full logits of a 262,144-word vocabulary would fill a small GPU.
    add_fused_lm_head(model)
    return model


def _from_folder(
    spec: ModelSpec, folder: str, dtype: Dtype, quantization: Quantization | None, device: str
) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    from ray_peft.tasks.llm_sft.architecture import raise_if_incomplete
    from ray_peft.tasks.llm_sft.weight_files import weight_files

    settings: dict[str, Any] = {"dtype": getattr(torch, dtype), "device_map": {"": device}}
    if quantization is not None:
        from transformers import BitsAndBytesConfig

        how: dict[str, Any] = {"load_in_8bit": True}
        if quantization.bits == 4:
            how = {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": quantization.quant_type,
                "bnb_4bit_use_double_quant": quantization.double_quant,
                "bnb_4bit_compute_dtype": getattr(torch, quantization.compute_dtype),
            }
        settings["quantization_config"] = BitsAndBytesConfig(**how)  # type: ignore[no-untyped-call]
    if spec.attention is not None:
        settings["attn_implementation"] = spec.attention
    if is_local(folder):
        settings["variant"] = weight_files(Path(folder).expanduser()).variant
    if (valid := in_place_of_invalid(folder, spec.revision)) is not None:
        settings["generation_config"] = valid
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
            **settings,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ModelError(f"model.name: {folder} cannot be loaded: {first_line(error)}") from error
    model: PreTrainedModel
    model, report = loaded
    raise_if_incomplete(folder, report)
    if quantization is not None:
        keep_as_stored(model)
    return model


def random_model(model: ModelSpec) -> Path:
    """A folder with bf16 random weights of the model's shape, made once and kept in the cache."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(model)
    key = hashlib.sha256(config.to_json_string().encode()).hexdigest()[:24]
    folder = entry("random", key)
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


_fingerprints: dict[str, str] = {}


def fingerprint(model: ModelSpec) -> str:
    """What tells models apart: of a hub model the commit, of a local one a hash over its content.

    The hash is over config.json and the model's own code, and over names, dtypes, shapes and content of its weights
    (weight_files.digest), so that it is the same for copies in other folders and for other ways of sharding. Of a model
    with random weights config and code decide alone.

    Raises:
        ModelError: the model cannot be read.
    """
    config = load_config(model)
    if not is_local(model.name):
        return commit_of(model) or f"{model.name}@{model.revision or 'main'}"
    from ray_peft.tasks.llm_sft import weight_files

    folder = Path(opened(model.name)).expanduser()
    files = None if model.random_weights else files_of(model, config)
    texts = [folder / "config.json", *(sorted(folder.glob("*.py")) if model.trust_remote_code else [])]
    total = hashlib.sha256()
    for text in texts:
        total.update(f"{text.name}:".encode() + text.read_bytes())
    key = f"{total.hexdigest()} {files and files.stamps()}"
    if key not in _fingerprints:
        total.update((weight_files.digest(files) if files is not None else "random").encode())
        _fingerprints[key] = total.hexdigest()[:16]
    return _fingerprints[key]


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: Dtype) -> None:
    """Write the adapter, or all weights, in `dtype`; the model itself keeps its own.

    The tokenizer is written beside all weights, and beside an adapter with rows of new tokens.

    Raises:
        TrialFailed: a weight is beyond the range of `dtype`.
    """
    if hasattr(model, "peft_config"):
        save_adapter(model, folder, dtype)
        if trains_rows(model):  # PEFT's AutoPeftModel makes the base's embeddings as long as this tokenizer
            tokenizer.save_pretrained(str(folder))
        return
    model.save_pretrained(str(folder), state_dict=whole_weights(model, dtype), safe_serialization=True)
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**settings, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(str(folder))


def whole_weights(model: PreTrainedModel, dtype: Dtype, *, keep: bool = True) -> dict[str, Tensor]:
    """All weights by name in `dtype`; of an adapted model none. All workers of a sharded model must call it.

    Args:
        model: it keeps its own weights.
        dtype: of the result.
        keep: False on a worker that only takes part.

    Raises:
        TrialFailed: a weight is beyond the range of `dtype`.
    """
    if hasattr(model, "peft_config"):
        return {}
    converted: dict[int, Tensor] = {}  # tied weights are one tensor, and stay one: they are written once
    state: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        address = getattr(parameter, "_local_tensor", parameter).data_ptr()
        if address not in converted:
            tensor = whole(parameter, keep=keep)
            converted[address] = stored(name, tensor, dtype) if keep else parameter
        state[name] = converted[address]
    return state if keep else {}
