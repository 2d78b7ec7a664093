"""The noise levels of a pipeline: those that it is trained with, and whether its sampler can make images from them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from ray_peft.errors import ModelError, first_line
from ray_peft.spec import ImageTrialSpec

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

    from ray_peft.tasks.text_to_image.model import Configs


def training_schedule(spec: ImageTrialSpec, configs: Configs) -> DDPMScheduler:
    """The pipeline's noise levels, and what the UNet predicts.

    Raises:
        ModelError: the task cannot train this kind of diffusion, or one of the levels cannot be learnt.
    """
    from diffusers import DDPMScheduler

    name = spec.model.name
    sampler_kind(configs, name)
    config = {**configs.parts["scheduler"], **_prediction_setting(spec)}
    try:
        schedule = DDPMScheduler.from_config(config)
    except Exception as error:  # numbers and words of a config that somebody wrote
        raise ModelError(f"model.name: {name}: its scheduler_config.json cannot be used: {first_line(error)}") from None
    kind, levels = schedule.config.prediction_type, schedule.alphas_cumprod
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(f"model.name: {name} predicts {kind}; task text_to_image trains epsilon and v")
    if len(levels) != schedule.config.num_train_timesteps:
        raise ModelError(
            f"model.name: {name}: its scheduler has {len(levels)} trained_betas for num_train_timesteps: "
            f"{schedule.config.num_train_timesteps}; mend scheduler_config.json"
        )
    if not bool(((levels >= 0) & (levels <= 1)).all()):
        raise ModelError(f"model.name: {name}: its scheduler's betas are no noise levels; mend scheduler_config.json")
    if kind == "epsilon" and float(levels.min()) == 0:
        raise ModelError(
            f"model.name: {name}: its scheduler ends with noise alone (a signal-to-noise ratio of zero, such as by "
            "rescale_betas_zero_snr), from which a UNet that predicts the noise (epsilon) can tell no image: 0 / 0. "
            "Use train.prediction: v_prediction for a UNet that predicts v, or set rescale_betas_zero_snr: false (or "
            "other trained_betas) in scheduler/scheduler_config.json"
        )
    return schedule


def sampler_kind(configs: Configs, name: str) -> Any:
    """The class of the pipeline's own scheduler.

    Raises:
        ModelError: there is none of this name, or it does not add noise by betas.
    """
    import diffusers

    word = (configs.index.get("scheduler") or [None, "PNDMScheduler"])[1]
    kind = getattr(diffusers, str(word), None)
    if kind is None or not hasattr(kind, "from_config"):
        raise ModelError(f"model.name: {name}: model_index.json names the scheduler {word}, which diffusers lacks")
    if "beta_schedule" not in inspect.signature(kind.__init__).parameters:
        raise ModelError(
            f"model.name: {name}: its scheduler {word} is of another kind of diffusion; task text_to_image trains "
            "with those that add noise by betas, such as DDPMScheduler, DDIMScheduler and PNDMScheduler"
        )
    return kind


def sampler(spec: ImageTrialSpec, configs: Configs) -> Any:
    """The pipeline's own scheduler, that makes images.

    Raises:
        ModelError: as `sampler_kind`.
    """
    return sampler_kind(configs, spec.model.name).from_config(
        {**configs.parts["scheduler"], **_prediction_setting(spec)}
    )


def check_evaluation(spec: ImageTrialSpec, configs: Configs, schedule: DDPMScheduler) -> list[str]:
    """What a reader must know about the trial's scores; the sampler is run once, with noise in place of the UNet.

    Raises:
        ModelError: more timesteps are asked for than there are, or the sampler cannot do the steps that are asked for.
    """
    evaluation, timesteps = spec.evaluation, int(schedule.config.num_train_timesteps)
    images = [("inference_steps", evaluation.inference_steps)] if evaluation.prompts else []
    for key, number in [("timesteps", evaluation.timesteps), *images]:
        if number > timesteps:
            raise ModelError(
                f"evaluation.{key}: {number}: the scheduler of {spec.model.name} has {timesteps} timesteps; use at "
                f"most {timesteps}"
            )
    if evaluation.prompts:
        _rehearse(spec, configs)
    prediction = configs.parts["scheduler"].get("prediction_type", "epsilon")
    if spec.train.prediction not in (None, prediction):
        return [
            f"train.prediction: {spec.train.prediction} is not what {spec.model.name} predicts ({prediction}): until "
            "it has learnt that, and without training, its losses and images mean nothing"
        ]
    return []


def _rehearse(spec: ImageTrialSpec, configs: Configs) -> None:
    import torch

    name, steps, dice = spec.model.name, spec.evaluation.inference_steps, torch.Generator().manual_seed(0)
    word = "its scheduler"
    try:
        scheduler = sampler(spec, configs)
        word = f"its scheduler {type(scheduler).__name__}"
        scheduler.set_timesteps(steps)
        latents = torch.randn(1, 1, 2, 2, generator=dice) * scheduler.init_noise_sigma
        for step in scheduler.timesteps:
            sample = scheduler.scale_model_input(latents, step)
            latents = scheduler.step(torch.randn(sample.shape, generator=dice), step, latents).prev_sample
            if not bool(torch.isfinite(latents).all()):
                raise ModelError(
                    f"model.name: {name}: {word} makes NaN or infinity at timestep {int(step)} of "
                    f"evaluation.inference_steps: {steps}, whatever the UNet says; name one in model_index.json that "
                    "its noise levels suit, such as DDIMScheduler with timestep_spacing: trailing where they end with "
                    "noise alone"
                )
    except ModelError:
        raise
    except Exception as error:  # schedulers refuse settings in a dozen ways
        raise ModelError(
            f"model.name: {name}: {word} cannot make images in evaluation.inference_steps: {steps}: "
            f"{first_line(error)}; use another number, or name another scheduler in model_index.json"
        ) from None


def _prediction_setting(spec: ImageTrialSpec) -> dict[str, str]:
    return {"prediction_type": spec.train.prediction} if spec.train.prediction else {}
