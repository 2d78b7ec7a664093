"""The images, views, timesteps and noise of each optimizer step, drawn from the trial's seed and the step alone.

So the draws do not depend on the micro-batch, the workers, the device or a resume, and are equal for all methods.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_peft.engine.contract import Rows, Seen, Share
from ray_peft.engine.recovery import divisor
from ray_peft.spec import ImageTrialSpec

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler
    from torch import Tensor

    from ray_peft.tasks.text_to_image.latents import Encoded


@dataclass(frozen=True)
class Batch:
    """Rows of one step, on the CPU."""

    samples: Tensor
    """(rows, channels, height, width) float32: latents with noise."""
    timesteps: Tensor
    """(rows,) int64."""
    texts: Tensor
    """(rows, tokens, width) float32: the captions' embeddings."""
    targets: Tensor
    """Like `samples`: the noise, or v."""
    weights: Tensor
    """(rows,) float32: the weight of each row's squared error."""
    keys: Tensor
    """(rows,) int64: what the dropout of each row is drawn from."""

    def part(self, first: int, rows: int) -> Batch:
        """`rows` rows from `first` on."""
        span = slice(first, first + rows)
        return Batch(*(value[span] for value in self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields in order."""
        return self.samples, self.timesteps, self.texts, self.targets, self.weights, self.keys


class Draws(Rows[Batch]):
    """The batches of a trial, step by step."""

    def __init__(self, spec: ImageTrialSpec, images: Encoded, scaling_factor: float, schedule: DDPMScheduler) -> None:
        self._spec, self._images, self._schedule = spec, images, schedule
        self._scale = scaling_factor
        self._orders: dict[int, list[int]] = {}

    @property
    def count(self) -> int:
        """Training images."""
        return len(self._images.moments)

    def parts(self, step: int, share: Share, rows: int) -> list[Batch]:
        """A worker's rows of a step, `rows` in every pass."""
        batch, size = self.batch(step), self._spec.train.batch_size // share.workers
        begin = share.rank * size
        return [batch.part(first, rows) for first in range(begin, begin + size, rows)]

    def size(self, part: Batch) -> int:
        """Rows of a pass."""
        return len(part.samples)

    def fitting(self, rows: int, share: Share) -> int:
        """The greatest divisor of a worker's share: recorded passes have one shape."""
        size = self._spec.train.batch_size // share.workers
        return divisor(size, rows) if share.workers == 1 else rows

    def seen(self, step: int) -> Seen:
        """The images of a step."""
        return Seen(images=self._spec.train.batch_size)

    def epoch(self, steps: int) -> float:
        """Epochs after so many steps."""
        return steps * self._spec.train.batch_size / self.count

    def rows(self, step: int) -> list[int]:
        """The images of a step, from 0: every epoch sees all in another order, and a batch may span two epochs."""
        import torch

        count, size = self.count, self._spec.train.batch_size
        images = []
        for place in range(step * size, (step + 1) * size):
            epoch, index = divmod(place, count)
            if epoch not in self._orders:
                order = torch.randperm(count, generator=self._generator("epoch", epoch)).tolist()
                self._orders = {
                    key: images_in_order for key, images_in_order in self._orders.items() if key >= epoch - 1
                } | {epoch: order}
            images.append(self._orders[epoch][index])
        return images

    def batch(self, step: int) -> Batch:
        """All rows of a step, over all workers and accumulated passes."""
        import torch

        from ray_peft.engine.keyed_dropout import row_key

        rows = self.rows(step)
        train, size, dice = self._spec.train, len(rows), self._generator("step", step)
        moments = self._images.moments
        views = torch.randint(moments.shape[1], (size,), generator=dice)
        timesteps = torch.randint(int(self._schedule.config.num_train_timesteps), (size,), generator=dice)
        mean, log_variance = moments[rows, views].chunk(2, dim=1)
        # A fresh sample of the VAE's posterior each visit, as if the image were encoded again; clamped as in diffusers.
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        latents = (mean + deviation * torch.randn(mean.shape, generator=dice)) * self._scale
        noise = torch.randn(mean.shape, generator=dice)
        if train.noise_offset:
            noise += train.noise_offset * torch.randn((*mean.shape[:2], 1, 1), generator=dice)
        predicts_noise = self._schedule.config.prediction_type == "epsilon"
        return Batch(
            samples=self._schedule.add_noise(latents, noise, timesteps),
            timesteps=timesteps,
            texts=self._images.embeddings[rows],
            targets=noise if predicts_noise else self._schedule.get_velocity(latents, noise, timesteps),
            weights=self._weights(timesteps, predicts_noise),
            keys=torch.tensor([row_key(self._spec.seed, step, place) for place in range(size)]),
        )

    def _weights(self, timesteps: Tensor, predicts_noise: bool) -> Tensor:
        """Min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556): min(SNR, gamma) / SNR for noise, / (SNR + 1) for v."""
        import torch
        from diffusers.training_utils import compute_snr

        gamma = self._spec.train.snr_gamma
        if gamma is None:
            return torch.ones(len(timesteps))
        snr: Any = compute_snr(self._schedule, timesteps)
        weights: Tensor = snr.clamp(max=gamma) / (snr if predicts_noise else snr + 1)
        return weights

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        import torch

        digest = hashlib.sha256(f"{self._spec.seed}:{purpose}:{number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
