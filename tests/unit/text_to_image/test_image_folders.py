"""Folders as people bring them: other endings, names, links, captions and metadata; used, or named."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import tiny_diffusion
from PIL import Image
from tiny_folders import add, encoded, names, refusal, spec

from ray_peft.tasks.text_to_image.data import notes, prepare

CUP = "caf\u00e9"


def painting(folder: Path, name: str, index: int = 90, caption: str | None = None, **options: object) -> Path:
    """A painting as a file, and its caption in a .txt file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(tiny_diffusion.painting(index, 80, 64), str(options.pop("kind", "PNG")), **options))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Three paintings with captions beside them."""
    for index in range(3):
        painting(tmp_path / "bare", f"{index}.png", index, f"number {index}")
    return tmp_path / "bare"


def captions(folder: Path, **settings: object) -> dict[str, str]:
    pictures = prepare(spec(folder, **{"test": 1, **settings}))
    return {each.name: each.caption for each in (*pictures.train, *pictures.test)}


def remarks(folder: Path, **settings: object) -> list[str]:
    data = spec(folder, **{"test": 1, **settings})
    return notes(prepare(data), data)[1:]


class TestEndings:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [("a.gif", "GIF"), ("a.JFIF", "JPEG"), ("a.avif", "AVIF"), ("a.jpe", "JPEG"), ("a.Png", "PNG")],
    )
    def test_kinds_that_are_read(self, bare: Path, name: str, kind: str) -> None:
        painting(bare, name, caption="one more", kind=kind)
        assert captions(bare)[name] == "one more"

    def test_an_image_of_another_kind_with_a_caption_is_unusable(self, bare: Path) -> None:
        painting(bare, "telephone.HEIC", caption="one more")
        assert "1 of 4 images are unusable: telephone.HEIC (not read: .heic files are not; save it as PNG" in refusal(
            spec(bare, test=1)
        )
        assert any(
            "left out 1 image that cannot be used: telephone.HEIC" in each for each in remarks(bare, unusable="skip")
        )

    def test_metadata_may_name_an_image_of_another_kind(self, folder: Path) -> None:
        add(folder, "drawing.svg", b"<svg/>")
        assert "drawing.svg (not read: .svg files are not" in refusal(spec(folder))

    def test_an_image_of_another_kind_without_a_caption_is_named(self, bare: Path) -> None:
        painting(bare, "logo.svg")
        assert remarks(bare) == ["bare: not used, of kinds that are not read, and without captions: logo.svg"]

    def test_captions_without_an_image_are_named(self, bare: Path) -> None:
        (bare / "lost.txt").write_text("of a file with an ending that nobody knows")
        assert remarks(bare) == ["bare: not used, text files without an image of their name: lost.txt"]

    def test_a_folder_of_nothing_but_other_kinds_names_them(self, tmp_path: Path) -> None:
        painting(tmp_path, "a.heic", caption="one")
        assert refusal(spec(tmp_path)).endswith("; not used: a.heic")


class TestCaptionFiles:
    @pytest.mark.parametrize("name", ["0.caption", "0.CAPTION", "0.TXT", "0.png.txt", "0.png.caption"])
    def test_other_names_of_caption_files(self, bare: Path, name: str) -> None:
        (bare / "0.txt").rename(bare / name)
        assert captions(bare) == {"0.png": "number 0", "1.png": "number 1", "2.png": "number 2"}

    def test_a_folder_of_kohyas_trainer(self, tmp_path: Path) -> None:
        for index in range(3):
            painting(tmp_path / "set" / "10_swirls", f"{index}.png", index)
            (tmp_path / "set" / "10_swirls" / f"{index}.caption").write_text(f"swirl {index}")
        found = captions(tmp_path / "set")
        assert found == {f"10_swirls/{index}.png": f"swirl {index}" for index in range(3)}
        assert remarks(tmp_path / "set") == [
            "set: numbers before the names of folders (10_swirls) repeat nothing: each image is seen equally often"
        ]

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (CUP.encode("latin-1"), "0.txt is not UTF-8 text (unexpected end of data at byte 3); save it as UTF-8"),
            (b"  \r\n", "blank in 0.txt"),
            ("\u200b\ufeff \u200d".encode(), "blank in 0.txt"),
            (b"a\0b", "a NUL character in 0.txt, which is no text"),
            (b"\xff\xfea", "0.txt is not UTF-16 text (truncated data at byte 2); save it as UTF-8"),
        ],
    )
    def test_what_is_no_caption(self, bare: Path, content: bytes, reason: str) -> None:
        (bare / "0.txt").write_bytes(content)
        assert f"1 of 3 images are unusable: 0.png (no caption: {reason})" in refusal(spec(bare, test=1))

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_captions_of_any_script(self, bare: Path, encoding: str) -> None:
        (bare / "0.txt").write_bytes(f"{CUP} \u65e5\u672c \U0001f3a8".encode(encoding))
        assert captions(bare)["0.png"] == f"{CUP} \u65e5\u672c \U0001f3a8"

    def test_half_a_character_in_metadata_is_no_text(self, folder: Path) -> None:
        add(folder, "half.png", encoded(tiny_diffusion.painting(90, 80, 80)), caption="a \ud83d swirl")
        found = refusal(spec(folder))
        place = "column text of metadata.jsonl line 13, which is no text"
        assert f"half.png (no caption: half of a character (the surrogate U+D83D) in {place})" in found

    def test_an_image_that_the_metadata_leaves_out_may_have_a_text_file(self, folder: Path) -> None:
        painting(folder, "own.png", caption="my own")
        assert captions(folder)["own.png"] == "my own"


class TestNames:
    @pytest.mark.parametrize(("on_disk", "in_file"), [("NFD", "NFC"), ("NFC", "NFD")])
    def test_composed_and_decomposed_letters_are_the_same(self, bare: Path, on_disk: str, in_file: str) -> None:
        painting(bare, unicodedata.normalize(on_disk, f"{CUP}.png"))
        text = bare / unicodedata.normalize(in_file, f"{CUP}.txt")
        text.write_text("beside")
        assert captions(bare)[unicodedata.normalize(on_disk, f"{CUP}.png")] == "beside"
        text.unlink()
        lines = [
            {"file_name": unicodedata.normalize(in_file, f"{name}.png"), "text": "listed"} for name in (CUP, 0, 1, 2)
        ]
        (bare / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        assert set(captions(bare).values()) == {"listed"}

    def test_two_files_that_differ_in_form_alone_keep_their_own_lines(self, bare: Path) -> None:
        lines = [{"file_name": f"{index}.png", "text": "t"} for index in range(3)]
        for index, form in enumerate(("NFC", "NFD")):
            name = unicodedata.normalize(form, f"{CUP}.png")
            painting(bare, name, 60 + index)
            lines.append({"file_name": name, "text": form})
        (bare / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        assert {unicodedata.normalize(form, f"{CUP}.png"): form for form in ("NFC", "NFD")}.items() <= captions(
            bare
        ).items()

    @pytest.mark.parametrize(
        "name", ["below\\0.png", ".\\below\\0.png", " below/0.png ", "below/../below/0.png", "./below/0.png"]
    )
    def test_other_ways_to_write_a_path(self, tmp_path: Path, name: str) -> None:
        lines = [{"file_name": name, "text": "meant"}]
        for index in range(3):
            painting(tmp_path / "set" / "below", f"{index}.png", index)
            lines += [{"file_name": f"below/{index}.png", "text": "t"}] if index else []
        (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        assert captions(tmp_path / "set")["below/0.png"] == "meant"

    def test_an_absolute_path_into_the_folder(self, bare: Path) -> None:
        lines = [{"file_name": str(bare / f"{index}.png"), "text": "listed"} for index in range(3)]
        (bare / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        assert set(captions(bare).values()) == {"listed"}

    def test_the_case_of_letters_is_said_to_count(self, folder: Path) -> None:
        lines = (folder / "metadata.jsonl").read_text().replace("painting_05.jpg", "Painting_05.JPG")
        (folder / "metadata.jsonl").write_text(lines)
        place = (
            "line 6 names Painting_05.JPG, which is not there (there is painting_05.jpg: the case of letters counts)"
        )
        assert place in refusal(spec(folder))

    def test_a_name_that_is_no_text(self, bare: Path) -> None:
        name = b"a\xe9.png".decode("utf-8", "surrogateescape")
        try:
            painting(bare, name)
        except OSError:
            pytest.skip("the file system refuses the name")
        found = refusal(spec(bare, test=1))
        assert "a\\udce9.png (no caption: no a\\udce9.txt beside it)" in found
        found.encode()


class TestLinks:
    def test_linked_folders_are_looked_into(self, bare: Path, gallery: Path) -> None:
        (bare / "more").symlink_to(gallery)
        found = captions(bare)
        assert len(found) == 15
        assert found["more/painting_00.png"].endswith("number 0")
        assert found["0.png"] == "number 0"

    def test_loops_end_and_are_named(self, bare: Path, tmp_path: Path) -> None:
        (bare / "below").mkdir()
        for link, target in (
            ("self", bare),
            ("above", tmp_path),
            ("again", bare / "below"),
            ("nowhere", tmp_path / "x"),
        ):
            (bare / link).symlink_to(target)
        assert len(captions(bare)) == 3
        assert remarks(bare) == [
            "bare: not used: nowhere (a link that leads nowhere), above (a link to a folder that it lies in), "
            "self (a link to a folder that it lies in)"
        ]

    def test_two_links_to_one_folder_are_read_once(self, bare: Path, gallery: Path) -> None:
        for link in ("more", "much_more"):
            (bare / link).symlink_to(gallery)
        assert len(captions(bare)) == 15


class TestTables:
    """The metadata of spreadsheets and other programs."""

    @pytest.fixture
    def rows(self, folder: Path) -> list[dict[str, str]]:
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        (folder / "metadata.jsonl").unlink()
        return [json.loads(line) for line in lines]

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    @pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
    def test_delimiters_and_encodings(
        self, folder: Path, gallery: Path, rows: list, delimiter: str, encoding: str
    ) -> None:
        lines = [f"file_name{delimiter} text", *(f'{row["file_name"]}{delimiter}"{row["text"]}"' for row in rows)]
        (folder / "METADATA.CSV").write_bytes("".join(f"{line}\r\n" for line in lines).encode(encoding))
        assert prepare(spec(folder)).key == prepare(spec(gallery)).key

    def test_line_separators_within_a_caption(self, folder: Path, rows: list) -> None:
        lines = ["file_name,text", *(f"{row['file_name']},one\u2028two\x85three" for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8", newline="")
        assert {each.caption for each in prepare(spec(folder)).train} == {"one two three"}

    def test_a_caption_over_several_lines(self, folder: Path, rows: list) -> None:
        lines = ["file_name,text", *(f'{row["file_name"]},"one\ntwo"' for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
        assert {each.caption for each in prepare(spec(folder)).train} == {"one two"}

    def test_a_column_that_is_there_twice(self, folder: Path, rows: list) -> None:
        (folder / "metadata.csv").write_text("file_name,text,text\n")
        assert "metadata.csv: line 1 names the column text twice; rename one of them" in refusal(spec(folder))

    def test_an_unquoted_delimiter(self, folder: Path, rows: list) -> None:
        (folder / "metadata.csv").write_text("file_name;text\npainting_01.jpg;a;b\n")
        assert "line 2 has 3 values for 2 columns; put text that holds a semicolon in double quotes" in refusal(
            spec(folder)
        )

    def test_one_array_in_place_of_lines(self, folder: Path, gallery: Path, rows: list) -> None:
        (folder / "metadata.jsonl").write_text(json.dumps(rows, indent=1))
        assert prepare(spec(folder)).key == prepare(spec(gallery)).key

    def test_utf_16_lines(self, folder: Path, gallery: Path, rows: list) -> None:
        (folder / "metadata.jsonl").write_bytes("\r\n".join(json.dumps(row) for row in rows).encode("utf-16"))
        assert prepare(spec(folder)).key == prepare(spec(gallery)).key


class TestBroken:
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "an empty file"),
            (b"<!DOCTYPE html><html>404</html>", "a web page, not the file itself"),
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                "a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder",
            ),
            (b"nonsense", "not an image of a known kind"),
        ],
    )
    def test_what_is_no_image_is_said(self, bare: Path, content: bytes, reason: str) -> None:
        (bare / "0.png").write_bytes(content)
        assert f"1 of 3 images are unusable: 0.png (broken: {reason}" in refusal(spec(bare, test=1))

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
    def test_a_file_that_is_cut(self, bare: Path, kind: str) -> None:
        whole = encoded(tiny_diffusion.painting(5, 80, 64), kind)
        (bare / "0.png").write_bytes(whole[: len(whole) // 2])
        assert "1 of 3 images are unusable: 0.png (broken: " in refusal(spec(bare, test=1))

    def test_the_ending_need_not_be_that_of_the_kind(self, bare: Path) -> None:
        before = prepare(spec(bare, test=1))
        with Image.open(bare / "0.png") as image:
            image.convert("RGB").save(bare / "0.jpg", "PNG")
        (bare / "0.png").unlink()
        assert sorted(sum(names(prepare(spec(bare, test=1))), [])) == ["0.jpg", "1.png", "2.png"]
        assert len(before.train) == 2


def test_several_frames_and_transparency_are_said(bare: Path) -> None:
    paintings = [tiny_diffusion.painting(index, 80, 64) for index in range(60, 64)]
    clear = paintings[3].convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    for name, kind, image in (
        ("a.gif", "GIF", paintings[0]),
        ("b.png", "PNG", paintings[1]),
        ("c.webp", "WEBP", paintings[2]),
    ):
        (bare / name).write_bytes(encoded(image, kind, save_all=True, append_images=[paintings[3]]))
        (bare / name).with_suffix(".txt").write_text(name)
    opaque = paintings[3].convert("RGBA")
    for name, image in (("clear.png", clear), ("opaque.png", opaque)):
        painting(bare, name, caption=name)
        (bare / name).write_bytes(encoded(image))
    train_first = sorted(remarks(bare))
    assert train_first[0].startswith("bare: 1 image with transparent parts, which are laid over white: clear.png")
    frames = train_first[1]
    assert frames.startswith("bare: 3 images with several frames or pages, of which the first is used: ")
    assert sorted(frames.rpartition(": ")[2].split(", ")) == ["a.gif", "b.png", "c.webp"]
