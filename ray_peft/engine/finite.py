"""A trial that diverges ends at that step, in every task."""

from __future__ import annotations

import math
from typing import Any

from ray_peft.errors import TrialFailed
from ray_peft.methods.base import Method, Stage
from ray_peft.spec import TrialSpec


class FiniteGuard:
    """Ends a trial whose loss or gradient is not finite, at that step or the next, before a checkpoint keeps it."""

    def __init__(self, spec: TrialSpec, stage: Stage, first_step: int) -> None:
        self._spec, self._stage, self._first_step = spec, stage, first_step
        self._unchecked: tuple[int, Any, Any] | None = None
        """The last step, its loss and gradient norm (2,), and the event after their copy from the GPU."""

    def see(self, step: int, loss: Any, grad_norm: Any) -> None:
        """Take a step's values, and check those of the step before: the GPU has computed them, so nothing waits.

        Args:
            step: of the stage, from 1.
            loss: tensor (), the sum of losses since the last log.
            grad_norm: tensor () or float.
        """
        import torch

        self.check()
        pair = (loss.detach().float(), torch.as_tensor(grad_norm, dtype=torch.float32, device=loss.device))
        values = torch.stack([value.reshape(()) for value in pair])
        if not values.is_cuda:
            self._unchecked = (step, values, None)
            return
        # The copy is queued now, so reading it later does not wait for work that is queued after it.
        page = torch.empty(2, pin_memory=True).copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        self._unchecked = (step, page, arrived)

    def check(self) -> None:
        """Check the values of the last step.

        Raises:
            TrialFailed: one of them is not finite.
        """
        if self._unchecked is None:
            return
        step, values, arrived = self._unchecked
        if arrived is not None:
            arrived.synchronize()
        self._unchecked = None
        for name, value in zip(("the training loss", "the gradient's norm"), values.tolist(), strict=True):
            if not math.isfinite(value):
                stage, train = self._stage, self._spec.train
                raise TrialFailed(
                    f"{name} is {value} at step {self._first_step + step} ({stage.name}, lr {stage.lr:g}, "
                    f"{stage.arithmetic(self._spec.model.dtype, storage=self._spec.quantization)}, "
                    f"precision {train.precision}); "
                    f"{ways_out(self._spec, stage)}"
                )


def ways_out(spec: TrialSpec, stage: Stage | None) -> str:
    """Ways to keep a trial's numbers finite, as text: settings to change that the trial does not use yet.

    Args:
        spec: the trial.
        stage: what trained its weights; None where nothing was trained.
    """
    ways = []
    if stage is not None:
        ways.append(f"lower {_key(spec.method, stage)}.lr")
        if not spec.train.warmup_steps and not spec.train.warmup_ratio:
            ways.append("add train.warmup_steps")
    if spec.train.precision != "fp32":
        ways.append("use train.precision: fp32")
    if spec.model.dtype == "float16":
        ways.append("use model.dtype: float32 or bfloat16")
    if spec.quantization is not None and spec.quantization.compute_dtype == "float16":
        ways.append("use compute_dtype: float32 or bfloat16 for the 4-bit base")
    if stage is None:  # also of an ensemble, whose members may be such bases
        ways.append(f"look for NaN and infinity in the weights of {spec.model.name}")
    return f"{', '.join(ways[:-1])}, or {ways[-1]}" if len(ways) > 1 else ways[0]


def _key(method: Method, stage: Stage) -> str:
    """The key of a stage's settings: `method`, or the stage's part of a method of several stages."""
    parts = [name for name in type(method).model_fields if getattr(method, name) == stage]
    return f"method.{parts[0]}" if parts else "method"
