"""Images with captions: what is found, refused and split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_diffusion
from PIL import Image, ImageOps
from tiny_folders import add, encoded, names, refusal, spec

from ray_peft.errors import DataError
from ray_peft.spec.text_to_image import ImageDataSpec
from ray_peft.tasks.text_to_image.data import notes, prepare
from ray_peft.tasks.text_to_image.repeats import look, repeated


class TestFinding:
    def test_images_and_captions_of_a_folder(self, gallery: Path) -> None:
        pictures = prepare(spec(gallery))
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
            ("metadata.jsonl", b"\xff\xff", ["metadata.jsonl: is not UTF-8 text (", "at byte 0); save it as UTF-8"]),
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

        def load_dataset(path: str, split: str, revision: str | None) -> Any:
            assert (path, split, revision) == ("someone/paintings", "all", "v1.0")
            return rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return spec("someone/paintings", test=2, split="all", revision="v1.0")

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
            "empty.jpg (broken: an empty file; download it again)",
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

    def test_min_side_may_be_below_the_resolution_and_is_noted(self, gallery: Path) -> None:
        assert "shorter side must have 128" in refusal(spec(gallery, resolution=128))
        data = spec(gallery, resolution=128, min_side=80)
        assert "paintings: 12 images blown up to 128 px: painting_" in notes(prepare(data), data)[1]

    def test_txt_captions_that_are_missing_blank_or_not_text(self, folder: Path) -> None:
        (folder / "metadata.jsonl").unlink()
        (folder / "painting_01.txt").write_text(" \n")
        (folder / "painting_02.txt").write_bytes(b"\xff\xff\xff")
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
    def test_renaming_files_moves_nothing(self, folder: Path, gallery: Path) -> None:
        for index, path in enumerate(sorted(folder.glob("painting_*"))):
            path.rename(folder / f"z{index * 7 % 12:02}_{path.name}")
        renamed = {path.name.partition("_")[2]: path.name for path in folder.glob("z*")}
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        lines = [{**line, "file_name": renamed[line["file_name"]]} for line in lines]
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        before, after = prepare(spec(gallery)), prepare(spec(folder))
        assert before.key == after.key
        assert [each.content for each in after.train] == [each.content for each in before.train]
        assert [each.content for each in after.test] == [each.content for each in before.test]

    def test_the_key_is_of_settings_images_and_captions(self, folder: Path, gallery: Path) -> None:
        key = prepare(spec(gallery)).key
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

    def test_the_seed_draws_the_split_and_counts_grow_it_without_moving_it(self, gallery: Path) -> None:
        of_seed = {seed: frozenset(names(prepare(spec(gallery, seed=seed)))[1]) for seed in range(6)}
        assert len(set(of_seed.values())) > 2
        train, test = names(prepare(spec(gallery)))
        assert names(prepare(spec(gallery, train=4))) == (train[:4], test)
        assert not set(train) & set(test)

    def test_fractions_are_of_all_usable_images(self, gallery: Path) -> None:
        pictures = prepare(spec(gallery, test=0.2, train=0.6))
        assert (len(pictures.test), len(pictures.train)) == (3, 7)  # 2.4 rounds up, 7.2 rounds down

    def test_too_few(self, gallery: Path) -> None:
        found = refusal(spec(gallery, test=13))
        assert found.startswith(f"data.test: 13: {gallery} has 12 usable images of 12 read; lower data.test")
        found = refusal(spec(gallery, train=10))
        assert found.startswith(f"data.train: 10: {gallery} has 12 usable images of 12 read; without 3 held-out ones")
        assert "9 remain for training, and 10 are asked for; lower data.train or data.test" in found
        assert "0 remain for training, and at least 1 is asked for" in refusal(spec(gallery, test=12))
        assert "0 are asked for" in refusal(spec(gallery, train=0.05))

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
