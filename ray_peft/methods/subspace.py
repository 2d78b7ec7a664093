"""The subspaces that GaLore projects gradients to: leading singular vectors, exact or by orthogonal iteration.

The iteration uses the Gram matrix of the smaller side, for all matrices of one size at once. Each round multiplies by
it and makes the columns orthonormal; a final Rayleigh-Ritz step turns the columns into singular vectors (Halko,
Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4). It starts from the previous basis if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

ProjType = Literal["std", "reverse_std", "left", "right", "full"]

ROUNDS = 8
"""Products with the Gram matrix; each counts as two with the gradient."""
_SPARE = 4
"""One spare column is iterated for every four of the rank: the last columns of a block converge slowly."""
_RIDGE = 1e-7
"""Share of the mean eigenvalue that is added to the diagonal, so that a gradient of low rank has a full basis."""
AT_A_TIME = 2**24
"""How many numbers of Gram matrices are iterated at a time; in float64, 128 MiB."""


def side_of(shape: torch.Size, proj_type: ProjType) -> str:
    """`left` if a gradient (m, n) is multiplied by (rank, m) from the left, `right` if by (n, rank), else `full`."""
    if proj_type in ("left", "right", "full"):
        return proj_type
    tall = shape[0] >= shape[1]
    return "right" if tall == (proj_type == "std") else "left"


def projected(grad: Tensor, bases: Sequence[Tensor], side: str) -> Tensor:
    """Project gradients (..., m, n) to their subspaces; `bases` are that of `side`, or for `full` left and right."""
    if side == "full":
        return bases[0].mT @ grad @ bases[1].mT
    return grad @ bases[0].mT if side == "right" else bases[0].mT @ grad


def projected_back(low: Tensor, bases: Sequence[Tensor], side: str) -> Tensor:
    """Project `low`, a result of `projected`, back to (..., m, n)."""
    if side == "full":
        return bases[0] @ low @ bases[1]
    return low @ bases[0] if side == "right" else bases[0] @ low


def projected_shape(shape: torch.Size, rank: int, side: str) -> tuple[int, int]:
    """The shape of `projected` gradients of a shape; `rank` is at most its smaller side."""
    return rank if side != "right" else shape[0], rank if side != "left" else shape[1]


def exact(grad: Tensor, rank: int, side: str) -> list[Tensor]:
    """The leading singular vectors of a gradient (m, n), in its dtype: left ones (m, rank), right ones (rank, n)."""
    left, _, right = torch.linalg.svd(grad.float(), full_matrices=False)
    # Copies: a view would keep the whole decomposition in memory.
    vectors = {"left": left[:, :rank].to(grad.dtype, copy=True), "right": right[:rank].to(grad.dtype, copy=True)}
    return list(vectors.values()) if side == "full" else [vectors[side]]


def can_iterate(shape: torch.Size, side: str) -> bool:
    """Whether the basis is on the smaller side of a gradient; the larger side's Gram matrix would cost too much."""
    return side == ("right" if shape[0] >= shape[1] else "left")


def iterated(
    weights: Sequence[Tensor],
    gradient: Callable[[Tensor], Tensor],
    start: Callable[[Tensor, int], Tensor],
    rank: int,
    at_a_time: int = AT_A_TIME,
) -> dict[int, Tensor]:
    """Bases of gradients on their smaller sides, in the dtypes of the weights, by place in `weights`.

    Waits for the GPU.

    Args:
        weights: (m, n) each.
        gradient: returns the gradient of a weight.
        start: returns float64 columns (smaller side, count) to start from, given a weight and the count.
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
    """Write a gradient's Gram matrix into `gram` (smaller side, smaller side), scaled to a mean eigenvalue of 1."""
    matrix = grad.float()
    # The trial's guard reports a gradient that is not finite, more clearly than a failed decomposition would.
    gram.copy_((matrix.mT @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.mT).nan_to_num_())
    gram *= len(gram) / gram.trace().clamp_min(torch.finfo(torch.float32).tiny)
    gram.diagonal().add_(_RIDGE)


def _leading(grams: Tensor, starts: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors (matrix, size, rank) of `grams` (matrix, size, size), with the signs of `starts`."""
    columns = _orthonormal(starts)
    for _ in range(ROUNDS):
        columns = _orthonormal(grams @ columns)
    within = columns.mT @ (grams @ columns)
    rotation = torch.linalg.eigh((within + within.mT) / 2).eigenvectors.flip(-1)[..., :rank]
    vectors = columns @ rotation
    # The sign of an eigenvector is arbitrary; `starts` decides it, the same on all workers and after a resume.
    agreement = (vectors * starts[..., :rank]).sum(-2, keepdim=True)
    signed: Tensor = vectors * torch.where(agreement < 0, -1.0, 1.0)
    return signed


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns (matrix, size, count) of the same span and order, by two passes of Cholesky QR.

    Source: Yamamoto et al. 2015, doi:10.1553/etna_vol44s306; the shift that keeps it from failing, arXiv:1809.11085.
    """
    for _ in range(2):
        columns = columns / columns.norm(dim=-2, keepdim=True).clamp_min(1e-150)
        products = columns.mT @ columns
        products.diagonal(dim1=-2, dim2=-1).add_(1e-12)
        lower = torch.linalg.cholesky_ex(products).L
        columns = torch.linalg.solve_triangular(lower, columns.mT, upper=False).mT
    return columns
