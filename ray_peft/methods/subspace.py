"""The subspaces that GaLore projects gradients to: their leading singular vectors, exact, or by orthogonal iteration.

The iteration works on the Gram matrix of the smaller side, for all matrices of one size at once: each round multiplies
with it and makes the columns orthonormal, and a Rayleigh-Ritz step at the end turns them into singular vectors (Halko,
Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4). It starts from the basis before, where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

ProjType = Literal["std", "reverse_std", "left", "right", "full"]
SVD = Literal["randomized", "exact"]

ROUNDS = 8
"""Products with the Gram matrix: each squares what one with the gradient would do."""
_SPARE = 4
"""A quarter more columns than the rank are iterated: the last ones of a block converge late."""
_RIDGE = 1e-7
"""Of the mean eigenvalue, added to the diagonal: a gradient of lower rank than its basis has one all the same."""
AT_A_TIME = 2**24
"""Numbers of the Gram matrices that are iterated at a time, in float64: 128 MiB."""


def side_of(shape: torch.Size, proj_type: ProjType) -> str:
    """`left` if a gradient (m, n) is multiplied from the left with (rank, m), `right` with (n, rank), or `full`."""
    if proj_type in ("left", "right", "full"):
        return proj_type
    tall = shape[0] >= shape[1]
    return "right" if tall == (proj_type == "std") else "left"


def projected(grad: Tensor, bases: Sequence[Tensor], side: str) -> Tensor:
    """Gradients (..., m, n) in their subspaces; `bases` are one for the side, or left and right."""
    if side == "full":
        return bases[0].mT @ grad @ bases[1].mT
    return grad @ bases[0].mT if side == "right" else bases[0].mT @ grad


def projected_back(low: Tensor, bases: Sequence[Tensor], side: str) -> Tensor:
    """(..., m, n) of what `projected` made."""
    if side == "full":
        return bases[0] @ low @ bases[1]
    return low @ bases[0] if side == "right" else bases[0] @ low


def exact(grad: Tensor, rank: int, side: str) -> list[Tensor]:
    """The leading singular vectors of a gradient (m, n), in its dtype: left ones (m, rank), right ones (rank, n)."""
    left, _, right = torch.linalg.svd(grad.float(), full_matrices=False)
    # Copies: a view would hold on to the whole decomposition.
    vectors = {"left": left[:, :rank].to(grad.dtype, copy=True), "right": right[:rank].to(grad.dtype, copy=True)}
    return list(vectors.values()) if side == "full" else [vectors[side]]


def can_iterate(shape: torch.Size, side: str) -> bool:
    """Whether the basis lies on the smaller side of a gradient: on the larger one its Gram matrix would not pay."""
    return side == ("right" if shape[0] >= shape[1] else "left")


def iterated(
    weights: Sequence[Tensor],
    gradient: Callable[[Tensor], Tensor],
    start: Callable[[Tensor, int], Tensor],
    rank: int,
    at_a_time: int = AT_A_TIME,
) -> dict[int, Tensor]:
    """Bases of the gradients of some weights, on their smaller sides, in the weights' dtypes, by place in `weights`.

    Waits for the GPU.

    Args:
        weights: (m, n) each.
        gradient: gives a weight's.
        start: columns (smaller side, count) to start from, given a weight and their count; float64.
        rank: of the bases, at most the smaller side.
        at_a_time: numbers of the Gram matrices that are iterated at a time.
    """
    bases: dict[int, Tensor] = {}
    by_size: dict[Any, list[int]] = {}
    for place, weight in enumerate(weights):
        by_size.setdefault((min(weight.shape), weight.device), []).append(place)
    for (size, _), places in by_size.items():
        count = max(1, at_a_time // size**2)
        for begin in range(0, len(places), count):
            part = places[begin : begin + count]
            columns = min(size, rank + -(-rank // _SPARE))
            first = weights[part[0]]
            grams = torch.empty(len(part), size, size, dtype=torch.float64, device=first.device)
            for gram, place in zip(grams, part, strict=True):
                _fill_gram(gram, gradient(weights[place]))
            starts = torch.stack([start(weights[place], columns) for place in part])
            vectors = _leading(grams, starts, min(rank, size))
            for place, basis in zip(part, vectors, strict=True):
                weight = weights[place]
                tall = weight.shape[0] >= weight.shape[1]
                bases[place] = (basis.mT if tall else basis).contiguous().to(weight.dtype)
    return bases


def _fill_gram(gram: Tensor, grad: Tensor) -> None:
    """Make `gram` (smaller side, smaller side) the gradient's, with a mean eigenvalue of 1; products are in float32."""
    matrix = grad.float()
    # A trial whose gradient is not finite ends by its guard, which says more than a failed decomposition.
    gram.copy_((matrix.mT @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.mT).nan_to_num_())
    gram *= len(gram) / gram.trace().clamp_min(torch.finfo(torch.float32).tiny)
    gram.diagonal().add_(_RIDGE)


def _leading(grams: Tensor, starts: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors (matrix, size, rank) of `grams` (matrix, size, size), with the signs of `starts`."""
    columns = _orthonormal(starts)
    for _ in range(ROUNDS):
        columns = _orthonormal(grams @ columns)
    within = columns.mT @ (grams @ columns)
    turned = torch.linalg.eigh((within + within.mT) / 2).eigenvectors.flip(-1)[..., :rank]
    vectors = columns @ turned
    # An eigenvector's sign is arbitrary: that of the start is the same on every worker, and after a resume.
    agree = (vectors * starts[..., :rank]).sum(-2, keepdim=True)
    signed: Tensor = vectors * torch.where(agree < 0, -1.0, 1.0)
    return signed


def _orthonormal(columns: Tensor) -> Tensor:
    """The same span (matrix, size, count) with orthonormal columns, in their order: Cholesky QR, twice.

    Source: Yamamoto et al. 2015, doi:10.1553/etna_vol44s306; the shift against a failure, arXiv:1809.11085.
    """
    for _ in range(2):
        columns = columns / columns.norm(dim=-2, keepdim=True).clamp_min(1e-150)
        products = columns.mT @ columns
        products.diagonal(dim1=-2, dim2=-1).add_(1e-12)
        lower = torch.linalg.cholesky_ex(products).L
        columns = torch.linalg.solve_triangular(lower, columns.mT, upper=False).mT
    return columns
