"""A VAE's shift of latents, folded into its weights: whatever encodes or decodes need not know of it."""

from __future__ import annotations

from typing import Any


def without_shift(vae: Any) -> Any:
    """The AutoencoderKL, changed in place so that it makes and takes latents that are shifted already.

    A VAE with `shift_factor` s means the latents (z - s) * scaling_factor, but Stable Diffusion's pipelines know the
    factor alone. So s is taken from the encoder's last bias and added to the decoder's first, where a 1 x 1
    convolution makes that exact; its config has no shift afterwards, and is right for those who load an export.
    """
    import torch

    shift = vae.config.shift_factor
    if not shift:
        return vae
    channels = int(vae.config.latent_channels)
    last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    with torch.no_grad():
        last.bias[:channels] -= shift  # the means; the others are logarithms of variances
        if vae.post_quant_conv is None:
            # The decoder's own first layer pads its input with zeros, which a bias could not make up for.
            vae.post_quant_conv = _identity(channels, last.bias)
            vae.register_to_config(use_post_quant_conv=True)
        first = vae.post_quant_conv
        first.bias += shift * first.weight.sum(dim=(1, 2, 3))
    vae.register_to_config(shift_factor=None)
    return vae


def _identity(channels: int, like: Any) -> Any:
    import torch

    layer: Any = torch.nn.Conv2d(channels, channels, 1, device=like.device, dtype=like.dtype)
    torch.nn.init.dirac_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    return layer.requires_grad_(False)
