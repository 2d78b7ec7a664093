"""Style and content against answers that are known: an image and itself, a copy, a mirror, other pictures."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_pipeline_eval as tiny
import torch
from PIL import Image

from ray_peft.metrics.scores import Scores
from ray_peft.tasks.text_to_image.style import compare, study, vectors, with_style


@pytest.fixture(scope="module")
def vae():
    return tiny.vae()


def pictures(*seeds):
    return [(f"vg_{seed}.jpg", tiny.picture(seed)) for seed in seeds]


def test_an_image_is_like_itself_in_style_and_content(vae):
    style, content = vectors(vae, tiny.picture(1))
    assert float(style @ style) == pytest.approx(1.0, abs=1e-5)
    assert float(content @ content) == pytest.approx(1.0, abs=1e-5)
    assert style.shape == (8 * 9 // 2 + 8 * 9 // 2 + 2 * 16 * 17 // 2,)  # conv_in and three down blocks
    assert content.shape == (3 * 4 * 4,)
    assert style.dtype == content.dtype == torch.float32
    assert not vae.encoder.conv_in._forward_hooks


def test_the_style_cosine_is_the_mean_over_layers_of_that_of_whole_centred_gram_matrices(vae):
    pair, kept = (tiny.picture(1), tiny.picture(2)), []
    hooks = [
        layer.register_forward_hook(lambda layer, given, found: kept.append(found[0].flatten(1)))
        for layer in (vae.encoder.conv_in, *vae.encoder.down_blocks)
    ]
    first, second = (vectors(vae, image)[0] for image in pair)
    for hook in hooks:
        hook.remove()
    grams = [np.cov(flat.numpy()) for flat in kept]
    cosines = [
        float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(grams[:4], grams[4:], strict=True)
    ]
    assert float(first @ second) == pytest.approx(np.mean(cosines), abs=1e-5)


def test_style_does_not_know_where_things_are_and_content_does(vae):
    image = tiny.picture(1, 128)
    moved = Image.fromarray(np.roll(np.asarray(image), (16, 16), axis=(0, 1)))
    (style, content), (other_style, other_content) = vectors(vae, image), vectors(vae, moved)
    assert float(style @ other_style) > 0.95
    assert float(content @ other_content) < 0.9
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    for unlike in (tiny.picture(2, 128), noise):
        assert float(style @ vectors(vae, unlike)[0]) < float(style @ other_style) - 0.03


def test_a_copy_shows_with_its_name(vae):
    train, held_out = study(vae, pictures(1, 2, 3)), study(vae, pictures(4, 5))
    copy, other = compare(vae, [tiny.picture(2), tiny.picture(6)], train, held_out)
    assert (copy.nearest, copy.nearest_likeness) == ("vg_2.jpg", pytest.approx(1.0, abs=1e-5))
    assert other.nearest_likeness < 0.99
    scores = with_style(Scores(eval_loss=1.0), [copy, other])
    assert scores.nearest_train == pytest.approx((1.0 + other.nearest_likeness) / 2)
    assert (scores.generated_rows, scores.eval_loss) == (2, 1.0)
    assert with_style(Scores(), []) == Scores()


def test_scores_are_means_of_the_cosines_with_each_painting(vae):
    train, held_out = study(vae, pictures(1)), study(vae, pictures(4, 5))
    (found,) = compare(vae, [tiny.picture(6)], train, held_out)
    style = vectors(vae, tiny.picture(6))[0]
    cosines = [float(style @ vectors(vae, tiny.picture(seed))[0]) for seed in (1, 4, 5)]
    assert found.style_train == pytest.approx(cosines[0], abs=1e-5)
    assert found.style_heldout == pytest.approx(np.mean(cosines[1:]), abs=1e-5)


def test_what_cannot_be_compared_is_refused(vae):
    train = study(vae, pictures(1))
    with pytest.raises(ValueError, match=r"\(64, 64\) is another size"):
        compare(vae, [tiny.picture(1, 64)], train, train)
    with pytest.raises(ValueError, match="no painting"):
        study(vae, [])


def test_a_vae_in_bfloat16_gives_nearly_the_same(vae):
    low = tiny.vae().to(torch.bfloat16)
    for exact, rounded in zip(vectors(vae, tiny.picture(1)), vectors(low, tiny.picture(1)), strict=True):
        assert float(exact @ rounded) > 0.99
