"""Whether a pipeline's parts fit each other and the trial: they are built without weights, and the UNet is run once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.errors import ModelError, first_line
from ray_peft.spec import ImageTrialSpec, is_local
from ray_peft.tasks.text_to_image.part_files import check_weights

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from ray_peft.tasks.text_to_image.model import Configs

CONDITIONS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
"""Settings of a UNet that takes more inputs than timestep and caption."""


def check_kinds(configs: Configs, name: str) -> None:
    """Refuse pipelines whose parts have the right classes, but do not work as those of Stable Diffusion.

    Raises:
        ModelError: SDXL, conditions beside the caption, or latents that are scaled in another way.
    """
    if (configs.index.get("text_encoder_2") or [None])[0] is not None:
        raise ModelError(
            f"model.name: {name} has a second text encoder, as SDXL has, but task text_to_image trains pipelines like "
            "Stable Diffusion 1.5 and 2.1, with one; give one of those"
        )
    unet, vae = configs.parts["unet"], configs.parts["vae"]
    for key in CONDITIONS:
        if unet.get(key) is not None:
            raise ModelError(
                f"model.name: {name}: its UNet takes more inputs than timestep and caption ({key}: {unet[key]}), which "
                "task text_to_image does not have; give a pipeline like Stable Diffusion 1.5"
            )
    for key in ("latents_mean", "latents_std"):
        if vae.get(key) is not None:
            raise ModelError(
                f"model.name: {name}: its VAE scales each channel of the latents by itself ({key}), which Stable "
                "Diffusion's pipelines do not; give one whose latents are scaled by scaling_factor alone"
            )


def check_parts(spec: ImageTrialSpec, configs: Configs, tokenizer: CLIPTokenizer) -> None:
    """Compare the parts with each other, with their weight files, with the tokenizer and with the trial's resolution.

    Raises:
        ModelError: they do not fit.
    """
    name, text = spec.model.name, built("text_encoder", _text(configs, "text_encoder"))
    config = text.config
    size = int(config.vocab_size)
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= size:
        raise ModelError(
            f"model.{'tokenizer' if spec.model.tokenizer else 'name'}: the tokenizer's largest id is {largest}, but "
            f"the text encoder of {name} knows {size} tokens; use the tokenizer that it was trained with"
        )
    _run(spec, configs, int(config.hidden_size))
    if is_local(name) and not spec.model.random_weights:
        for part in ("unet", "vae", "text_encoder"):
            check_weights(Path(name) / part, part, built(part, _text(configs, part)))


def _run(spec: ImageTrialSpec, configs: Configs, width: int) -> None:
    """One pass of the UNet on the shapes of latents and captions."""
    name, config = spec.model.name, _text(configs, "unet")
    theirs = built("unet", config).config.cross_attention_dim
    widths = set(theirs) if isinstance(theirs, list | tuple) else {theirs}
    if widths != {width}:
        raise ModelError(
            f"model.name: {name}: its UNet takes captions of {', '.join(map(str, sorted(widths)))} numbers a token, "
            f"and its text encoder makes {width}; use parts of one pipeline"
        )
    side = spec.data.resolution // 2 ** (len(configs.parts["vae"].get("block_out_channels", [64])) - 1)
    try:
        shape, made_shape = _passed(config, side, width)
    except Exception as error:  # whatever layers raise of shapes that they do not take
        raise ModelError(
            f"data.resolution: {spec.data.resolution}: the UNet of {name} cannot take latents of {side} x {side}: "
            f"{first_line(error)}; use another resolution, or a pipeline like Stable Diffusion 1.5"
        ) from None
    if made_shape != shape:
        raise ModelError(
            f"model.name: {name}: its UNet makes {made_shape} of latents of {shape}, so that no noise can be compared "
            "with it; give a pipeline like Stable Diffusion 1.5"
        )


@cache
def _passed(config: str, side: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape (channels, height, width) of latents, and of what a UNet makes of them."""
    import torch

    unet = built("unet", config)
    latents = torch.empty(1, unet.config.in_channels, side, side, device="meta")
    texts, steps = torch.empty(1, 2, width, device="meta"), torch.empty(1, dtype=torch.long, device="meta")
    with torch.no_grad():
        output = unet(latents, steps, encoder_hidden_states=texts).sample
    return tuple(latents.shape[1:]), tuple(output.shape[1:])


def _text(configs: Configs, part: str) -> str:
    return json.dumps(configs.parts[part], sort_keys=True)


@cache
def built(part: str, config: str) -> Any:
    """A part of a pipeline without weights, on the meta device; `config` is JSON.

    Raises:
        ModelError: the configuration is of no such part.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    plain = json.loads(config)
    try:
        with torch.device("meta"):
            if part == "text_encoder":
                return CLIPTextModel(CLIPTextConfig.from_dict(plain))
            kind: Any = UNet2DConditionModel if part == "unet" else AutoencoderKL
            return kind.from_config(plain).eval()
    except Exception as error:  # numbers and words of a config that somebody wrote
        raise ModelError(f"model.name: {part}/config.json cannot be built: {first_line(error)}") from None


def special_token_notes(kind: str, texts: Sequence[str], tokenizer: CLIPTokenizer) -> list[str]:
    """Sentences on texts that hold one of the tokenizer's special tokens, such as the one that ends a text."""
    special = sorted(str(token) for token in tokenizer.all_special_tokens)
    typed = {token: sum(token in text for text in texts) for token in special}
    return [
        f"{count} of {len(texts)} {kind} hold {token}, which the tokenizer reads as a special token and not as text"
        for token, count in typed.items()
        if count
    ]


def prompt_notes(prompts: Sequence[str], tokenizer: CLIPTokenizer) -> list[str]:
    """Sentences on prompts whose end is cut, and on prompts that are equal for the model and give equal images."""
    longest = int(tokenizer.model_max_length)
    # verbose=False: the tokenizer would warn of each, and they are named here.
    ids = [tokenizer(prompt, verbose=False).input_ids for prompt in prompts]
    cut = [place for place, tokens in enumerate(ids, start=1) if len(tokens) > longest]
    notes = []
    if cut:
        numbers = ", ".join(map(str, cut))
        are = "are" if len(cut) > 1 else "is"
        notes.append(f"evaluation.prompts: {len(cut)} of {len(ids)} {are} cut to {longest} tokens (number {numbers})")
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, tokens in enumerate(ids, start=1):
        # As the tokenizer cuts: its last token is the one that ends a text.
        short = tuple(tokens) if len(tokens) <= longest else (*tokens[: longest - 1], tokens[-1])
        alike.setdefault(short, []).append(place)
    for places in alike.values():
        if len(places) > 1:
            numbers = " and ".join(map(str, places))
            notes.append(f"evaluation.prompts: numbers {numbers} are equal for the model, and so are their images")
    return notes
