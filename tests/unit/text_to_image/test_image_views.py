"""What is seen of an image: its colours, its views, and what people are shown of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_diffusion
import torch
from PIL import Image, ImageCms
from tiny_folders import add, encoded, names, side_by_side, spec

from ray_peft.spec.text_to_image import ImageTrialSpec
from ray_peft.tasks.text_to_image import describe
from ray_peft.tasks.text_to_image.data import pixels, prepare
from ray_peft.tasks.text_to_image.decoding import decoded
from ray_peft.tasks.text_to_image.repeats import look, repeated


class TestDecoding:
    def test_exif_rotation_is_applied(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # turn a quarter clockwise: the left side comes to the top
        image = decoded(encoded(side_by_side(), "JPEG", exif=exif, quality=95)).image
        assert image.size == (64, 80)
        top, bottom = image.getpixel((32, 10)), image.getpixel((32, 70))
        assert top[0] > 150 > bottom[0]
        assert bottom[2] > 150 > top[2]

    def test_transparent_pixels_are_white(self) -> None:
        image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
        image.putpixel((0, 0), (255, 0, 0, 255))
        image.putpixel((1, 0), (0, 0, 0, 128))
        found = decoded(encoded(image)).image
        assert [found.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (127, 127, 127), (255, 255, 255)]

    def test_a_transparent_colour_of_a_palette_is_white(self) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putpixel((1, 0), 1)
        content = encoded(image, transparency=0)
        assert [decoded(content).image.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (200, 100, 50)]

    def test_16_bits_keep_their_shades(self) -> None:
        grey = np.array([[0, 257 * 64, 257 * 128, 65535]], np.uint16)
        found = decoded(encoded(Image.fromarray(grey))).image
        assert [found.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 64, 128, 255)]

    def test_greyscale_palette_and_cmyk(self) -> None:
        assert decoded(encoded(Image.new("L", (4, 4), 90))).image.getpixel((1, 1)) == (90, 90, 90)
        assert decoded(encoded(Image.new("1", (4, 4), 1))).image.getpixel((1, 1)) == (255, 255, 255)
        ink = decoded(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)).image.getpixel((8, 8))
        assert ink[0] < 10
        assert min(ink[1:]) > 240

    @pytest.mark.parametrize(
        ("mode", "kind", "off"),
        [
            ("RGB", "PNG", 0), ("RGBA", "PNG", 0), ("RGBA", "WEBP", 6), ("RGB", "JPEG", 6), ("YCbCr", "JPEG", 6),
            ("CMYK", "JPEG", 6), ("CMYK", "TIFF", 1), ("LAB", "TIFF", 4), ("P", "PNG", 9), ("P", "GIF", 9),
            ("RGB", "AVIF", 9), ("RGB", "BMP", 0), ("RGB", "TIFF", 0),
        ],
    )  # fmt: skip
    def test_a_painting_looks_the_same_in_every_colour_model(self, mode: str, kind: str, off: float) -> None:
        painting = tiny_diffusion.painting(2, 100, 80)
        options = {"quality": 98} if kind in ("JPEG", "WEBP", "AVIF") else {}
        found = decoded(encoded(in_mode(painting, mode), kind, **options))
        assert (found.image.mode, found.image.size, found.traits) == ("RGB", (100, 80), ())
        difference = np.abs(np.asarray(found.image, float) - np.asarray(painting, float))
        assert difference.mean() <= off
        assert np.quantile(difference, 0.99) <= 4 * off

    @pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1"])
    def test_a_drawing_without_colours_keeps_its_shades(self, mode: str) -> None:
        grey = tiny_diffusion.painting(2, 100, 80).convert("L")
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
        assert image.mode == mode
        found = decoded(encoded(image)).image
        assert np.array_equal(
            np.asarray(found), np.asarray((grey.convert("1") if mode == "1" else grey).convert("RGB"))
        )

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_16_bits_of_either_byte_order_with_a_transparent_grey(self, kind: str) -> None:
        grey = np.array([[0, 257 * 7, 257 * 200, 65535]], np.uint16)
        image = Image.fromarray(grey)
        options = {"transparency": 257 * 7} if kind == "PNG" else {}
        found = decoded(encoded(image, kind, **options))
        second = 255 if kind == "PNG" else 7
        assert [found.image.getpixel((x, 0))[0] for x in range(4)] == [0, second, 200, 255]
        assert found.traits == (("transparent",) if kind == "PNG" else ())

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
    def test_every_orientation(self, orientation: int, kind: str) -> None:
        upright = tiny_diffusion.painting(3, 100, 80)
        undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of Image.Transpose, the way back
        stored = upright.transpose(Image.Transpose(undone[orientation])) if orientation > 1 else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"quality": 98} if kind in ("JPEG", "WEBP") else {}
        found = decoded(encoded(stored, kind, exif=exif, **options)).image
        assert found.size == (100, 80)
        assert np.abs(np.asarray(found, float) - np.asarray(upright, float)).mean() < 8

    @pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
    def test_the_first_of_several_frames(self, kind: str) -> None:
        frames = [tiny_diffusion.painting(index, 80, 64) for index in (2, 3)]
        found = decoded(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert found.traits == ("several frames",)
        means = np.asarray(found.image, float).mean(axis=(0, 1))
        assert np.abs(means - np.asarray(frames[0], float).mean(axis=(0, 1))).max() < 12


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The same picture in another colour model."""
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    return image.quantize(200) if mode == "P" else image.convert(mode)


class TestViews:
    def test_the_centre_of_a_wide_image(self, tmp_path: Path) -> None:
        image = Image.new("RGB", (192, 64), (255, 0, 0))
        image.paste((0, 0, 255), (64, 0, 128, 64))
        image.save(tmp_path / "a.png")
        for index in range(3):
            tiny_diffusion.painting(index, 64, 64).save(tmp_path / f"{index}.png")
        for path in list(tmp_path.glob("*.png")):
            path.with_suffix(".txt").write_text("a caption")
        data = spec(tmp_path, test=1)
        pictures = prepare(data)
        picture = next(each for each in (*pictures.train, *pictures.test) if each.name == "a.png")
        for view in (0, None):
            found = pixels(picture, data, view)
            assert (found.dtype, tuple(found.shape)) == (torch.float32, (3, 64, 64))
            assert found[:, :, 2:-2].amin(dim=(1, 2)).tolist() == [-1, -1, 1]
            assert found[:, :, 2:-2].amax(dim=(1, 2)).tolist() == [-1, -1, 1]

    def test_the_shorter_side_is_resized_smoothly(self, tmp_path: Path) -> None:
        stripes = np.zeros((256, 300), np.uint8)
        stripes[:, ::2] = 255  # at a quarter of the size, each pixel is the mean of two black and two white columns
        Image.fromarray(stripes).save(tmp_path / "a.png")
        tiny_diffusion.painting(1, 64, 64).save(tmp_path / "b.png")
        for name in "ab":
            (tmp_path / f"{name}.txt").write_text("a caption")
        data = spec(tmp_path, test=1)
        pictures = prepare(data)
        picture = next(each for each in (*pictures.train, *pictures.test) if each.name == "a.png")
        assert pixels(picture, data, None).abs().max() < 0.1

    def test_random_views_differ_and_depend_on_nothing_but_seed_content_and_view(
        self, gallery: Path, folder: Path
    ) -> None:
        settings: dict[str, Any] = {"crop": "random", "flip": True, "views": 8}
        data = spec(gallery, **settings)
        picture = prepare(data).train[0]
        views = [pixels(picture, data, view) for view in range(8)]
        assert len({each.numpy().tobytes() for each in views}) > 4
        assert torch.equal(views[5], pixels(picture, data, 5))
        others = prepare(spec(folder, test=1, **settings))
        same = next(each for each in (*others.train, *others.test) if each.content == picture.content)
        assert torch.equal(pixels(same, spec(folder, test=1, **settings), 5), views[5])
        seeds = [pixels(picture, spec(gallery, seed=seed, **settings), 5) for seed in range(4)]
        assert len({each.numpy().tobytes() for each in seeds}) > 2

    def test_random_crops_reach_both_ends_of_the_longer_side(self, tmp_path: Path) -> None:
        ramp = np.tile(np.arange(72, dtype=np.uint8), (64, 1))
        Image.fromarray(ramp).save(tmp_path / "a.png")
        tiny_diffusion.painting(1, 64, 64).save(tmp_path / "b.png")
        for name in "ab":
            (tmp_path / f"{name}.txt").write_text("a caption")
        data = spec(tmp_path, test=1, crop="random", views=200)
        pictures = prepare(data)
        picture = next(each for each in (*pictures.train, *pictures.test) if each.name == "a.png")
        lefts = {round(float(pixels(picture, data, view)[0, 0, 0] + 1) * 127.5) for view in range(200)}
        assert lefts == set(range(9))

    def test_half_of_the_views_are_mirrored_and_the_first_of_a_centre_crop_is_not(self, gallery: Path) -> None:
        data = spec(gallery, flip=True, views=4)
        picture = prepare(data).train[0]
        upright = pixels(picture, data, None)
        views = [pixels(picture, data, view) for view in range(4)]
        assert torch.equal(views[0], upright)
        assert sum(torch.equal(view, upright) for view in views) == 2
        assert sum(torch.equal(view, upright.flip(2)) for view in views) == 2


class TestForPeople:
    def test_report_and_files(self, folder: Path, tmp_path: Path) -> None:
        held_out = prepare(spec(folder)).test[0]
        add(folder, "again.png", encoded(held_out.open()))
        add(folder, "bad.png", b"bad")
        plain = tiny_diffusion.plain_spec("no-model", folder, data__test=3, data__unusable="skip")
        trial = ImageTrialSpec.from_plain(plain)
        pictures = prepare(trial.data)
        report = describe.data_report(trial)
        source = str(folder)
        assert (report.key, report.read, report.unusable) == (pictures.key, {source: 14}, {source: {"broken": 1}})
        counts = [(each.source, each.split, each.rows, each.overlapping) for each in report.splits]
        left_out = len(pictures.repeats)
        assert counts == [(source, "train", 10 - left_out, left_out), (source, "test", 3, 0)]
        assert report.overlap == {"repeats": pictures.repeats}
        assert report.settings["resolution"] == 64
        assert report.remarks[0].startswith(f"{folder.name}: left out 1 image that cannot be used: bad.png (broken:")
        assert report.overlap_lines[0] == f"{left_out} training images repeat held-out images and are left out"

        many = {f"{number}.png": "first.png" for number in range(1000)}
        lines = describe._overlap_lines(replace(pictures, repeats=many))
        assert (len(lines), lines[-1]) == (22, "and 980 more")

        (tmp_path / "out").mkdir()
        written = describe.write_data(trial, tmp_path / "out")
        assert [path.name for path in written] == ["train.jsonl", "train.png", "test.jsonl", "test.png"]
        lines = [json.loads(line) for line in written[2].read_text().splitlines()]
        assert [line["file_name"] for line in lines] == names(pictures)[1]
        assert lines[0] == {
            "file_name": pictures.test[0].name, "caption": pictures.test[0].caption, "width": 100, "height": 80
        }  # fmt: skip
        with Image.open(written[3]) as sheet:
            assert sheet.size == (3 * describe.THUMBNAIL, describe.THUMBNAIL)
            second = sheet.crop((describe.THUMBNAIL, 0, 2 * describe.THUMBNAIL, describe.THUMBNAIL))
        assert repeated([look(second)], [look(each.open().crop((10, 0, 90, 80))) for each in pictures.test]) == [1]
