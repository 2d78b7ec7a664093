"""Rounding explains small differences of a loss, and no large ones."""

import math

import pytest

from ray_peft.errors import TrialFailed
from ray_peft.trial.rounding import allowed, check_same_loss


@pytest.mark.parametrize(
    ("before", "after", "dtypes"),
    [
        (1.8373, 1.8382, {"float32", "bfloat16"}),  # SmolLM2-135M, merged in bfloat16
        (5.24, 5.240001, {"float32"}),
        (0.0123, 0.0124, {"float32"}),
        (20.0, 20.15, {"bfloat16"}),
    ],
)
def test_rounding_is_let_pass(before, after, dtypes):
    check_same_loss(before, after, dtypes, "merging")
    check_same_loss(after, before, dtypes, "merging")


@pytest.mark.parametrize(
    ("before", "after", "dtypes"),
    [
        (5.24, 38.44, {"float32", "bfloat16"}),
        (38.44, 5.24, {"bfloat16"}),
        (5.24, 5.25, {"float32"}),
        (1.8, 1.83, {"bfloat16"}),
        (2.0, math.nan, {"bfloat16"}),
        (math.nan, math.nan, {"bfloat16"}),
        (math.inf, math.inf, {"float32"}),
    ],
)
def test_other_weights_are_refused(before, after, dtypes):
    with pytest.raises(TrialFailed, match="^merging changed the held-out loss from "):
        check_same_loss(before, after, dtypes, "merging")


def test_the_coarsest_dtype_decides():
    assert allowed(0.5, ["float32"]) == pytest.approx(1e-4)
    assert allowed(3.0, ["float32", "bfloat16", "float16"]) == pytest.approx(0.03)
