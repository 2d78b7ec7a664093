"""The sections of a report and their order: the answer, what it rests on, and an appendix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_peft.metrics.scores import Sample
from ray_peft.report import benchmarks, checked, facts, gallery, plots, quality, training
from ray_peft.report.advice import reasons, rules
from ray_peft.report.answer import answer, answer_table
from ray_peft.report.digits import duration, percent
from ray_peft.report.document import Block, Bullets, Document, Figure, Heading, Paragraph, Prompt, Section, Table
from ray_peft.report.material import Material
from ray_peft.report.preferences import preferences
from ray_peft.report.quality_plots import quality_against_cost
from ray_peft.report.rowwise import row_by_row
from ray_peft.report.table import Row, seed_groups
from ray_peft.report.ties import heading
from ray_peft.report.timeline import STOPPED_S, Lane, lanes
from ray_peft.report.timeline_plot import timeline


def build(material: Material) -> Document:
    """The report of a sweep; sections without content are left out."""
    rows = material.rows
    groups = seed_groups(rows)
    main: list[tuple[str, Sequence[Block]]] = [
        ("Answer", _answer(material)),
        ("Recommendation", reasons(material)),
        ("Preferences", preferences(rows, material.rewards)),
        ("Images", gallery.images(material)),
        ("Row by row", row_by_row(material)),
        ("Loss over steps", [*_figures(plots.losses(material)), *training.dynamics(material)]),
        ("When each trial ran", _ran(material)),
        ("Settings that differ", [*facts.comparison(rows), *facts.settings(rows)]),
    ]
    appendix: list[tuple[str, Sequence[Block]]] = [
        ("What was compared", facts.compared(material)),
        ("Scores", quality.scores(rows, material.intervals, material.loss_intervals)),
        ("Which differences are shown", quality.differences(material.families, material.left_out)),
        ("Over seeds", quality.over_seeds(groups)),
        ("Checks of the answers", checked.checks(material)),
        ("Further benchmarks", benchmarks.further(rows, material.benchmark_questions, material.main_units)),
        ("Training metrics", training.metrics(rows)),
        ("Between stages", training.boundaries(rows)),
        ("Ensembles", training.ensembles(rows)),
        ("Resources", [*training.resources(rows), *_figures(plots.resources(material))]),
        ("How the base is held", training.base_held(rows)),
        ("Storage by dtype", training.storage(rows)),
        ("Trials that did not finish", facts.unfinished(rows)),
        ("Trials that were not run", facts.not_run(material)),
        ("Samples", _samples(material.main_rows, material.samples)),
        ("Rules of the recommendation", [block for block in rules(material) if not isinstance(block, Heading)]),
        ("Machine and versions", facts.machine(rows)),
        ("How to run it again", facts.rerun(rows)),
    ]
    sections = [Section(title, tuple(blocks)) for title, blocks in main if blocks]
    sections += [Section(title, tuple(blocks), appendix=True) for title, blocks in appendix if blocks]
    return Document(material.title, tuple(facts.head(material)), tuple(sections))


def _answer(material: Material) -> list[Block]:
    """The answer, a picture of it and one table; of several comparisons one of each."""
    families = [family for family in material.families if len(family.units) > 1]
    lines = answer(material)
    blocks: list[Block] = [Bullets(lines)] if lines else []
    figures = quality_against_cost(material)
    if len(families) == 1:
        return [*blocks, *figures, answer_table(families[0])]
    for number, family in enumerate(families, 1):
        blocks += [Heading(heading(family, number, families)), answer_table(family)]
    return [*blocks, *figures]


def _ran(material: Material) -> list[Block]:
    """The timeline, and how long each device was idle."""
    ran = lanes(material.rows)
    if not ran:
        return []
    end = max(span.end_s for lane in ran for span in lane.spans)
    lines = tuple(
        (
            lane.name,
            str(len(lane.spans)),
            duration(lane.busy_s),
            percent(lane.busy_s / end if end else None, 1),
            duration(max((stop - start for start, stop in gaps), default=0.0)),
        )
        for lane in ran
        for gaps in [lane.gaps(end)]
    )
    header = ("Where", "Trials", "Busy", "Of the whole time", "Longest time without a trial")
    return [*_figures(timeline(ran)), Table(header=header, lines=lines, fits=True), *_how_timed(ran)]


def _how_timed(ran: Sequence[Lane[Row]]) -> list[Block]:
    rows = [span.trial for lane in ran for span in lane.spans]
    parts = []
    if any(not row.result.provenance.ended_at for row in rows):
        parts.append("Rows of an earlier version do not say when they ended: they end when their seconds are over.")
    parts.append(f"Times in which no trial ran anywhere for {STOPPED_S / 60:.0f} minutes are left out.")
    if any(row.result.resumed_from_step is not None for row in rows):
        parts.append("Of a trial that was interrupted, the last attempt is shown.")
    return [Paragraph(" ".join(parts))] if parts else []


def _figures(figures: Sequence[Figure]) -> list[Block]:
    return list(figures)


def _samples(compared: Sequence[Row], samples: Mapping[str, Sequence[Sample]]) -> list[Block]:
    """Each prompt with its reference and the answers of all trials to it, in the order of the tables."""
    prompts: dict[tuple[int, str, str, str], list[tuple[str, str]]] = {}
    for row in compared:
        for sample in samples.get(row.trial_id, ()):
            key = (sample.row, sample.source_dataset, sample.prompt, sample.reference)
            prompts.setdefault(key, []).append((row.label, sample.answer))
    return [
        Prompt(title=f"Row {number}, {source}", prompt=prompt, reference=reference, answers=tuple(answers))
        for (number, source, prompt, reference), answers in sorted(prompts.items(), key=lambda item: item[0])
    ]
