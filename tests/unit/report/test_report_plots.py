"""Plots: there where there is data, the same each time, legible files."""

import re
import xml.etree.ElementTree as ET

import example_sweep
from answered import POOR, REFERENCES, material, trial

from ray_peft.report import plots
from ray_peft.report.curves import Curve
from ray_peft.report.files import write_report
from ray_peft.report.palette import SERIES, VARIABLES, styles
from ray_peft.report.quality_plots import quality_against_cost


def test_the_plots_of_a_sweep_are_the_same_each_time(swept):
    before = {path.name: path.read_bytes() for path in (swept / "plots").iterdir()}
    names = ["quality.svg", "losses.svg", "timeline.svg", "memory.svg", "time.svg"]
    assert [path.name for path in write_report(swept)[3:]] == names
    assert {path.name: path.read_bytes() for path in (swept / "plots").iterdir()} == before
    markdown = (swept / "report.md").read_text()
    for name, content in before.items():
        assert f"](plots/{name})" in markdown
        ET.fromstring(content)
        assert b"<dc:date>" not in content
        # Every colour is one that a dark page can exchange.
        assert set(re.findall(r"#[0-9a-f]{6}\b", content.decode())) <= set(VARIABLES), name


def test_no_data_no_plot():
    found = material([(trial("lora"), None)])
    assert plots.losses(found) == quality_against_cost(found) == []
    assert [figure.name for figure in plots.resources(found)] == []
    one = material([(trial("lora", memory=1.0), POOR)])
    assert quality_against_cost(one) == []
    assert [figure.name for figure in plots.resources(one)] == ["memory", "time"]


def test_odd_values_and_labels_can_be_drawn():
    result = trial("lora", memory=1.0)
    other = trial("full", memory=2.0, model={"tokenizer": "$a_b<&"})
    found = material([(result, POOR), (other, REFERENCES)])
    points = ((1, 2.0), (2, float("nan")), (3, float("inf")), (4, 1.0))
    object.__setattr__(found, "curves", {result.trial_id: Curve(train=points), other.trial_id: Curve(train=points[:1])})
    (figure,) = plots.losses(found)
    ET.fromstring(figure.svg)
    for figure in (*quality_against_cost(found), *plots.resources(found)):
        ET.fromstring(figure.svg)


def test_many_rows_have_different_styles():
    found = [(style.colour, style.line, style.marker) for style in styles(25, base=3)]
    assert len(set(found)) == 25
    assert found[3][0] not in SERIES


def test_the_end_of_a_stage_is_marked(swept):
    text = (swept / "plots" / "losses.svg").read_text()
    # Glyphs are drawn as paths, with their text in a comment.
    assert text.count("<!-- qlora_galore: next stage -->") == 2


def test_seeds_are_dots_beside_their_mean(swept):
    assert "each seed and their mean" in (swept / "plots" / "memory.svg").read_text()
    assert "out of memory" in (swept / "plots" / "memory.svg").read_text()
    assert example_sweep.KINDS.keys() <= set(
        re.findall("<!-- (.*?) -->", (swept / "plots" / "time.svg").read_text())
    ) | {"lora"}
