"""report.md: numbers and marks by hand; any text survives being rendered."""

import random
import re

import pytest

from ray_peft.metrics.scores import Sample, Scores
from ray_peft.report.content import build
from ray_peft.report.escape import entry, fenced, inline, paragraphs, table
from ray_peft.report.markdown import to_markdown
from ray_peft.report.material import Material
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import Provenance, TrialResult, Usage

markdown_it = pytest.importorskip("markdown_it")

NASTY = [
    "a|b",
    "`code` and ``more``",
    "```python\nprint('x')\n```",
    "````\n~~~\n````",
    "<b>bold</b> <script>alert(1)</script> &amp; &lt;",
    "# heading\n> quote\n- list\n1. one\n1) one\n    indented\n===\n---",
    "*a* _b_ __c__ ~~d~~ [e](f) ![g](h) \\| \\\\ \\` \\",
    "snake_case and _x_y_ 2*3*4",
    "  two  spaces  \n\n\ttab  ",
    "",
    "\n",
    "| a | b |\n|---|---|\n| c | d |",
    "模型 \N{SNOWMAN} é \u2028 end",
    "<!-- comment",
    "$x$ + $$y$$ https://a.b/c_d",
    "+ plus",
    "[ref]: http://x",
]


def tokens(text):
    return markdown_it.MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(text)


def shown(inline_token):
    """What a reader sees of inline content."""
    assert {child.type for child in inline_token.children} <= {"text", "text_special", "softbreak"}
    return "".join("\n" if child.type == "softbreak" else child.content for child in inline_token.children)


def folded(text):
    return re.sub("[ \t\r\n]+", " ", text).strip(" ")


def nasty_texts():
    rng = random.Random(0)
    drawn = ["".join(rng.choices("|`\\<>*_~[]()#-+=!&;$1. ab\n", k=rng.randrange(1, 30))) for _ in range(300)]
    return NASTY + drawn


@pytest.mark.parametrize("text", nasty_texts())
def test_any_text_survives(text):
    (fence,) = tokens(fenced(text))
    assert fence.type == "fence"
    assert fence.content == f"{text}\n"
    cells = [t for t in tokens(table(["h", "i"], [[inline(text), "x"]])) if t.type == "inline"]
    assert [shown(cell) for cell in cells] == ["h", "i", folded(text), "x"]
    inside = tokens(f"- {entry(text)}\n- next")
    assert sum(t.type == "list_item_open" for t in inside) == 2
    assert [shown(t) for t in inside if t.type == "inline"][-2:] == [folded(text), "next"][-2 if folded(text) else -1 :]
    lines = [shown(t) for t in tokens(paragraphs(text)) if t.type == "inline"]
    assert "\n".join(lines).split() == text.split()
    heading = tokens(f"# {inline(text)}")
    assert heading[0].type == "heading_open"
    assert shown(heading[1]) == folded(text)


def trial(method, *, seed=42, status="finished", error=None, usage=(), scores=(), **more):
    spec = TrialSpec.from_plain(
        {
            "model": {"name": "org/tiny"},
            "data": {"sources": [{"recipe": "alpaca", "path": "a.jsonl", "train": 90, "test": 10}]},
            "method": {"name": method},
            "train": {"steps": 10},
            "seed": seed,
        }
    )
    return TrialResult(
        trial_id=spec.trial_id,
        status=status,
        spec=spec,
        error=error,
        scores=Scores(**dict(zip(("eval_loss", "bleu4", "rouge_l"), scores, strict=False))),
        usage=Usage(**dict(usage)),
        **more,
    )


def written(results, samples=None, **more):
    more = {"title": "A sweep", "description": "Which?"} | more
    return to_markdown(build(Material(results=results, samples=samples or {}, **more)))


def section(text, name):
    return text.split(f"## {name}\n\n")[1].split("\n\n## ")[0]


def cells(text, name):
    """The lines of a section's table, by first cell."""
    found = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in section(text, name).splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in found}


def test_scores_and_resources_by_hand():
    usage = {"peak_allocated_gib": 1.507, "peak_reserved_gib": 2.0, "train_s": 61.34, "wall_time_s": 90.0}
    results = [
        trial("none", scores=(2.5, 0.0582, 0.1632)),
        trial(
            "qlora",
            scores=(2.0, 0.1112, 0.2326),
            usage=usage | {"tokens_per_s": 1234.4, "steps_per_s": 0.163},
            trainable_parameters=13_045_760,
            total_parameters=999_885_952,
            adapter_bytes=41_600_000,
            train_loss_final=1.9,
            eval_loss_best=1.95,
        ),
        trial("full", status="out_of_memory", error="CUDA <out> of memory\nTraceback"),
    ]
    text = written(results, notes=["90 rows read, 3 dropped"])
    scores = cells(text, "Scores")
    assert list(scores) == ["Trial", ":---", "qlora", "none", "full"]
    assert scores["none"][:7] == ["finished", "2.5000", "-", "0.0582", "-", "0.1632", "-"]
    assert scores["full"][:2] == ["out of memory", "-"]
    assert scores["qlora"][1:] == [
        "2.0000",
        "-0.5000 (-20.0 %)",
        "0.1112",
        "+0.0530 (+91.1 %)",
        "0.2326",
        "+0.0694 (+42.5 %)",
        "1.9000",
        "1.9500",
    ]
    resources = cells(text, "Resources")["qlora"]
    assert resources[:2] == ["1.51 / 2.00", "61.3"]
    assert resources[5:] == ["90.0", "1234", "0.163", "13,045,760 (1.30 %)", "39.67 MiB"]
    assert section(text, "Trials that did not finish").endswith(": out of memory: CUDA \\<out\\> of memory")
    assert "- 90 rows read, 3 dropped" in text
    assert "- Trials: 3 (2 finished, 1 out of memory)" in text
    assert "- Data: alpaca: 90 for training, 10 held out" in text
    assert "tied" not in section(text, "Scores")


def test_intervals_and_ties():
    references = [f"the cat number {i} sat on the red mat today" for i in range(40)]
    base = [f"the cat number {i} is here" for i in range(40)]
    answers = {"none": base, "lora": references, "qlora": base[:39] + [base[39] + " x"], "full": references}
    results = [trial("none", scores=(2.5, 0.0, 0.4)), *(trial(m, scores=(2.0, 0.1, 0.5)) for m in list(answers)[1:])]
    by_id = {r.trial_id: (answers[r.spec.method.name], references) for r in results}
    by_id[results[-1].trial_id] = (answers["full"], ["other", *references[1:]])
    scores = cells(written(results, answers=by_id), "Scores")
    # A perfect answer has ROUGE-L 1; the base shares 4 of its 6 and of the 10 reference words: 2 * 4 / 16 = 0.5.
    assert scores["lora"][6] == "+0.1000 (+25.0 %) \\[+0.5000, +0.5000\\]"
    assert scores["qlora"][6].endswith("tied with base")
    assert scores["qlora"][4].endswith("tied with base")
    assert "tied" not in scores["full"][6]
    assert "\\[" not in scores["full"][6]


def test_seeds_are_aggregated_beside_the_single_rows():
    results = [trial("lora", seed=s, scores=(float(s), 0.1 * s, 0.2 * s)) for s in (1, 2)]
    text = written([trial("none", seed=1, scores=(4.0, 0.1, 0.2)), *results])
    assert list(cells(text, "Scores"))[2:] == ["lora seed=1", "lora seed=2", "none seed=1"]
    line = cells(text, "Over seeds")["lora"]
    assert line[:3] == ["2 of 2", "1.5000 (1.0000 to 2.0000)", "-2.5000 (-3.0000 to -2.0000)"]


def test_samples_stand_side_by_side_and_intact():
    results = [trial("lora"), trial("none")]
    samples = {
        r.trial_id: [
            Sample(row=i, source_dataset="a_b", prompt=f"{text}?", reference=text, answer=f"{text} {r.trial_id}")
            for i, text in enumerate(NASTY)
        ]
        for r in results
    }
    text = written(results, samples)
    fences = [t.content for t in tokens(text.split("## Samples")[1].split("\n## How to run")[0]) if t.type == "fence"]
    wanted = []
    for nasty in NASTY:
        wanted += [f"{nasty}?\n", f"{nasty}\n", f"{nasty} {results[1].trial_id}\n", f"{nasty} {results[0].trial_id}\n"]
    assert fences == wanted


def test_settings_that_differ_and_how_to_run_again():
    results = [trial("lora", seed=1), trial("galore", seed=2)]
    text = written(results)
    settings = cells(text, "Settings that differ")
    assert "rank=16, alpha=32.0" in settings["lora seed=1"][1]
    assert [line[2] for line in settings.values()][2:] == ["seed=1", "seed=2"]
    assert f"row['trial_id'] == '{results[0].trial_id}'" in section(text, "How to run it again")


def test_machine_and_versions():
    made = [
        Provenance(
            device="NVIDIA H200", versions={"torch": "2.11.0", "peft": "0.21.0"}, started_at="2026-01-02T00:00:00Z"
        ),
        Provenance(device="NVIDIA H200", versions={"torch": "2.12.0"}, started_at="2026-01-01T00:00:00Z"),
    ]
    text = section(
        written(
            [trial("lora", provenance=made[0]), trial("none", provenance=made[1]), trial("full", status="failed")],
        ),
        "Machine and versions",
    )
    assert "- Device: NVIDIA H200\n" in text
    assert "- Versions: peft 0.21.0, torch 2.12.0; 2.11.0" in text
    assert "- Started: 2026-01-01T00:00:00Z to 2026-01-02T00:00:00Z" in text


def test_planned_trials_that_were_not_run_are_listed():
    result = trial("lora")
    text = written([result], planned=[result.trial_id, "galore-1", "full-2"])
    assert section(text, "Trials that were not run") == "- galore-1\n- full-2"


def test_an_empty_sweep_has_a_report():
    text = written([], title="# *odd*", description="a\n\n- b")
    assert text == "# \\# \\*odd\\*\n\na\n\n\\- b\n\nNo trial has a result.\n"


def test_one_trial_alone():
    text = written([trial("lora", scores=(1.0,), usage={"peak_rss_gib": 1.25})])
    assert cells(text, "Scores") == {
        "Trial": ["Status", "Eval loss"],
        ":---": [":---", "---:"],
        "lora": ["finished", "1.0000"],
    }
    assert cells(text, "Resources")["lora"][0] == "1.25"
    assert text.isascii()
