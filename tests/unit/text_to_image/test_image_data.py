"""Images with captions: what is found, refused, split and seen."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_diffusion
import torch
from PIL import Image, ImageOps

from ray_peft.errors import DataError
from ray_peft.spec.text_to_image import ImageDataSpec, ImageTrialSpec
from ray_peft.tasks.text_to_image import describe
from ray_peft.tasks.text_to_image.data import Pictures, decoded, notes, pixels, prepare
from ray_peft.tasks.text_to_image.repeats import look, repeated


@pytest.fixture(scope="session")
def paintings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve paintings of 100 x 80 pixels with metadata.jsonl; not to be changed."""
    return tiny_diffusion.write_images(tmp_path_factory.mktemp("images") / "paintings", 12)


@pytest.fixture
def folder(paintings: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(paintings, tmp_path / "paintings")


def spec(folder: Path | str, **settings: Any) -> ImageDataSpec:
    return ImageDataSpec.from_plain({"path": str(folder), "test": 3, "resolution": 64, **settings})


def names(pictures: Pictures) -> tuple[list[str], list[str]]:
    return [each.name for each in pictures.train], [each.name for each in pictures.test]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refusal(data: ImageDataSpec) -> str:
    with pytest.raises(DataError) as caught:
        prepare(data)
    return str(caught.value)


def add(folder: Path, name: str, content: bytes, caption: str = "one more") -> None:
    (folder / name).write_bytes(content)
    with (folder / "metadata.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"file_name": name, "text": caption}) + "\n")


def side_by_side(width: int = 80, height: int = 64) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), (200, 0, 0))
    image.paste((0, 0, 200), (width // 2, 0, width, height))
    return image


class TestFinding:
    def test_images_and_captions_of_a_folder(self, paintings: Path) -> None:
        pictures = prepare(spec(paintings))
        train, test = names(pictures)
        assert sorted(train + test) == [f"painting_{index:02}.{'jpg' if index % 3 else 'png'}" for index in range(12)]
        assert (len(train), len(test), pictures.read, pictures.unusable) == (9, 3, 12, {})
        for each in (*pictures.train, *pictures.test):
            assert each.caption.endswith(f", number {int(each.name[9:11])}")
            assert (each.width, each.height) == (100, 80)

    def test_images_below_the_folder_in_any_case_with_txt_captions_and_without_hidden_files(
        self, tmp_path: Path
    ) -> None:
        for index, name in enumerate(["a.JPG", "below/b.Png", "below/deeper/c.webp", "d.TIFF", "e.bmp"]):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            tiny_diffusion.painting(index, 80, 64).save(path)
            path.with_suffix(".txt").write_text(f"caption\n  {name} \n", encoding="utf-8")
        (tmp_path / "._a.jpg").write_bytes(b"of macOS")
        (tmp_path / "readme.md").write_text("not an image")
        pictures = prepare(spec(tmp_path, test=1))
        found = {each.name: each.caption for each in (*pictures.train, *pictures.test)}
        every = ["a.JPG", "below/b.Png", "below/deeper/c.webp", "d.TIFF", "e.bmp"]
        assert found == {name: f"caption {name}" for name in every}

    def test_metadata_csv_with_a_named_column(self, folder: Path) -> None:
        (folder / "metadata.jsonl").unlink()
        lines = [f'{path.name},"swirls, many",t' for path in sorted(folder.iterdir())]
        (folder / "metadata.csv").write_text("file_name,blurb,text\n" + "\n".join(lines) + "\n", encoding="utf-8")
        assert {each.caption for each in prepare(spec(folder, caption="blurb")).train} == {"swirls, many"}
        assert {each.caption for each in prepare(spec(folder)).train} == {"t"}

    def test_a_byte_order_mark_is_no_part_of_metadata_or_captions(self, folder: Path) -> None:
        metadata = folder / "metadata.jsonl"
        metadata.write_bytes(b"\xef\xbb\xbf" + metadata.read_bytes())
        assert prepare(spec(folder)).read == 12
        metadata.unlink()
        for path in folder.iterdir():
            path.with_suffix(".txt").write_bytes(b"\xef\xbb\xbfa caption")
        assert {each.caption for each in prepare(spec(folder)).train} == {"a caption"}

    def test_metadata_of_a_folder_below_names_files_beside_it(self, folder: Path) -> None:
        below = prepare(spec(folder.parent))
        assert sorted(sum(names(below), [])) == sorted(
            f"paintings/{name}" for name in sum(names(prepare(spec(folder))), [])
        )

    def test_metadata_goes_before_txt_files(self, folder: Path) -> None:
        (folder / "painting_01.txt").write_text("of the txt file")
        pictures = prepare(spec(folder))
        assert all("number" in each.caption for each in (*pictures.train, *pictures.test))

    @pytest.mark.parametrize(
        ("make", "pieces"),
        [
            (lambda folder: None, ["no such folder", "name a folder with images, or the id of a hub data set"]),
            (lambda folder: folder.write_text(""), ["is a file, not a folder"]),
            (lambda folder: folder.mkdir(), ["no images in it or below it (.jpg, .jpeg, .png"]),
        ],
    )
    def test_no_folder_or_no_images(self, tmp_path: Path, make: Any, pieces: list[str]) -> None:
        make(tmp_path / "images")
        found = refusal(spec(tmp_path / "images"))
        assert found.startswith(f"data.path: {tmp_path / 'images'}: ")
        assert all(piece in found for piece in pieces)

    @pytest.mark.parametrize(
        ("file", "content", "pieces"),
        [
            ("metadata.jsonl", '{"file_name": "painting_01.jpg", "text": "a"}\n\n{"file', ["line 3: not valid JSON: "]),
            ("metadata.jsonl", "[1]\n", ["line 1: must be a JSON object with file_name and text (found list)"]),
            ("metadata.jsonl", '{"text": "a"}\n', ["metadata.jsonl line 1 has no file_name", "remove these lines"]),
            (
                "metadata.jsonl",
                '{"file_name": "gone.jpg", "text": "a"}\n{"file_name": "lost.png", "text": "a"}\n',
                ["line 1 names gone.jpg, which is not there, metadata.jsonl line 2 names lost.png, which is not there"],
            ),
            (
                "metadata.jsonl",
                '{"file_name": "metadata.jsonl", "text": "a"}\n',
                ["line 1 names metadata.jsonl, which is no image of a known kind (.jpg"],
            ),
            (
                "metadata.jsonl",
                '{"file_name": "../outside.png", "text": "a"}\n',
                ["names ../outside.png, which is hidden or outside of the folder"],
            ),
            (
                "metadata.jsonl",
                '{"file_name": "painting_01.jpg", "text": "a"}\n{"file_name": "./painting_01.jpg", "text": "b"}\n',
                ["metadata.jsonl line 2 names painting_01.jpg again, after metadata.jsonl line 1"],
            ),
            ("metadata.jsonl", b"\xff\xfe", ["metadata.jsonl: is not UTF-8 text: ", "at byte 0; save it as UTF-8"]),
            ("metadata.csv", "name,text\na,b\n", ["file_name must be one of them (found name, text)"]),
            (
                "metadata.csv",
                "file_name,text\npainting_01.jpg,one, two\n",
                ["metadata.csv: line 2 has 3 values for 2 columns; put text that holds a comma in double quotes"],
            ),
        ],
    )
    def test_malformed_metadata(self, folder: Path, file: str, content: str | bytes, pieces: list[str]) -> None:
        tiny_diffusion.painting(0, 64, 64).save(folder.parent / "outside.png")
        (folder / "metadata.jsonl").unlink()
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        found = refusal(spec(folder, unusable="skip"))
        assert found.startswith("data.path: ")
        assert all(piece in found for piece in pieces), found

    def test_a_caption_column_that_is_not_there(self, folder: Path) -> None:
        found = refusal(spec(folder, caption="blurb"))
        assert found.startswith("data.caption: blurb: no such column in ")
        assert found.endswith("metadata.jsonl; its columns are file_name, text")
        lines = (folder / "metadata.jsonl").read_text().replace('"text"', '"title"')
        (folder / "metadata.jsonl").write_text(lines)
        found = refusal(spec(folder))
        assert found.startswith("data.caption: ")
        assert "has no column text or caption; its columns are file_name, title: name the one with captions" in found
        (folder / "metadata.jsonl").unlink()
        found = refusal(spec(folder, caption="title"))
        assert found.startswith("data.caption: title: ")
        assert "has neither metadata.jsonl nor metadata.csv" in found


class TestHub:
    def rows(self, **columns: Any) -> Any:
        from datasets import Dataset, Features, Value
        from datasets import Image as ImageFeature

        images = [{"bytes": encoded(tiny_diffusion.painting(index, 80, 64)), "path": None} for index in range(6)]
        every = {"picture": images, **columns}
        kinds = {name: ImageFeature() if "picture" in name else Value("string") for name in every}
        return Dataset.from_dict(every, features=Features(kinds))

    def given(self, monkeypatch: pytest.MonkeyPatch, rows: Any) -> ImageDataSpec:
        import datasets

        asked = []
        monkeypatch.setattr(datasets, "load_dataset", lambda path, split: asked.append((path, split)) or rows)
        return spec("someone/paintings", test=2, split="all")

    def test_rows_are_named_by_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        captions = [f"caption of {index + 1}" for index in range(6)]
        data = self.given(monkeypatch, self.rows(title=["t"] * 6, caption=captions))
        pictures = prepare(data)
        assert {each.name: each.caption for each in (*pictures.train, *pictures.test)} == {
            f"row {index + 1}": f"caption of {index + 1}" for index in range(6)
        }
        third = next(each for each in (*pictures.train, *pictures.test) if each.name == "row 3")
        assert np.array_equal(np.asarray(third.open()), np.asarray(tiny_diffusion.painting(2, 80, 64)))
        assert notes(pictures, data)[0] == "someone/paintings: 4 training and 2 held-out images of 6 read"

    def test_a_row_without_image_or_caption_is_unusable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = self.rows(text=["a", "b", None, " ", "e", "f"])
        rows = rows.map(lambda row, index: {"picture": None} if index == 1 else row, with_indices=True)
        found = refusal(self.given(monkeypatch, rows))
        assert "row 2 (broken: the row has no image)" in found
        assert "row 3 (no caption: null in column text of row 3)" in found
        assert "row 4 (no caption: blank in column text of row 4)" in found

    def test_columns_that_are_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = refusal(self.given(monkeypatch, self.rows(title=["t"] * 6)))
        assert "data.caption: someone/paintings has no column text or caption; its columns are picture, title" in found
        found = refusal(self.given(monkeypatch, self.rows(text=["t"] * 6).remove_columns("picture")))
        assert "data.path: someone/paintings: has no column of images; its columns are text" in found
        twice = self.rows(text=["t"] * 6, other_picture=[None] * 6)
        assert "has 2 columns of images (picture, other_picture)" in refusal(self.given(monkeypatch, twice))

    def test_without_network_the_id_is_named_with_the_way_out(self) -> None:
        found = refusal(spec("nobody/no-such-paintings"))
        assert found.startswith("data.path: nobody/no-such-paintings: no such local folder, and it cannot be loaded as")
        assert "\n" not in found
        assert found.endswith("name a folder, or check id, split and network")


class TestDecoding:
    def test_exif_rotation_is_applied(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # turn a quarter clockwise: the left side comes to the top
        image = decoded(encoded(side_by_side(), "JPEG", exif=exif, quality=95))
        assert image.size == (64, 80)
        top, bottom = image.getpixel((32, 10)), image.getpixel((32, 70))
        assert top[0] > 150 > bottom[0]
        assert bottom[2] > 150 > top[2]

    def test_transparent_pixels_are_white(self) -> None:
        image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
        image.putpixel((0, 0), (255, 0, 0, 255))
        image.putpixel((1, 0), (0, 0, 0, 128))
        found = decoded(encoded(image))
        assert [found.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (127, 127, 127), (255, 255, 255)]

    def test_a_transparent_colour_of_a_palette_is_white(self) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putpixel((1, 0), 1)
        content = encoded(image, transparency=0)
        assert [decoded(content).getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (200, 100, 50)]

    def test_16_bits_keep_their_shades(self) -> None:
        grey = np.array([[0, 257 * 64, 257 * 128, 65535]], np.uint16)
        found = decoded(encoded(Image.fromarray(grey)))
        assert [found.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 64, 128, 255)]

    def test_greyscale_palette_and_cmyk(self) -> None:
        assert decoded(encoded(Image.new("L", (4, 4), 90))).getpixel((1, 1)) == (90, 90, 90)
        assert decoded(encoded(Image.new("1", (4, 4), 1))).getpixel((1, 1)) == (255, 255, 255)
        ink = decoded(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)).getpixel((8, 8))
        assert ink[0] < 10
        assert min(ink[1:]) > 240


class TestUnusable:
    def break_some(self, folder: Path) -> None:
        whole = encoded(tiny_diffusion.painting(40, 100, 80), "JPEG", quality=95)
        add(folder, "cut.jpg", whole[: len(whole) // 2])
        add(folder, "words.png", b"not an image at all")
        add(folder, "empty.jpg", b"")
        add(folder, "small.png", encoded(tiny_diffusion.painting(41, 200, 63)))
        add(folder, "blank.png", encoded(tiny_diffusion.painting(42, 80, 80)), caption=" \n ")
        add(folder, "deep.tiff", encoded(Image.fromarray(np.ones((80, 80), np.float32)), "TIFF"))
        (folder / "unnamed.png").write_bytes(encoded(tiny_diffusion.painting(43, 80, 80)))

    def test_every_one_is_named_with_its_reason(self, folder: Path) -> None:
        self.break_some(folder)
        found = refusal(spec(folder))
        assert found.startswith(f"data.path: {folder}: 7 of 19 images are unusable: blank.png (")
        for piece in (
            "blank.png (no caption: blank in column text of metadata.jsonl line 17)",
            "cut.jpg (broken: image file is truncated",
            "deep.tiff (broken: 32-bit pixels",
            "empty.jpg (broken: not an image of a known kind)",
            "small.png (too small: 200 x 63 pixels, and the shorter side must have 64)",
            "unnamed.png (no caption: no line of the metadata names it)",
            "words.png (broken: not an image of a known kind)",
            "mend or remove them, lower data.min_side, or leave them out with data.unusable: skip",
        ):
            assert piece in found, found
        assert "painting_" not in found

    def test_skipped_ones_are_left_out_and_named(self, folder: Path) -> None:
        before = prepare(spec(folder))
        self.break_some(folder)
        data = spec(folder, unusable="skip")
        pictures = prepare(data)
        assert names(pictures) == names(before)
        assert sorted(pictures.unusable) == [
            "blank.png", "cut.jpg", "deep.tiff", "empty.jpg", "small.png", "unnamed.png", "words.png"
        ]  # fmt: skip
        first, second = notes(pictures, data)
        assert first == "paintings: 9 training and 3 held-out images of 19 read"
        assert second.startswith("paintings: left out 7 images that cannot be used: blank.png (no caption: blank")

    def test_at_most_twenty_are_named(self, folder: Path) -> None:
        for index in range(23):
            add(folder, f"bad_{index:02}.png", b"bad")
        found = refusal(spec(folder))
        assert "bad_19.png (broken: not an image of a known kind) and 3 more; mend" in found
        assert "bad_20.png" not in found

    def test_a_decompression_bomb_is_broken(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
        add(folder, "bomb.png", encoded(Image.new("L", (200, 200))))
        found = refusal(spec(folder))
        assert "1 of 13 images are unusable: bomb.png (broken: Image size (40000 pixels) exceeds limit" in found

    def test_min_side_may_be_below_the_resolution_and_is_noted(self, paintings: Path) -> None:
        assert "shorter side must have 128" in refusal(spec(paintings, resolution=128))
        data = spec(paintings, resolution=128, min_side=80)
        assert "paintings: 12 images blown up to 128 px: painting_" in notes(prepare(data), data)[1]

    def test_txt_captions_that_are_missing_blank_or_not_text(self, folder: Path) -> None:
        (folder / "metadata.jsonl").unlink()
        (folder / "painting_01.txt").write_text(" \n")
        (folder / "painting_02.txt").write_bytes(b"\xff\xfe\xff")
        found = refusal(spec(folder))
        assert "painting_00.png (no caption: no painting_00.txt beside it)" in found
        assert "painting_01.jpg (no caption: blank in painting_01.txt)" in found
        assert "painting_02.jpg (no caption: painting_02.txt is not UTF-8 text" in found

    def test_a_caption_that_is_a_number(self, folder: Path) -> None:
        (folder / "painting_01.jpg").rename(folder / "numbered.jpg")
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        lines[1] = '{"file_name": "numbered.jpg", "text": 7}'
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        assert "numbered.jpg (no caption: int in place of text in column text of" in refusal(spec(folder))


class TestSplit:
    def test_renaming_files_moves_nothing(self, folder: Path, paintings: Path) -> None:
        for index, path in enumerate(sorted(folder.glob("painting_*"))):
            path.rename(folder / f"z{index * 7 % 12:02}_{path.name}")
        renamed = {path.name.partition("_")[2]: path.name for path in folder.glob("z*")}
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        lines = [{**line, "file_name": renamed[line["file_name"]]} for line in lines]
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        before, after = prepare(spec(paintings)), prepare(spec(folder))
        assert before.key == after.key
        assert [each.content for each in after.train] == [each.content for each in before.train]
        assert [each.content for each in after.test] == [each.content for each in before.test]

    def test_the_key_is_of_settings_images_and_captions(self, folder: Path, paintings: Path) -> None:
        key = prepare(spec(paintings)).key
        assert prepare(spec(folder)).key == key
        assert prepare(spec(folder, seed=1)).key != key
        assert prepare(spec(folder, resolution=72)).key != key
        lines = (folder / "metadata.jsonl").read_text()
        (folder / "metadata.jsonl").write_text(lines.replace("number 5", "number five"))
        assert prepare(spec(folder)).key != key
        (folder / "metadata.jsonl").write_text(lines)
        assert prepare(spec(folder)).key == key
        tiny_diffusion.painting(99, 100, 80).save(folder / "painting_05.jpg")
        assert prepare(spec(folder)).key != key

    def test_the_seed_draws_the_split_and_counts_grow_it_without_moving_it(self, paintings: Path) -> None:
        of_seed = {seed: frozenset(names(prepare(spec(paintings, seed=seed)))[1]) for seed in range(6)}
        assert len(set(of_seed.values())) > 2
        train, test = names(prepare(spec(paintings)))
        assert names(prepare(spec(paintings, train=4))) == (train[:4], test)
        assert not set(train) & set(test)

    def test_fractions_are_of_all_usable_images(self, paintings: Path) -> None:
        pictures = prepare(spec(paintings, test=0.2, train=0.6))
        assert (len(pictures.test), len(pictures.train)) == (3, 7)  # 2.4 rounds up, 7.2 rounds down

    def test_too_few(self, paintings: Path) -> None:
        found = refusal(spec(paintings, test=13))
        assert found.startswith(f"data.test: 13: {paintings} has 12 usable images of 12 read; lower data.test")
        found = refusal(spec(paintings, train=10))
        assert found.startswith(f"data.train: 10: {paintings} has 12 usable images of 12 read; without 3 held-out ones")
        assert "9 remain for training, and 10 are asked for; lower data.train or data.test" in found
        assert "0 remain for training, and at least 1 is asked for" in refusal(spec(paintings, test=12))
        assert "0 are asked for" in refusal(spec(paintings, train=0.05))

    def test_no_usable_image_at_all(self, folder: Path) -> None:
        found = refusal(spec(folder, resolution=512, unusable="skip", test=0.2))
        assert "has 0 usable images of 12 read, none of which can be held out; add images" in found

    @pytest.mark.parametrize("change", ["copied", "photographed", "mirrored"])
    def test_what_repeats_a_held_out_image_is_not_trained_on(self, folder: Path, change: str) -> None:
        held_out = prepare(spec(folder)).test[0]
        image = held_out.open()
        if change == "copied":
            content = (folder / held_out.name).read_bytes()
        elif change == "photographed":
            dimmer = image.crop((1, 1, 99, 79)).resize((125, 100)).point([int(v * 0.8) for v in range(256)] * 3)
            content = encoded(dimmer, "JPEG", quality=60)
        else:
            content = encoded(ImageOps.mirror(image))
        add(folder, "again.img.png", content, caption="another title")
        seen_apart = 0
        for seed in range(8):
            data = spec(folder, seed=seed)
            pictures = prepare(data)
            train, test = names(pictures)
            both = {held_out.name, "again.img.png"}
            assert not (both & set(train) and both & set(test))
            if pictures.repeats:
                seen_apart += 1
                ((left_out, repeats),) = pictures.repeats.items()
                assert {left_out, repeats} == both
                assert repeats in test
                assert notes(pictures, data)[1] == (
                    f"paintings: left out 1 training image repeating held-out ones: {left_out} (as {repeats})"
                )
                assert f"and 1 image that repeat held-out ones ({left_out})" in refusal(
                    spec(folder, seed=seed, train=10)
                )
        assert seen_apart

    def test_a_copy_of_an_image_without_any_shapes_is_a_repeat(self, folder: Path) -> None:
        for name in ("flat.png", "flat_again.png"):
            add(folder, name, encoded(Image.new("RGB", (80, 80), (9, 99, 199))))
        found = [prepare(spec(folder, seed=seed)).repeats for seed in range(8)]
        assert {"flat.png": "flat_again.png"} in found or {"flat_again.png": "flat.png"} in found

    def test_equal_captions_do_not_make_a_repeat(self, folder: Path) -> None:
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps({**line, "text": "one"}) for line in lines))
        assert prepare(spec(folder)).repeats == {}

    def test_drawings_on_white_are_told_apart_though_most_of_them_is_equal(self) -> None:
        drawings = []
        for place in ((20, 30), (60, 10), (10, 60), (50, 60)):
            image = Image.new("L", (100, 100), 255)
            image.paste(0, (*place, place[0] + 30, place[1] + 8))
            drawings.append(look(image))
        assert repeated(drawings[1:], drawings[:1]) == [None, None, None]
        assert repeated(drawings, [drawings[2], drawings[0]]) == [1, None, 0, None]

    def test_a_file_that_changes_after_the_preparation(self, folder: Path) -> None:
        picture = prepare(spec(folder)).train[0]
        (folder / picture.name).write_bytes(encoded(tiny_diffusion.painting(77, 100, 80)))
        with pytest.raises(DataError, match=f"{picture.name} has changed while it was in use .its content is another"):
            picture.open()
        (folder / picture.name).unlink()
        with pytest.raises(DataError, match=r"has changed while it was in use .*No such file"):
            picture.open()


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
        self, paintings: Path, folder: Path
    ) -> None:
        settings: dict[str, Any] = {"crop": "random", "flip": True, "views": 8}
        data = spec(paintings, **settings)
        picture = prepare(data).train[0]
        views = [pixels(picture, data, view) for view in range(8)]
        assert len({each.numpy().tobytes() for each in views}) > 4
        assert torch.equal(views[5], pixels(picture, data, 5))
        others = prepare(spec(folder, test=1, **settings))
        same = next(each for each in (*others.train, *others.test) if each.content == picture.content)
        assert torch.equal(pixels(same, spec(folder, test=1, **settings), 5), views[5])
        seeds = [pixels(picture, spec(paintings, seed=seed, **settings), 5) for seed in range(4)]
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

    def test_half_of_the_views_are_mirrored_and_the_first_of_a_centre_crop_is_not(self, paintings: Path) -> None:
        data = spec(paintings, flip=True, views=4)
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
        assert report.overlap_lines[0] == f"{left_out} training images repeat held-out images and are left out"

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
