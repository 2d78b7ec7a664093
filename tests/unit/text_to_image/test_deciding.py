"""What decides an inspection of an image trial is seen to change, whatever the files' sizes and times."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import tiny_diffusion

from ray_peft.spec import TrialSpec
from ray_peft.tasks.files import _bytes as files_of_this_process
from ray_peft.tasks.text_to_image.task import TextToImage


@pytest.fixture
def folders(tiny_painter, paintings, tmp_path):
    files_of_this_process.cache_clear()
    model, images = shutil.copytree(tiny_painter, tmp_path / "m"), shutil.copytree(paintings, tmp_path / "p")
    yield model, images
    files_of_this_process.cache_clear()


def spec(folders, **changes) -> TrialSpec:
    return TrialSpec.from_plain(tiny_diffusion.plain_spec(*folders, **changes))


def content(folders) -> str | None:
    return TextToImage().content(spec(folders))


def one_byte(file):
    """Another last byte, and all else of the file as it was."""
    stat, old = file.stat(), file.read_bytes()
    file.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    files_of_this_process.cache_clear()


NAMES = [
    "unet/config.json", "unet/*.safetensors", "vae/config.json", "vae/*.safetensors", "text_encoder/*.safetensors",
    "scheduler/*.json", "tokenizer/*.json", "model_index.json",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_part_of_the_pipeline_counts(folders, name):
    before = content(folders)
    assert content(folders) == before is not None
    one_byte(next(iter(folders[0].glob(name))))
    assert content(folders) != before


def test_images_captions_and_linked_folders_count(folders, tmp_path):
    images = folders[1]
    contents = [content(folders)]
    one_byte(sorted(images.glob("*.png"))[0] if list(images.glob("*.png")) else sorted(images.glob("*.jpg"))[0])
    contents.append(content(folders))
    one_byte(images / "metadata.jsonl")
    contents.append(content(folders))
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "more.txt").write_text("a caption")
    (images / "linked").symlink_to(tmp_path / "beside", target_is_directory=True)
    contents.append(content(folders))
    (tmp_path / "beside" / "more.txt").write_text("Another one")
    contents.append(content(folders))
    assert len(set(contents)) == 5


def test_a_fingerprint_is_of_the_model_alone(folders):
    model = spec(folders).model
    before = TextToImage().model_content(model)
    one_byte(folders[1] / "metadata.jsonl")
    assert TextToImage().model_content(model) == before
    (folders[0] / "unet" / "config.json").write_text(json.dumps({}))
    assert TextToImage().model_content(model) != before


def test_what_is_not_here_has_no_content(folders, tmp_path):
    assert TextToImage().content(spec((tmp_path / "none", folders[1]))) is None
    assert TextToImage().content(spec((folders[0], "someone/paintings"))) is None
