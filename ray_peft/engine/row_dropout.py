"""Dropout that belongs to a row and not to a pass: a model's own, its adapters', and that of its attention.

While a stage trains, torch's two functions that drop (`dropout` and `scaled_dot_product_attention`) compute their
masks from the keys of the pass's rows (keyed_dropout.py). Which layer calls them is known from hooks on the model's
modules, so that a layer that is computed again in the backward pass drops the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CODE = tuple(Path(__file__).with_name(f"{name}.py") for name in ("row_dropout", "keyed_dropout", "dropped_attention"))
"""The files of row dropout that predictions of memory run."""
WRAPPER = "base_model.model."
"""What PEFT puts before the names of a model's modules."""


class UnkeyedDropout(RuntimeError):
    """A layer drops numbers whose rows are not known."""


@dataclass
class _Frame:
    """A module whose forward runs."""

    module: str
    calls: int = 0
    """How often it has called a function that drops."""
    multiplies: bool = False
    """What it drops is only the input of a matrix product, to whose dtype autocast would convert it."""


def may_drop(model: nn.Module) -> bool:
    """Whether a model, or its config, sets a dropout above zero."""
    import torch

    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()):
        return True
    if any(_adapter_may_drop(config) for config in getattr(model, "peft_config", {}).values()):
        return True
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    settings = dict(config.to_dict() if hasattr(config, "to_dict") else config or {})
    return any(
        ("drop" in name) and isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
        for name, value in settings.items()
    )


def _adapter_may_drop(config: Any) -> bool:
    """Whether a config of PEFT's asks for dropout of any kind, or is one that draws in every pass."""
    if str(getattr(config.peft_type, "value", config.peft_type)) == "PVERA":
        return True
    rates = [value for name, value in vars(config).items() if "dropout" in name]
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


class RowDropout:
    """Takes the place of torch's dropout in one model while it trains."""

    def __init__(self, model: nn.Module, *, predicts: bool = False) -> None:
        """Nothing is installed yet.

        Args:
            model: what will train.
            predicts: for a run on shapes only, leave dropout that cannot belong to rows to torch; else it is an error.
        """
        self._model, self._predicts = model, predicts
        self._keys: Tensor | None = None
        self._positions: Tensor | None = None
        self._frames: list[_Frame] = []
        self.calls = 0
        """How often something was dropped."""
        self._stock: Callable[..., Tensor]
        self._stock_attention: Callable[..., Tensor]

    def begin(self, keys: Tensor, positions: Tensor | None = None) -> None:
        """Begin a pass; both are read until its backward pass has ended.

        Args:
            keys: int64, of its tokens (lane, token), or of its rows (row,).
            positions: int64 (lane, token), of the tokens in their rows: attention drops pairs of tokens.
        """
        self._keys, self._positions = keys, positions
        self._frames.clear()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the model in training mode drops by the keys given to `begin`."""
        import torch.nn.functional as F  # noqa: N812 - torch's own name for it
        from torch import nn

        hooks = []
        for name, module in self._model.named_modules():
            if isinstance(module, (nn.Dropout, nn.ModuleList, nn.ModuleDict)):
                continue  # the module that contains a dropout calls it
            enter = _entering(self._frames, name.removeprefix(WRAPPER), multiplies=_multiplies(module))
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(self._leave)]
        self._stock, self._stock_attention = F.dropout, F.scaled_dot_product_attention
        functions: Any = F
        functions.dropout, functions.scaled_dot_product_attention = self._dropout, self._attention
        try:
            yield
        finally:
            functions.dropout, functions.scaled_dot_product_attention = self._stock, self._stock_attention
            for hook in hooks:
                hook.remove()
            self._frames.clear()
            self._keys = self._positions = None

    def contexts(self) -> tuple[Any, Any]:
        """For torch's `checkpoint(context_fn=...)`: what is computed again drops as it did."""
        if not self._frames:
            return contextlib.nullcontext(), contextlib.nullcontext()
        frame = self._frames[-1]
        return contextlib.nullcontext(), self._again(replace(frame))

    @contextlib.contextmanager
    def _again(self, frame: _Frame) -> Iterator[None]:
        depth = len(self._frames)
        self._frames.append(frame)
        try:
            yield
        finally:
            del self._frames[depth:]  # torch ends a recomputation early, by an exception inside of modules

    def _leave(self, *_: Any) -> None:
        del self._frames[-1:]

    def _layer(self) -> int:
        from ray_peft.engine.keyed_dropout import layer_number

        frame = self._frames[-1]
        frame.calls += 1
        return layer_number(frame.module, frame.calls - 1)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
        from ray_peft.engine.keyed_dropout import keyed_dropout

        if not self._frames or self._keys is None or not training:
            return self._stock(input, p, training, inplace)
        layer = self._layer()
        if p == 0:
            return input
        self.calls += 1
        keyed = self._of(tuple(input.shape))
        if keyed is None:
            return self._stock(input, p, training, inplace)
        return keyed_dropout(input, p, keyed[0], layer, keyed[1], dtype=self._dtype(input))

    def _dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the result: that of the product that it goes into, so that nothing larger is written."""
        import torch

        kind = x.device.type
        if self._frames[-1].multiplies and x.dtype == torch.float32 and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return x.dtype

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        from ray_peft.engine.dropped_attention import dropped_attention

        keyed = None
        if dropout_p > 0 and self._frames and self._keys is not None:
            keyed = self._of((*query.shape[:-1], key.shape[-2]))
        if keyed is None:
            return self._stock_attention(
                query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
        self.calls += 1
        return dropped_attention(
            query, key, value, attn_mask, p=dropout_p, is_causal=is_causal, scale=scale, keys=keyed[0],
            columns=keyed[1], layer=self._layer(),
        )  # fmt: skip

    def _of(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None] | None:
        """Keys, and numbers of columns, for a tensor of this shape; a prediction gets None where there are none.

        Raises:
            UnkeyedDropout: the shape begins neither with rows nor with tokens.
        """
        import torch

        from ray_peft.engine.keyed_dropout import placed

        keys = self._keys
        assert keys is not None
        if keys.dim() == 1 and shape[0] == len(keys):
            return keys, None
        if keys.dim() == 2:
            lanes, tokens = keys.shape
            if len(shape) == 4 and shape[0] == lanes and shape[2:] == (tokens, tokens):
                heads = torch.arange(shape[1], device=keys.device)
                return placed(keys[:, None, :], heads[None, :, None]), self._positions
            if shape[:2] == (lanes, tokens):
                return keys, None
            if shape[0] == lanes * tokens:
                return keys.reshape(-1), None
        if self._predicts:
            return None
        raise UnkeyedDropout(f"a layer drops numbers of shape {shape}, of which no row is known")


def _entering(frames: list[_Frame], name: str, *, multiplies: bool) -> Callable[..., None]:
    def enter(*_: Any) -> None:
        frames.append(_Frame(name, multiplies=multiplies))

    return enter


def _multiplies(module: nn.Module) -> bool:
    """Whether all that a module drops is the input of a plain LoRA adapter."""
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer) and not module.lora_variant


def row_dropout(
    model: nn.Module, device: str, loss: Callable[[RowDropout], Tensor]
) -> tuple[RowDropout | None, str | None]:
    """The dropout of a model's rows. Two forward passes with different random numbers show whether it works.

    Args:
        model: with a stage attached; in training mode afterwards.
        device: of the model.
        loss: a forward pass that begins with `RowDropout.begin`.

    Returns:
        None where nothing is dropped, or where dropout cannot belong to rows, and then why.
    """
    import torch

    if not may_drop(model):
        return None, None
    config: Any = getattr(model, "config", None)
    if getattr(config, "layerdrop", 0):
        return None, f"it leaves out whole layers at random (layerdrop {config.layerdrop:g})"
    dropout, losses = RowDropout(model), []
    model.train()
    with dropout.installed(), torch.no_grad(), torch.random.fork_rng([device] if device.startswith("cuda") else []):
        for seed in (1, 2):
            torch.manual_seed(seed)
            try:
                losses.append(float(loss(dropout)))
            except UnkeyedDropout as error:
                return None, str(error)
    if abs(losses[0] - losses[1]) > 1e-5 * abs(losses[0]):
        return None, "something in it draws by the pass, such as a fused attention"
    return (dropout if dropout.calls else None), None
