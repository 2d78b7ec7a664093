"""The predicted peak of a diffusion UNet, adapted, trained and scored on shapes, and of the VAE and text encoder."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.engine.row_dropout import CODE as DROPOUT
from ray_peft.foundation.units import MIB
from ray_peft.methods.base import ENOUGH_STEPS, Stage
from ray_peft.spec import ImageTrialSpec
from ray_peft.vram.cards import ANY, Gpu
from ray_peft.vram.parts import ATTACH, SCORING, STEP, during
from ray_peft.vram.predict import Prediction, cached, common, evaluating, recorded_segments, segments
from ray_peft.vram.shape import ModelShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TEXT_TOKENS = 77
"""Length of a caption for CLIP's text encoder."""

CODE = (*(Path(__file__).with_name(name) for name in ("memory.py", "passes.py", "style.py")), *DROPOUT)
"""The files of this task that predictions run or read; predictions on disk are valid for this code only."""

CONVOLUTIONS = 60 * MIB
"""Memory of cuDNN beside the tensors while images are made: the rest of three measured peaks of SD 1.5 on an H200."""


def predict(
    spec: ImageTrialSpec, shape: ModelShape, *, gpu: Gpu = ANY, others: Mapping[str, ModelShape] | None = None
) -> Prediction:
    """The peak of a UNet's training, and of scoring and generating images.

    Args:
        spec: the trial.
        shape: of unet/config.json.
        gpu: decides the workspace of matrix products and the slack of the allocator.
        others: the shapes of `vae` and `text_encoder`; None leaves their memory out.
    """
    train, peak_kinds, in_pools = spec.train, Counter[str](), 0
    stages = [stage for stage, _ in spec.method.stages(ENOUGH_STEPS)]
    scored_stages: list[Stage | None] = [*stages] or [None]
    scored = [_painting(spec, stage, shape, others or {}) for stage in scored_stages]
    last = scored[-1]
    painting = last["painting"] + CONVOLUTIONS if last["painting"] else 0
    evaluation = max(last["model"] + max(last["scoring"], painting), last["encoding"]) + gpu.workspace
    for stage, beside in zip(stages, scored, strict=False):
        settings = [train.micro_batch_size, train.gradient_checkpointing, train.precision]
        decides = common(spec, stage, shape, spec.data.resolution)

        def compute(stage: Stage = stage) -> Counter[str]:
            return components(spec, stage, shape)

        step = cached([*decides, "unet", train.ema_decay is not None, *settings], CODE, compute)
        gradients = step["adapters"] or step["weights"]
        lasting = Counter(workspace=gpu.workspace, average=step["average"])
        if spec.resources.num_workers > 1:  # gradients are summed over the workers in a copy of all
            lasting["buckets"] = gradients
        scoring = beside["scoring"] if train.eval_every else 0
        in_pools = max(in_pools, recorded_segments(step, scoring, sum(lasting.values())))
        steps = [peak_kinds, step | lasting]
        if train.eval_every:
            between = evaluating(step, beside) | lasting
            between["gradients"] = gradients  # they stay: a recorded pass adds to the same
            steps.append(between)
        peak_kinds = max(steps, key=lambda kinds: sum(kinds.values()))
    if not peak_kinds:
        peak_kinds = weights(spec, shape)
    peak = sum(peak_kinds.values())
    return Prediction(
        {kind: size for kind, size in peak_kinds.items() if size},
        peak,
        in_pools if in_pools and train.cuda_graphs else segments(peak, gpu.slack),
        evaluation,
    )


def _painting(
    spec: ImageTrialSpec, stage: Stage | None, shape: ModelShape, others: Mapping[str, ModelShape]
) -> Counter[str]:
    """Bytes of the UNet, of scoring and generating images beside it, and of encoding images before it is loaded."""
    scoring = spec.evaluation
    images = len(scoring.prompts) * len(scoring.seeds)
    settings = [scoring.batch_size, images, scoring.guidance_scale > 1, scoring.style, spec.train.precision]
    shapes = [others[part].config for part in sorted(others)]

    def compute() -> Counter[str]:
        return evaluation(spec, stage, shape, others)

    return cached([*common(spec, stage, shape, spec.data.resolution), "painting", *settings, *shapes], CODE, compute)


def components(spec: ImageTrialSpec, stage: Stage, shape: ModelShape) -> Counter[str]:
    """Bytes by kind at the peak of a step of `stage`; VAE and text encoder are not on the GPU while it trains.

    Args:
        spec: the trial.
        stage: its stage.
        shape: of unet/config.json.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    from ray_peft.engine.row_dropout import RowDropout, may_drop
    from ray_peft.tasks.text_to_image.passes import attached, autocasts, input_dtype, spare_activations, unwrapped
    from ray_peft.vram.stand_ins import on_meta, recomputing
    from ray_peft.vram.step import Conditions
    from ray_peft.vram.step import components as of_step

    dtype, autocast = input_dtype(spec), autocasts(spec)
    rows, side = spec.train.micro_batch_size, spec.data.resolution // 8
    with on_meta(autocast=autocast):
        unet = _built(spec, stage, shape)
        channels, width = unet.config.in_channels, unet.config.cross_attention_dim
        with during(ATTACH):
            model: Any = attached(spec, stage, unet).train()
        dropout = RowDropout(model, predicts=True) if may_drop(model) else None
        contexts = recomputing(torch.bfloat16 if autocast else None, None if dropout is None else dropout.contexts)
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        spare_activations(spec, unwrapped(model), again)

        def loss() -> Tensor:
            if dropout is not None:
                dropout.begin(torch.empty(rows, dtype=torch.long, device="meta"))
            latents = torch.empty(rows, channels, side, side, dtype=dtype, device="meta")
            texts = torch.empty(rows, TEXT_TOKENS, width, dtype=dtype, device="meta")
            times = torch.empty(rows, dtype=torch.long, device="meta")
            targets = torch.empty(latents.shape, device="meta")
            output = model(latents, times, encoder_hidden_states=texts).sample
            total: Tensor = (output.float() - targets).square().mean()
            return total

        # Gradients are cleared, never let go: a recorded pass adds to the same memory.
        conditions = Conditions(autocast=autocast, accumulates=True, padded=False)
        with during(STEP), contextlib.nullcontext() if dropout is None else dropout.installed():
            kinds = of_step(model, stage, loss, conditions)
    if spec.train.ema_decay is not None:
        kinds["average"] = 2 * kinds["adapters"] or 2 * kinds["weights"]  # float32, and its copy while it is scored
    return kinds


def evaluation(
    spec: ImageTrialSpec, stage: Stage | None, shape: ModelShape, others: Mapping[str, ModelShape]
) -> Counter[str]:
    """Bytes of the UNet as it is scored, and beside it while losses are measured and while images are made.

    Args:
        spec: the trial.
        stage: the one that was trained; None for the untouched UNet.
        shape: of unet/config.json.
        others: of `vae` and `text_encoder`; without both, of the losses alone.

    Returns:
        model, scoring (one pass of held-out latents), painting (VAE and text encoder with the largest of: a pass of the
        prompts' latents, the decoding of one image, the style of one image), encoding (before the UNet is there: both
        encoders in float32 and the encoding of one image). The text encoder's own passes are smaller and not looked at.
    """
    import torch

    from ray_peft.tasks.text_to_image.passes import autocasts, input_dtype
    from ray_peft.vram.stand_ins import Autocast, on_meta
    from ray_peft.vram.step import own_model
    from ray_peft.vram.tape import Tape

    dtype, autocast = input_dtype(spec), autocasts(spec)
    low = torch.bfloat16 if autocast else None
    scoring, side = spec.evaluation, spec.data.resolution // 8
    kinds: Counter[str] = Counter()
    with on_meta(autocast=autocast), torch.no_grad():
        model = _scored(spec, stage, shape)
        tape = Tape(truth=True)
        own_model(tape, model)
        kinds["model"] = tape.now
        with during(SCORING), Autocast(low), tape:
            _denoise(model, scoring.batch_size, side, dtype)
        kinds["scoring"] = tape.peak - kinds["model"]
        if not {"vae", "text_encoder"} <= others.keys():
            return kinds
        if scoring.prompts:
            vae, text_encoder = _encoders(others, dtype)
            own_model(tape, vae)
            own_model(tape, text_encoder)
            tape.restart()
            rows = min(scoring.batch_size, len(scoring.prompts) * len(scoring.seeds))
            with Autocast(low), tape:
                _denoise(model, rows * (2 if scoring.guidance_scale > 1 else 1), side, dtype)
                _decode(vae, rows, side, dtype)
            if scoring.style is not None:
                with Autocast(None), tape:
                    _look(vae, spec.data.resolution, dtype)
            kinds["painting"] = tape.peak - kinds["model"]
    with on_meta(autocast=False), torch.no_grad():
        tape = Tape(truth=True)
        vae, text_encoder = _encoders(others, torch.float32)
        own_model(tape, vae)
        own_model(tape, text_encoder)
        with Autocast(None), tape:
            vae.encode(_empty(1, 3, spec.data.resolution, torch.float32))
        kinds["encoding"] = tape.peak
    return kinds


def weights(spec: ImageTrialSpec, shape: ModelShape) -> Counter[str]:
    """Bytes of the untouched UNet."""
    return Counter(
        weights=sum(parameter.numel() * parameter.itemsize for parameter in _built(spec, None, shape).parameters())
    )


def _scored(spec: ImageTrialSpec, stage: Stage | None, shape: ModelShape) -> Any:
    """The UNet as it is after a stage's training."""
    from ray_peft.tasks.text_to_image.passes import attached

    model: Any = _built(spec, stage, shape)
    return (attached(spec, stage, model) if stage is not None else model).eval()


def _encoders(others: Mapping[str, ModelShape], dtype: torch.dtype) -> tuple[Any, Any]:
    """VAE and text encoder, frozen."""
    import torch
    from diffusers import AutoencoderKL
    from torch import nn
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(others["vae"].plain())
        text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(others["text_encoder"].plain()))
    for encoder in (vae, text_encoder):
        nn.Module.to(encoder, dtype).requires_grad_(False).eval()
    vae.enable_slicing()  # as make_images does
    return vae, text_encoder


def _denoise(model: Any, rows: int, side: int, dtype: torch.dtype) -> None:
    """One pass of the UNet."""
    import torch

    from ray_peft.tasks.text_to_image.passes import unwrapped

    config = unwrapped(model).config
    texts = torch.empty(rows, TEXT_TOKENS, config.cross_attention_dim, dtype=dtype, device="meta")
    times = torch.empty(rows, dtype=torch.long, device="meta")
    model(_empty(rows, config.in_channels, side, dtype), times, encoder_hidden_states=texts)


def _decode(vae: Any, rows: int, side: int, dtype: torch.dtype) -> None:
    vae.decode(_empty(rows, vae.config.latent_channels, side, dtype))


def _look(vae: Any, resolution: int, dtype: torch.dtype) -> None:
    """The style of one image."""
    from ray_peft.tasks.text_to_image.style import gram, watched

    with watched(vae.encoder, gram):
        vae.encoder(_empty(1, 3, resolution, dtype))


def _empty(rows: int, channels: int, side: int, dtype: torch.dtype) -> Tensor:
    import torch

    return torch.empty(rows, channels, side, side, dtype=dtype, device="meta")


def _built(spec: ImageTrialSpec, stage: Stage | None, shape: ModelShape) -> Any:
    import torch
    from diffusers import UNet2DConditionModel
    from torch import nn

    from ray_peft.vram.quantised_layers import quantize

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(shape.plain())
    method = stage or spec.method
    nn.Module.to(unet, getattr(torch, method.weights_dtype(spec.model.dtype)))  # diffusers' own `to` warns of nothing
    unet.requires_grad_(False)
    quantization = method.quantization() or (None if method.needs_full_weights else spec.model.quantization)
    if quantization is not None:
        quantize(unet, quantization)
    return unet
