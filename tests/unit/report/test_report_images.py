"""Reports of text_to_image sweeps: columns, paired losses, the gallery, how the base is held."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace

import example_images
import pytest
from page import Page
from PIL import Image

from ray_peft.metrics.intervals import mean_difference
from ray_peft.metrics.scores import ImageFile, Scores
from ray_peft.report import gallery
from ray_peft.report.document import Gallery
from ray_peft.report.files import write_report
from ray_peft.report.material import Material
from ray_peft.report.plain import console_table, trial_line
from ray_peft.report.table import rows
from ray_peft.spec import TrialSpec
from ray_peft.store.results_file import read_results
from ray_peft.trial.result import Provenance, TrialResult


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    folder = example_images.build(tmp_path_factory.mktemp("painted"))
    write_report(folder)
    return folder


def material(seeds=(42,), methods=tuple(example_images.KINDS), count=example_images.HELD_OUT, **more):
    results = [_result(method, seed) for method in methods for seed in seeds]
    given = [example_images.losses(method, seed)[:count] for method in methods for seed in seeds]
    losses = {result.trial_id: found for result, found in zip(results, given, strict=True)}
    return Material(title="t", results=results, losses=losses, **more)


def _result(method, seed):
    trial = example_images.spec(method, seed)
    found = example_images.losses(method, seed)
    return TrialResult(
        trial_id=trial.trial_id, status="finished", spec=trial, provenance=Provenance(data_key="d"),
        scores=Scores(eval_loss=sum(found) / len(found)),
    )  # fmt: skip


def section(text, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL).group(1)


def test_columns_of_text_are_left_out_and_those_of_images_are_there(painted):
    text = (painted / "report.md").read_text()
    for name in ("BLEU-4", "ROUGE-L", "Tokens/s"):
        assert name not in text
    header = section(text, "Scores").strip().splitlines()[0]
    assert "Style, held out" in header
    assert "Nearest painting" in header
    assert "Images/s | Steps/s (it/s)" in section(text, "Resources")
    assert "On disk" in section(text, "Resources")
    assert "Steps/s (it/s)" in section(text, "Training metrics")
    assert "200 steps of 4 images a step" in text
    assert "Gram matrices" in section(text, "Scores")


def test_the_console_shows_style_and_speed_of_images(painted):
    results = read_results(painted)
    text = console_table(results)
    assert text.splitlines()[0].split()[:6] == ["trial", "status", "eval", "loss", "vs", "base"]
    assert all(word in text.splitlines()[0] for word in ("style", "nearest", "images/s", "it/s"))
    assert "BLEU" not in text
    assert "tokens" not in text
    assert max(map(len, text.splitlines())) <= 118
    assert text.isascii()
    assert "style 0.8400" in trial_line(results[2], 3, 4)


def test_differences_of_losses_to_the_base_have_paired_intervals(painted):
    found = material()
    lora, none = (example_images.losses(method) for method in ("lora", "none"))
    by_method = {row.result.spec.method.name: row for row in found.rows}
    expected = mean_difference(lora, none)
    # Three rows have this base, and the others' p-values are no smaller.
    assert found.loss_intervals[by_method["lora"].trial_id] == replace(expected, p=3 * expected.p)
    assert expected.high < 0
    assert by_method["none"].trial_id not in found.loss_intervals
    line = next(
        line for line in section((painted / "report.md").read_text(), "Scores").splitlines() if "| lora" in line
    )
    assert f"{expected.difference:+.4f}" in line
    assert re.search(r"\\\[-0\.01\d+, -0\.00\d+\\\]", line)


def test_rows_with_losses_are_compared_pair_by_pair(painted):
    found = material()
    (family,) = found.families
    place = {unit.label: index for index, unit in enumerate(family.units)}
    assert (family.measure, family.rows, family.paired) == ("eval_loss", 12, True)
    assert len(family.pairs) == 6
    # None and lora differ by 0.010, more than the 0.0014 that their noise adds to a single image.
    assert family.better(place["lora"], place["none"])
    assert not family.better(place["none"], place["lora"])
    assert all(one.low <= value <= one.high for value, one in zip(family.values, family.intervals, strict=True))
    text = (painted / "report.md").read_text()
    assert "difference in held-out loss over 12 rows" in text
    assert "Held-out losses have no interval" not in text
    assert "timesteps and noise for all candidates" in section(text, "Rules of the recommendation")
    assert "No answers are on file" not in text


def test_few_images_and_touching_seeds_show_nothing():
    (few,) = material(count=5).families
    assert few.paired
    assert not any(few.better(a, b) for a in range(4) for b in range(4))
    apart = material(methods=("none", "lora"), seeds=(1, 2))
    (family,) = apart.families
    assert [unit.label for unit in family.units] == ["lora", "none"]
    assert family.better(0, 1)
    # The same losses row by row, but one seed of lora as poor as the base: the ranges touch.
    worst = apart.results[-1].model_copy(
        update={"scores": apart.results[-1].scores.model_copy(update={"eval_loss": apart.results[0].scores.eval_loss})}
    )
    touching = Material(title="t", results=[*apart.results[:-1], worst], losses=apart.losses)
    assert not any(touching.families[0].better(a, b) for a in range(2) for b in range(2) if a != b)


def test_without_losses_the_margin_decides_and_other_counts_give_no_interval(caplog):
    found = material()
    bare = Material(title="t", results=found.results)
    (family,) = bare.families
    assert (family.paired, family.pairs, bare.loss_intervals) == (False, {}, {})
    first = next(iter(found.losses))
    odd = Material(title="t", results=found.results, losses={**found.losses, first: found.losses[first][:5]})
    assert odd.loss_intervals == {}
    assert "no interval: 12 losses, and 5 of the base row" in caplog.text


def test_how_training_weighs_its_loss_does_not_part_families():
    plain = example_images.spec("lora").plain()
    plain["train"] |= {"snr_gamma": 5.0}
    other = TrialSpec.from_plain(plain)
    first = _result("lora", 42)
    second = first.model_copy(update={"trial_id": other.trial_id, "spec": other})
    given = example_images.losses("lora")
    found = Material(title="t", results=[first, second], losses={first.trial_id: given, second.trial_id: given})
    (family,) = found.families
    assert family.pairs[0, 1].quality.difference == 0
    assert family.tiers() == [[0, 1]]


def test_the_page_holds_small_copies_of_all_images(painted, tmp_path):
    alone = tmp_path / "report.html"
    shutil.copy(painted / "report.html", alone)
    text = alone.read_text(encoding="utf-8")
    page = Page(text)
    images = [link for link in page.links if not link.startswith("#")]
    assert len(images) == 4 * 4  # trials, and prompts with seeds
    for image in images:
        kind, data = image.split(",")
        assert kind == "data:image/jpeg;base64"
        small = Image.open(io.BytesIO(base64.b64decode(data)))
        assert (small.format, small.size) == ("JPEG", (256, 256))
    assert text.isascii()
    assert "link" not in page.tags
    assert 'alt="lora: a wheat field with &lt;b&gt;crows&lt;/b&gt; | and `sky`, seed 7"' in text
    markdown = (painted / "report.md").read_text(encoding="utf-8")
    assert page.headings == re.findall("^## (.*)$", markdown, re.MULTILINE)


def test_markdown_links_every_image_with_the_base_first(painted):
    text = section((painted / "report.md").read_text(), "Images")
    links = re.findall(r"\]\((trials/[^)]*)\)", text)
    assert len(links) == 16
    assert all((painted / link).is_file() for link in links)
    header = text.strip().splitlines()[0]
    assert [cell.strip() for cell in header.strip("|").split("|")][:2] == ["Prompt", "none"]
    assert len({line.count(" | ") for line in text.splitlines() if "trials/" in line and line.startswith("|")}) == 1
    assert "grid.png" in text
    nearest = next(line for line in text.splitlines() if "| full | a wheat" in line)
    assert "vg_007.jpg | 0.3800" in nearest


def test_without_a_row_of_the_base_what_a_trial_kept_of_it_comes_first(tmp_path):
    folder = example_images.build(tmp_path, methods=("lora", "qlora"))
    write_report(folder)
    text = section((folder / "report.md").read_text(), "Images")
    assert "| Prompt | without fine-tuning (before lora) | lora | qlora |" in text
    assert text.count("_before.png") == 4


def test_a_page_has_at_most_so_many_images_and_says_what_it_leaves_out(monkeypatch):
    monkeypatch.setattr(gallery, "MOST", 9)
    found = material()
    made = [ImageFile(prompt=f"prompt {n}", seed=0, file=f"p0{n}_s0.png") for n in range(5)]
    full = Material(title="t", results=found.results, images={row.trial_id: made for row in found.rows})
    block, text, *_ = gallery.images(full)
    assert isinstance(block, Gallery)
    assert [len(pictures) for _, pictures in block.lines] == [4, 4]
    assert "Shown are 8 of 20 images" in text.text
    monkeypatch.setattr(gallery, "MOST", 3)  # not even one whole line
    block, text, *_ = gallery.images(full)
    assert [len(pictures) for _, pictures in block.lines] == [3]
    assert "Shown are 3 of 20 images" in text.text


def test_a_missing_or_broken_image_is_said_and_the_report_is_whole(tmp_path, caplog):
    folder = example_images.build(tmp_path, methods=("none", "lora"))
    first, second = (folder / "trials" / result.trial_id / "images" for result in read_results(folder))
    (first / "p00_s0.png").unlink()
    (second / "p00_s0.png").write_bytes(b"no image")
    write_report(folder)
    text = (folder / "report.html").read_text()
    assert text.count("not found: trials/") == 2
    assert len([link for link in Page(text).links if link.startswith("data:")]) == 6
    assert caplog.text.count("not shown in the report") == 2


def test_how_the_base_is_held(painted):
    text = section((painted / "report.md").read_text(), "How the base is held")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert lines[0] == ["Trial", "bfloat16", "nf4", "Together"]
    assert ["qlora", "1.10 GiB", "123.98 MiB", "1.22 GiB"] in lines
    assert ["lora", "1.60 GiB", "-", "1.60 GiB"] in lines
    assert "matrix products only" in text
    assert "270.0 of the UNet's 859.5 million" in text


def test_seeds_of_images_have_no_columns_of_text(tmp_path):
    folder = example_images.build(tmp_path, methods=("none", "lora"), seeds=(1, 2))
    write_report(folder)
    text = (folder / "report.md").read_text()
    header = next(line for line in section(text, "Over seeds").splitlines() if line[:1] == "|")
    assert "Style, held out" in header
    assert "BLEU-4" not in header
    assert "ROUGE-L" not in text
    assert "style" in console_table(read_results(folder)).split("\n\n")[1].splitlines()[0]


def test_old_rows_still_load(painted):
    line = json.loads((painted / "results.jsonl").read_text().splitlines()[0])
    del line["storage"], line["scores"]["style_heldout"], line["usage"]["images_per_s"], line["usage"]["train_images"]
    (row,) = rows([TrialResult.from_plain(line)])
    assert (row.style_heldout.value, row.result.storage) == (None, {})
