"""report.html: one whole, closed file in which data stays data; the same values as report.md."""

import re
import shutil

import example_sweep
from page import Page

from ray_peft.report.document import Bullets, Document, Figure, Paragraph, Prompt, Section, Table
from ray_peft.report.files import write_report
from ray_peft.report.script import SCRIPT
from ray_peft.report.webpage import inline_svg, to_html


def test_the_whole_page(swept):
    text = (swept / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert {"table", "svg", "details", "nav", "style"} <= page.tags
    assert not {"link", "iframe", "object", "img"} & page.tags
    assert re.findall(r"<script>\n(.*?)\n</script>", text, re.DOTALL) == [SCRIPT]
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    assert not re.search(r"@import|url\((?!#)|<script(?!>\n\"use strict\")|javascript:|\bfetch\(|XMLHttp", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    # The hostile answer is there, as text.
    assert any(example_sweep.HOSTILE in data for data in page.text)
    markdown = (swept / "report.md").read_text(encoding="utf-8")
    assert page.headings == re.findall("^## (.*)$", markdown, re.MULTILINE)
    assert page.headings[:4] == ["Answer", "Recommendation", "Row by row", "Loss over steps"]
    assert text.isascii()


def test_both_files_hold_the_same_numbers(swept):
    def numbers(text):
        return set(re.findall(r"[+-]?\d+\.\d+", text))

    # The rows one by one, with a score each, are in the page alone.
    page = Page(
        re.sub(
            r'<div class="list".*?</div>\n</div>\n', "</div>\n", (swept / "report.html").read_text(), flags=re.DOTALL
        )
    )
    on_the_page = numbers(
        " ".join(data for data in page.text if data.strip() and "--c0" not in data and SCRIPT not in data)
    )
    assert on_the_page == numbers((swept / "report.md").read_text().replace("\\", ""))
    assert len(on_the_page) > 200


def test_hostile_text_in_every_place():
    bad = "</title></style><script>alert(1)</script>\"'&lt;\x00\x1b"
    document = Document(
        bad,
        (Paragraph(bad),),
        (
            Section(
                bad,
                (
                    Bullets((bad,)),
                    Table(header=(bad, bad), lines=((bad, bad),), folded=True),
                    Prompt(title=bad, prompt=bad, reference=bad, answers=((bad, bad),)),
                ),
            ),
        ),
    )
    text = to_html(document)
    page = Page(text)
    assert text.count("<script") == 1
    shown = bad.replace("\x00", "\N{REPLACEMENT CHARACTER}").replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    assert sum(data.strip("\n") == shown for data in page.text) >= 12
    assert "\x00" not in text


def test_text_of_answers_is_not_changed():
    odd = "\n  two  spaces\n\n模型 \N{SNOWMAN}\n"
    text = to_html(
        Document("t", (), (Section("S", (Prompt(title="r", prompt="p", reference="r", answers=(("a", odd),)),)),))
    )
    # A reader drops the first line end after <pre>, so one more than the text has.
    assert f"<pre>\n{odd}</pre>" in text


def test_an_inline_plot_belongs_to_the_page():
    svg = (
        '<?xml version="1.0"?><!DOCTYPE svg><svg xmlns="http://www.w3.org/2000/svg" width="5pt" height="6pt" '
        'viewBox="0 0 5 6"><metadata>x</metadata><defs><style type="text/css">*{a:b}</style></defs>'
        '<g id="a"><path id="b" style="fill: #0072b2; clip-path: url(#a)"/><use xlink:href="#b"/></g></svg>'
    )
    found = inline_svg(Figure(name="one", title='a "b"', svg=svg))
    assert found.startswith('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 5 6" role="img" aria-label="a &quot;')
    for wanted in ('id="one-a"', 'id="one-b"', "url(#one-a)", 'xlink:href="#one-b"'):
        assert wanted in found
    assert "#0072b2" not in found
    assert "var(--c" in found
    assert "<style" not in found
    assert "<metadata" not in found


def test_a_killed_sweep_has_a_page(tmp_path, swept):
    shutil.copy(swept / "sweep.json", tmp_path)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "losses.svg").write_text("old")
    paths = write_report(tmp_path)
    assert [path.name for path in paths] == ["report.md", "report.html", "report.csv"]
    page = Page(paths[1].read_text())
    assert "No trial has a result." in page.text
    assert "galore-notrun1" in page.text
    assert not list((tmp_path / "plots").iterdir())
