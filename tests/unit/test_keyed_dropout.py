"""Dropout by arithmetic: the right share, no order in it, and the same bits wherever a row lies."""

import itertools
import math

import pytest
import tiny
import torch

from ray_peft.engine.keyed_dropout import keyed_dropout, layer_number, placed, row_key

P = 0.1
ROWS, TOKENS, FEATURES = 48, 64, 192


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with tiny.one_thread():
        yield


def keys_of(seed=1, step=0, rows=range(ROWS), tokens=TOKENS):
    return placed(torch.tensor([row_key(seed, step, row) for row in rows])[:, None], torch.arange(tokens)[None])


def kept(p=P, keys=None, layer=1, features=FEATURES):
    keys = keys_of() if keys is None else keys
    return keyed_dropout(torch.ones(*keys.shape, features), p, keys, layer) != 0


def deviation(share, p, numbers):
    """How many standard deviations a share of kept numbers is from 1 - p."""
    return abs(float(share) - (1 - p)) / math.sqrt(p * (1 - p) / numbers)


def correlation(one, other, p=P):
    """Of two masks, in standard deviations from none."""
    one, other = one.double().flatten() - (1 - p), other.double().flatten() - (1 - p)
    return abs(float((one * other).mean())) / (p * (1 - p)) * math.sqrt(one.numel())


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(p):
    mask = kept(p)
    assert deviation(mask.double().mean(), p, mask.numel()) < 4
    for dims, numbers in (((0, 1), ROWS * TOKENS), ((1, 2), TOKENS * FEATURES), ((0, 2), ROWS * FEATURES)):
        shares = mask.double().mean(dims)  # of each feature, row and position
        assert max(deviation(share, p, numbers) for share in shares) < 5


def test_rows_positions_features_layers_steps_and_seeds_are_independent():
    mask = kept()
    assert correlation(mask[1:], mask[:-1]) < 4
    for apart in (1, 2, 7, 32):
        assert correlation(mask[:, apart:], mask[:, :-apart]) < 4
        assert correlation(mask[..., apart:], mask[..., :-apart]) < 4
    others = [kept(layer=layer) for layer in (0, 2, 3, 2**31, layer_number("a"), layer_number("a", 1))]
    others += [kept(keys=keys_of(step=1)), kept(keys=keys_of(seed=2)), kept(keys=keys_of().roll(1, 1))]
    for one, other in itertools.combinations([mask, *others], 2):
        assert correlation(one, other) < 4.5


def test_no_token_has_the_mask_of_another():
    masks = torch.cat([kept(0.5, layer=layer, features=64).flatten(0, 1) for layer in range(8)])
    assert len(masks.unique(dim=0)) == len(masks)


def test_how_many_features_of_a_token_are_dropped_is_binomial():
    counts = (~kept(features=1000)).sum(-1).double()
    assert float(counts.mean()) == pytest.approx(100, abs=1)
    assert float(counts.var()) == pytest.approx(90, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_kept_is_scaled_in_float32(dtype):
    x = torch.randn(2, 3, 50).to(dtype)
    out = keyed_dropout(x, 0.3, keys_of(rows=range(2), tokens=3), 1)
    scale = torch.tensor(1 / 0.7, dtype=torch.float32)
    wanted = (x * scale) if dtype is torch.float64 else (x.float() * scale).to(dtype)
    assert out.dtype == dtype
    assert torch.equal(out, torch.where(out == 0, torch.zeros_like(wanted), wanted))
    assert 0 < int((out == 0).sum()) < out.numel()


def test_a_known_mask():
    """Worked out once with Python's integers, which other machines and kernels must give, too."""

    def mixed(x):
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = ((x ^ (x >> shift)) * factor) % 2**32
        return x ^ (x >> 15)

    def splitmix(x):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = ((x ^ (x >> shift)) * factor) % 2**64
        return x ^ (x >> 31)

    layer, p = layer_number("model.layers.0.self_attn.q_proj"), 0.25
    mask = kept(p, keys_of(5, 7, [3], 4), layer, 40)[0].tolist()
    for position in range(4):
        key = splitmix((row_key(5, 7, 3) + (position + 1) * 0x9E3779B97F4A7C15) % 2**64)
        upper = mixed((key & 0xFFFFFFFF) ^ layer)
        lower = mixed((key >> 32) ^ upper)
        wanted = [mixed((mixed(feature ^ upper) + lower) % 2**32) >= p * 2**32 for feature in range(40)]
        assert mask[position] == wanted


def test_a_tokens_mask_is_that_of_its_row_wherever_it_lies():
    whole = kept()
    order = torch.randperm(ROWS)
    assert torch.equal(kept(keys=keys_of(rows=order.tolist())), whole[order])
    assert torch.equal(kept(keys=keys_of(rows=[5], tokens=20))[0], whole[5, :20])
    lane = torch.cat([keys_of(rows=[row], tokens=tokens) for row, tokens in ((3, 10), (9, 30))], 1)
    assert torch.equal(kept(keys=lane)[0], torch.cat([whole[3, :10], whole[9, :30]]))
    flat = keyed_dropout(torch.ones(ROWS * TOKENS, FEATURES), P, keys_of().flatten(), 1) != 0
    assert torch.equal(flat.view(whole.shape), whole)


def test_probabilities_of_each_lane_are_those_of_lanes_alone():
    x, keys = torch.randn(3, TOKENS, FEATURES).bfloat16(), keys_of(rows=range(3))
    shares = (0.05, 0.0, 0.4)
    together = keyed_dropout(x, torch.tensor(shares)[:, None], keys, 4)
    for lane, share in enumerate(shares):
        assert torch.equal(together[lane], keyed_dropout(x[lane], share, keys[lane], 4))


def test_groups_of_keys_may_number_their_columns():
    keys, x = keys_of(rows=range(2), tokens=6), torch.ones(2, 6, 5)
    columns = torch.tensor([[0, 1, 2, 0, 1], [4, 3, 2, 1, 0]])
    straight, numbered = keyed_dropout(x, 0.5, keys, 1), keyed_dropout(x, 0.5, keys, 1, columns)
    for lane in range(2):
        assert torch.equal(numbered[lane], straight[lane][:, columns[lane]])


def test_the_gradient_is_dropped_alike():
    x = torch.randn(2, 3, 40, requires_grad=True)
    out = keyed_dropout(x, 0.5, keys_of(rows=range(2), tokens=3), 1)
    saved = out.grad_fn.saved_tensors
    assert [tensor.numel() for tensor in saved if tensor is not None] == [6]  # the keys alone
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(gradient, torch.where(out == 0, 0.0, 2.0))


def test_a_result_of_another_dtype_is_rounded_once():
    x, keys = torch.randn(2, 3, 40).requires_grad_(), keys_of(rows=range(2), tokens=3)
    out = keyed_dropout(x, 0.3, keys, 1, dtype=torch.bfloat16)
    assert torch.equal(out, keyed_dropout(x, 0.3, keys, 1).bfloat16())
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert gradient.dtype == torch.float32


def test_no_dropout_is_no_work():
    x = torch.randn(2, 3, 4)
    assert keyed_dropout(x, 0.0, keys_of(rows=range(2), tokens=3), 1) is x


def test_keys_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"keys of shape \(2, 3\) do not begin the shape \(3, 2, 4\)"):
        keyed_dropout(torch.ones(3, 2, 4), 0.5, keys_of(rows=range(2), tokens=3), 1)
