"""What tests on a GPU share."""

from __future__ import annotations

import pytest


@pytest.fixture
def exact():
    """Matrix products and convolutions in whole float32."""
    import torch

    kinds = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    yield
    for kind, precision in zip(kinds, before, strict=True):
        kind.fp32_precision = precision
