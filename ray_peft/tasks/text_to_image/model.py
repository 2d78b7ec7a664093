"""The parts of a Stable Diffusion pipeline: checked, loaded one by one, with their own weights or random ones."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.engine.recovery import leave_out_imports
from ray_peft.errors import ModelError, first_line
from ray_peft.foundation.cache import entry, made_whole
from ray_peft.methods.base import Dtype
from ray_peft.spec import ImageTrialSpec, ModelSpec, is_local
from ray_peft.tasks.files import file_digest
from ray_peft.tasks.text_to_image.fits import check_kinds
from ray_peft.tasks.text_to_image.four_bit import quantise
from ray_peft.tasks.text_to_image.part_files import FROM_SINGLE_FILE, single_file_in, variant_of
from ray_peft.tasks.text_to_image.schedule import sampler, training_schedule
from ray_peft.tasks.text_to_image.vae import without_shift

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextModel, CLIPTokenizer

PARTS = ("unet", "vae", "text_encoder", "scheduler")
"""The folders of a pipeline that a trial needs, beside its tokenizer's."""

CLIP_TOKENS = 77
"""The longest text of CLIP, for configurations without a limit."""

_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


@dataclass(frozen=True)
class Configs:
    """A pipeline's configurations, without weights."""

    index: dict[str, Any]
    """model_index.json: the classes of the parts."""
    parts: dict[str, dict[str, Any]]

    @property
    def text(self) -> str:
        """All of them as one text, for keys."""
        return json.dumps([self.index, self.parts], sort_keys=True)


def load_configs(model: ModelSpec) -> Configs:
    """The pipeline's configurations.

    Raises:
        ModelError: the model is not there, is no Stable Diffusion pipeline, or has no weights.
    """
    index = _json(model, "model_index.json")
    kinds = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    for part, kind in kinds.items():
        class_name = (index.get(part) or [None, None])[1]
        if class_name != kind:
            raise ModelError(
                f"model.name: {model.name} has {class_name or 'nothing'} as its {part}, but task text_to_image trains "
                f"pipelines like Stable Diffusion 1.5, with {kind}; give one of those"
            )
    parts = {part: _json(model, f"{part}/{_config_name(part)}") for part in PARTS}
    if parts["unet"].get("in_channels") != parts["vae"].get("latent_channels", 4):
        raise ModelError(
            f"model.name: {model.name}: its UNet takes {parts['unet'].get('in_channels')} channels, its VAE makes "
            f"{parts['vae'].get('latent_channels', 4)}; inpainting and depth models are not served"
        )
    configs = Configs(index, parts)
    check_kinds(configs, model.name)
    if is_local(model.name) and not model.random_weights:
        for part in kinds:
            variant_of(Path(model.name) / part, part)
    return configs


def _config_name(part: str) -> str:
    return "scheduler_config.json" if part == "scheduler" else "config.json"


def _json(model: ModelSpec, file: str) -> dict[str, Any]:
    if is_local(model.name):
        path = Path(model.name) / file
        if Path(model.name).is_file():
            raise ModelError(f"model.name: {model.name} is a file, not the folder of a pipeline; {FROM_SINGLE_FILE}")
        if not Path(model.name).is_dir():
            raise ModelError(f"model.name: {model.name}: no such folder")
        if not path.is_file():
            hint = single_file_in(Path(model.name))
            raise ModelError(
                f"model.name: {model.name} has no {file}; give the folder of a diffusers pipeline (model_index.json, "
                f"unet/, vae/, text_encoder/, tokenizer/, scheduler/){f'; {hint}' if hint else ''}"
            )
    else:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(model.name, file, revision=model.revision))
        except Exception as error:  # the hub client raises a dozen unrelated types
            raise ModelError(f"model.name: {model.name} cannot be loaded: {first_line(error)}") from None
    try:
        plain = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.name: {path} is not JSON: {error}") from None
    if not isinstance(plain, dict):
        raise ModelError(f"model.name: {path} must hold a JSON object (found {type(plain).__name__})")
    return plain


def load_tokenizer(model: ModelSpec) -> CLIPTokenizer:
    """The tokenizer of captions and prompts, which cuts them to the length that the text encoder takes.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import CLIPTokenizer

    name = model.tokenizer or model.name
    where: dict[str, Any] = {} if model.tokenizer else {"subfolder": "tokenizer", "revision": model.revision}
    folder = Path(name) / where.get("subfolder", "")
    # Without these files transformers makes a tokenizer that knows no word, and says nothing.
    if is_local(name) and not any(all((folder / file).is_file() for file in files) for files in _VOCABULARIES):
        raise ModelError(
            f"model.{'tokenizer' if model.tokenizer else 'name'}: {name} has no tokenizer (vocab.json and merges.txt, "
            "or tokenizer.json); set model.tokenizer to the folder or hub id of one"
        )
    try:
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(name, **where)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ModelError(f"model.tokenizer: {name} cannot be loaded: {first_line(error)}") from None
    positions = int(load_configs(model).parts["text_encoder"].get("max_position_embeddings", CLIP_TOKENS))
    tokenizer.model_max_length = min(int(tokenizer.model_max_length), positions)  # else that of no limit at all
    return tokenizer


def load_unet(spec: ImageTrialSpec, device: str) -> UNet2DConditionModel:
    """The UNet on `device`, frozen, in the dtype and storage that the method needs.

    Raises:
        ModelError: it cannot be loaded.
    """
    import torch
    from diffusers import UNet2DConditionModel

    unet = _load(UNet2DConditionModel, spec.model, "unet", spec.method.weights_dtype(spec.model.dtype))
    unet.requires_grad_(False)
    if spec.quantization is not None:
        quantise(unet, spec.quantization, device)
    if device == "cpu" or spec.method.needs_full_weights:
        return unet.to(device)
    # The layout of the GPU's convolutions; trained weights keep the other, which optimizers read as one row of numbers.
    return unet.to(device, memory_format=torch.channels_last)


def load_trained_unet(spec: ImageTrialSpec, folder: Path, device: str) -> UNet2DConditionModel:
    """The UNet whose weights lie in `folder`/unet, in the dtype that the method holds them in, frozen.

    Raises:
        ModelError: it cannot be loaded.
    """
    from diffusers import UNet2DConditionModel

    trained = spec.model.model_copy(update={"name": str(folder), "revision": None, "random_weights": False})
    unet = _load(UNet2DConditionModel, trained, "unet", spec.method.weights_dtype(spec.model.dtype))
    return unet.requires_grad_(False).to(device)


def load_vae(model: ModelSpec, device: str, dtype: Dtype) -> AutoencoderKL:
    """The frozen VAE, whose latents are to be multiplied by its scaling_factor alone. Raises: ModelError."""
    from diffusers import AutoencoderKL

    return without_shift(_load(AutoencoderKL, model, "vae", dtype)).requires_grad_(False).to(device)


def load_text_encoder(model: ModelSpec, device: str, dtype: Dtype) -> CLIPTextModel:
    """The frozen text encoder. Raises: ModelError."""
    from transformers import CLIPTextModel

    encoder: Any = _load(CLIPTextModel, model, "text_encoder", dtype)
    moved: CLIPTextModel = encoder.requires_grad_(False).to(device)
    return moved


def load_noise(spec: ImageTrialSpec) -> DDPMScheduler:
    """The noise schedule of training: the pipeline's betas, and what the UNet predicts.

    Raises:
        ModelError: it is none that the task trains.
    """
    return training_schedule(spec, load_configs(spec.model))


def load_pipeline(
    spec: ImageTrialSpec, unet: nn.Module, device: str, dtype: Dtype | None = None
) -> StableDiffusionPipeline:
    """The pipeline around a UNet that is already on `device`: VAE and text encoder beside it, without safety checker.

    `dtype` is theirs; None takes the UNet's.

    Raises:
        ModelError: a part cannot be loaded.
    """
    import diffusers

    dtype = dtype or spec.method.weights_dtype(spec.model.dtype)  # a pipeline hands tensors on in one dtype
    configs = load_configs(spec.model)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=load_vae(spec.model, device, dtype),
        text_encoder=load_text_encoder(spec.model, device, dtype),
        tokenizer=load_tokenizer(spec.model),
        unet=unet,
        scheduler=sampler(spec, configs),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load(kind: Any, model: ModelSpec, part: str, dtype: Dtype) -> Any:
    import torch
    from transformers import PreTrainedModel

    leave_out_imports()
    folder = str(_random_part(model, part)) if model.random_weights else model.name
    word = "dtype" if issubclass(kind, PreTrainedModel) else "torch_dtype"
    where: dict[str, Any] = {"subfolder": part, "revision": model.revision, "use_safetensors": True}
    if is_local(folder):
        where["variant"] = variant_of(Path(folder) / part, part)
    try:
        return kind.from_pretrained(folder, **where, **{word: getattr(torch, dtype)}).eval()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ModelError(f"model.name: {folder}/{part} cannot be loaded: {first_line(error)}") from error


def _random_part(model: ModelSpec, part: str) -> Path:
    """A folder with `part` in random bf16 weights of the model's shape, made once and kept in the cache."""
    import torch

    config = load_configs(model).parts[part]
    key = hashlib.sha256(json.dumps([part, config], sort_keys=True).encode()).hexdigest()[:24]
    folder = entry("random", key)
    if (folder / part / "config.json").is_file():
        return folder
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(devices=[] if device == "cpu" else None), torch.device(device):
        torch.manual_seed(0)
        built = _built(part, config)
    torch.nn.Module.to(built, torch.bfloat16)  # diffusers' own `to` warns of nothing
    with made_whole(folder, f"{part}/config.json") as partial:
        built.save_pretrained(partial / part)
    return folder


def _built(part: str, config: dict[str, Any]) -> Any:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    if part == "text_encoder":
        return CLIPTextModel(CLIPTextConfig.from_dict(config))
    kind = diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL
    return kind.from_config(config)


def fingerprint(model: ModelSpec) -> str:
    """SHA-256 over a pipeline's configs, weights and tokenizer: content of local files, commit of a hub model."""
    digest = hashlib.sha256(load_configs(model).text.encode())
    digest.update(b"random" if model.random_weights else b"")
    # Version 0.1.0 read the shift and did not apply it: what it kept of such a model is of other latents.
    digest.update(b"shifted" if load_configs(model).parts["vae"].get("shift_factor") else b"")
    parts: list[tuple[str, tuple[str, ...]]] = [(model.name, ("unet", "vae", "text_encoder", "tokenizer"))]
    parts += [(model.tokenizer, ("",))] if model.tokenizer else []
    for name, folders in parts:
        if not is_local(name):
            digest.update(f"{name}@{_commit(model) if name == model.name else ''}".encode())
            continue
        for folder in folders:
            files = (Path(name) / folder).glob("*")
            for file in sorted(file for file in files if file.suffix in (".safetensors", ".json", ".txt")):
                digest.update(f"{folder}/{file.name}:{file_digest(file)}".encode())
    return digest.hexdigest()[:16]


def _commit(model: ModelSpec) -> str:
    """The hub commit that the model's files come from."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model.name, "model_index.json", revision=model.revision)).parent.name
