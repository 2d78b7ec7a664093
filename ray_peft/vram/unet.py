"""A diffusion UNet on the meta device, adapted as a trial does it: pure bf16, and adapters multiplied in bf16."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from ray_peft.methods.base import Stage
from ray_peft.spec import ImageTrialSpec
from ray_peft.vram.shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

TEXT_TOKENS = 77
"""Length of a caption for CLIP's text encoder."""


def components(spec: ImageTrialSpec, stage: Stage, shape: ModelShape) -> Counter[str]:
    """Bytes by kind at the peak of a step of `stage`; VAE and text encoder are not on the GPU while it trains.

    Args:
        spec: the trial.
        stage: its stage.
        shape: of unet/config.json.
    """
    import torch

    from ray_peft.tasks.text_to_image.passes import light_adapters, recompute_feed_forward, unwrapped
    from ray_peft.vram.stand_ins import Autocast, on_meta
    from ray_peft.vram.step import Conditions
    from ray_peft.vram.step import components as of_step

    dtype = getattr(torch, stage.weights_dtype(spec.model.dtype))
    autocast = spec.train.precision == "bf16" and dtype == torch.float32
    rows, side = spec.train.micro_batch_size, spec.data.resolution // 8
    with on_meta(autocast=autocast):
        unet = _built(spec, stage, shape)
        channels, width = unet.config.in_channels, unet.config.cross_attention_dim
        model: Any = stage.attach(unet).train()
        if not autocast:
            light_adapters(model)
        inner = unwrapped(model)
        if spec.train.gradient_checkpointing:
            low = torch.bfloat16 if autocast else None
            inner.enable_gradient_checkpointing(_checkpoint(Autocast, low))
        elif not getattr(stage, "dropout", 0.0):
            recompute_feed_forward(inner, _checkpoint(Autocast, torch.bfloat16 if autocast else None))

        def loss() -> Tensor:
            latents = torch.empty(rows, channels, side, side, dtype=dtype, device="meta")
            texts = torch.empty(rows, TEXT_TOKENS, width, dtype=dtype, device="meta")
            times = torch.empty(rows, dtype=torch.long, device="meta")
            targets = torch.empty(latents.shape, device="meta")
            made = model(latents, times, encoder_hidden_states=texts).sample
            total: Tensor = (made.float() - targets).square().mean()
            return total

        given = Conditions(autocast=autocast, accumulates=spec.accumulation > 1, padded=False)
        found = of_step(model, stage, loss, given)
    if spec.train.ema_decay is not None:
        found["average"] = 2 * found["adapters"] or 2 * found["weights"]  # float32, and its copy while it is scored
    return found


def weights(spec: ImageTrialSpec, shape: ModelShape) -> Counter[str]:
    """Bytes of the untouched UNet."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(shape.plain())
    return Counter(weights=sum(p.numel() for p in unet.parameters()) * getattr(torch, spec.model.dtype).itemsize)


def _built(spec: ImageTrialSpec, stage: Stage, shape: ModelShape) -> Any:
    import torch
    from diffusers import UNet2DConditionModel
    from torch import nn

    from ray_peft.vram.stand_ins import quantized_linear

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(shape.plain())
    nn.Module.to(unet, getattr(torch, stage.weights_dtype(spec.model.dtype)))  # diffusers' own `to` warns of nothing
    unet.requires_grad_(False)
    quantization = stage.quantization()
    if quantization is not None:
        for name, module in list(unet.named_modules()):
            if isinstance(module, nn.Linear):
                unet.set_submodule(name, quantized_linear(module, quantization))
        unet.is_loaded_in_4bit = True
    return unet


def _checkpoint(autocast: Any, dtype: Any) -> Any:
    import contextlib

    from torch.utils.checkpoint import checkpoint

    again = lambda: (contextlib.nullcontext(), autocast(dtype))  # noqa: E731 - a factory for each recomputation
    return partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=again)
