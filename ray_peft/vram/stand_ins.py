"""Operations without a kernel on the meta device, with the allocations of their CUDA kernels; each names its source."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor
from torch.autograd import Function
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

FLOAT = torch.float32
_ATTENTION = torch._C._nn.scaled_dot_product_attention  # noqa: SLF001 - F's own may be another while a model trains
_DROPOUT = F.dropout
_IN_LOW = {
    F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm, torch.baddbmm,
    torch.addmm, torch.einsum, torch.addbmm, torch.chain_matmul, F.conv1d, F.conv3d, F.bilinear, Tensor.__rmatmul__,
    Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm, Tensor.addbmm,
}  # fmt: skip
_IN_FLOAT = {
    F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.softplus, F.log_softmax, torch.log_softmax,
    torch.pow, Tensor.pow, Tensor.__pow__, torch.exp, Tensor.exp, torch.log, Tensor.log, torch.rsqrt, Tensor.rsqrt,
    torch.reciprocal, Tensor.reciprocal, torch.cumsum, Tensor.cumsum, torch.logsumexp, Tensor.logsumexp,
}  # fmt: skip
"""What CUDA's autocast computes in float32 (torch 2.13, aten/src/ATen/autocast_mode.h), as far as models use it:
GELU of GPT-2 cubes its input, and what follows stays in float32."""


class Autocast(TorchFunctionMode):
    """CUDA's autocast, scaled dot product attention and dropout, which the meta device does not have.

    Dropout by the row (engine/row_dropout.py) is none of torch's functions, and runs on shapes as it is.
    """

    disabled: ClassVar[int] = 0
    """Regions of `torch.autocast(..., enabled=False)` that the code is in."""

    def __init__(self, dtype: torch.dtype | None, *, shares_masks: bool = False) -> None:
        """Set up the mode.

        Args:
            dtype: of matrix products; None casts nothing.
            shares_masks: attention gets one mask of numbers for all layers, and makes none from a boolean one.
        """
        super().__init__()
        self._dtype = dtype
        self._cast_once: dict[Tensor, Tensor] | None = {}
        self._masks: dict[Tensor, Tensor] | None = {} if shares_masks else None

    def forget(self) -> None:
        """The end of the autocast region: copies of weights made in it are let go, and no more are kept."""
        self._cast_once = None
        self._masks = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `function` as CUDA would."""
        kwargs = kwargs or {}
        if function is _ATTENTION:
            return self._attention(*args, **kwargs)
        if function is _DROPOUT:
            return _dropout(*args, **kwargs)
        if function is torch._grouped_mm and args[0].dtype != torch.bfloat16:  # noqa: SLF001 - what F.grouped_mm calls
            return _GroupedMM.apply(args[0], args[1])  # type: ignore[no-untyped-call]
        if Autocast.disabled:
            return function(*args, **kwargs)
        if self._dtype is not None and function in _IN_LOW:
            args = [self._cast(value) for value in args]
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        elif self._dtype is not None and function in _IN_FLOAT:
            args = [value.float() if _floating(value) else value for value in args]
        return function(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        if not _floating(value) or value.dtype == self._dtype or self._dtype is None:
            return value
        if self._cast_once is None or not (value.is_leaf and value.requires_grad and value.dtype == FLOAT):
            return value.to(self._dtype)
        if value not in self._cast_once:
            self._cast_once[value] = value.to(self._dtype)
        return self._cast_once[value]

    def _attention(self, query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> Any:
        query, key, value = self._cast(query), self._cast(key), self._cast(value)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = self._bias(attn_mask, query.dtype)  # the kernels add a bias
        return _Attention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]

    def _bias(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        if self._masks is None:
            return torch.empty_like(mask, dtype=dtype)
        if mask not in self._masks:
            self._masks[mask] = torch.empty_like(mask, dtype=dtype)
        return self._masks[mask]


def recomputing(dtype: torch.dtype | None, contexts: Callable[[], tuple[Any, Any]] | None = None) -> Callable[[], Any]:
    """For torch's `checkpoint(context_fn=...)`: a backward pass runs without the modes of the forward pass.

    Args:
        dtype: as `Autocast` takes it.
        contexts: what else is entered, in the forward pass and when it is computed again.
    """

    @contextlib.contextmanager
    def again(context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
        with Autocast(dtype), context:
            yield

    def both() -> tuple[Any, Any]:
        first, second = contexts() if contexts is not None else (contextlib.nullcontext(), contextlib.nullcontext())
        return first, again(second)

    return both


class _Region(contextlib.AbstractContextManager[None]):
    """A region of `torch.autocast` on the meta device, for which torch has none."""

    def __init__(self, *, enabled: bool) -> None:
        self._disabled = int(not enabled)

    def __enter__(self) -> None:
        Autocast.disabled += self._disabled

    def __exit__(self, *_: object) -> None:
        Autocast.disabled -= self._disabled


_AUTOCAST, _autocast_dtype = torch.autocast, torch.get_autocast_dtype


def _autocast(
    device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, cache_enabled: bool | None = None
) -> Any:
    if device_type == "meta":
        return _Region(enabled=enabled)
    return _AUTOCAST(device_type, dtype, enabled, cache_enabled)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA's fused dropout keeps one byte a number for the backward pass."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


class _Attention(Function):
    """Flash and memory-efficient attention: keep q, k, v, bias, output and a log-sum-exp per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        rows, heads, tokens, _ = query.shape  # values may be narrower than queries, as in DeepSeek's
        out = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, bias, out, query.new_empty(query.shape[:3], dtype=FLOAT))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        sums = query.new_empty(query.shape, dtype=FLOAT)  # the gradient of the queries is added up in float32
        of_query = torch.empty_like(query)
        of_key, of_value = (x.new_empty(x.shape[0], query.shape[1], *x.shape[2:]) for x in (key, value))
        if key.shape[1] != query.shape[1]:  # grouped queries: each head its own, then summed
            of_key, of_value = torch.empty_like(key), torch.empty_like(value)
        del sums
        return of_query, of_key, of_value, None


class _GroupedMM(Function):
    """Products of each expert's rows with its matrix; torch's shape function knows bfloat16 alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        return rows.new_empty(rows.shape[0], weights.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, weights = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(weights) if ctx.needs_input_grad[1] else None


class ChunkedLogProbs(Function):
    """TRL 1.16's trl/kernels/chunked_logprob.py with its buffers on CUDA: logits in tiles, gradients in float32."""

    TOKENS = 4096

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, _: float, chunk: int, *__: Any
    ) -> Any:
        """Log-probabilities, entropy, nothing, nothing, and whether the target is the likeliest, (token,) each."""
        ctx.dtype = _compute_dtype(hidden)
        rows = [hidden.new_empty(len(hidden), dtype=FLOAT) for _ in range(7)]
        tile = hidden.new_empty(min(len(hidden), ChunkedLogProbs.TOKENS), chunk, dtype=ctx.dtype)
        part = weight[:chunk].to(ctx.dtype)
        log_probs, entropy, log_z = (torch.empty_like(rows[0]) for _ in range(3))
        del tile, part
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, log_z)
        ctx.compute_dtype, ctx.chunk_size, ctx.kernel_args = ctx.dtype, chunk, {}
        return log_probs, entropy, None, None, torch.empty_like(log_probs, dtype=torch.bool)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Gradients of the hidden states, and of the weight if it is trained."""
        hidden, weight, *_ = ctx.saved_tensors
        of_hidden = hidden.new_empty(hidden.shape, dtype=FLOAT)
        of_weight = weight.new_empty(weight.shape, dtype=FLOAT) if ctx.needs_input_grad[1] else None
        tile = hidden.new_empty(min(len(hidden), ChunkedLogProbs.TOKENS), ctx.chunk_size, dtype=ctx.compute_dtype)
        part = weight[: ctx.chunk_size].to(ctx.compute_dtype)
        rounded = of_weight.to(weight.dtype) if of_weight is not None else None
        del tile, part
        return of_hidden.to(hidden.dtype), rounded, *([None] * 7)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.bfloat16 if torch.is_autocast_enabled() else hidden.dtype


class FusedAdamW(Optimizer):
    """torch's fused AdamW: two moments in the weight's dtype and a step counter; no buffers."""

    def __init__(self, groups: Iterable[dict[str, Any]], **_: Any) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is used here
        """Make the state of the parameters that have none."""
        for parameter, state in _stateless(self):
            state |= {"step": parameter.new_empty((), dtype=FLOAT)}
            state |= {name: torch.empty_like(parameter) for name in ("exp_avg", "exp_avg_sq")}


def blockwise_adamw(bits: int, *, paged: bool) -> type[Optimizer]:
    """AdamW of bitsandbytes 0.50 (optim/optimizer.py).

    Moments of at least 4,096 numbers in 8 bits with a float32 scale for each 256, smaller ones in float32. Paged
    moments of at least 100,000 numbers lie in unified memory, which torch does not count and the driver can move out.
    """

    class Blockwise(Optimizer):
        def __init__(self, groups: Iterable[dict[str, Any]], **_: Any) -> None:
            super().__init__(groups, {})

        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for parameter, state in _stateless(self):
                count = parameter.numel()
                small = bits == 32 or count < 4096
                for moment in ("state1", "state2"):
                    state[moment] = None
                    if not paged or count < 1e5:
                        state[moment] = torch.empty_like(parameter, dtype=FLOAT if small else torch.uint8)
                    if not small:
                        state[f"absmax_{moment}"] = parameter.new_empty(-(-count // 256), dtype=FLOAT)

    return Blockwise


def _stateless(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Parameters with a gradient and without a state yet."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and not optimizer.state[parameter]:
                yield parameter, optimizer.state[parameter]


def _as_it_is(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    """Numbers that nobody sees need not be drawn: on the meta device that takes a fifth of a prediction."""
    return tensor


@contextlib.contextmanager
def on_meta(*, autocast: bool) -> Iterator[None]:
    """Put the stand-ins in place of what they stand for; nothing else of the process may train meanwhile."""
    import bitsandbytes
    import trl.trainer.utils

    from ray_peft.methods.stochastic import Dice
    from ray_peft.vram import quantised_layers

    bits = bitsandbytes.optim
    places: list[tuple[Any, str, Any]] = [
        (trl.trainer.utils, "_ChunkedLogProbFunction", ChunkedLogProbs),
        (torch, "is_autocast_enabled", lambda *_: autocast),
        (torch, "autocast", _autocast),
        (torch, "get_autocast_dtype", lambda kind: torch.bfloat16 if kind == "meta" else _autocast_dtype(kind)),
        (torch.optim, "AdamW", FusedAdamW),
        (bits, "AdamW8bit", blockwise_adamw(8, paged=False)),
        (bits, "PagedAdamW8bit", blockwise_adamw(8, paged=True)),
        (bits, "PagedAdamW32bit", blockwise_adamw(32, paged=True)),
        (bitsandbytes.functional, "dequantize_4bit", quantised_layers.dequantize_4bit),
        (bitsandbytes.functional, "int8_vectorwise_dequant", quantised_layers.int8_vectorwise_dequant),
        (Dice, "generator", lambda *_: None),
        *((torch.nn.init, name, _as_it_is) for name in ("kaiming_uniform_", "uniform_", "normal_")),
    ]
    originals = [getattr(owner, name) for owner, name, _ in places]
    try:
        for owner, name, stand_in in places:
            setattr(owner, name, stand_in)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for (owner, name, _), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
