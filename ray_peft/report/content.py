"""What stands in a report, in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_peft.metrics.scores import Sample
from ray_peft.report import benchmarks, facts, gallery, plots, quality, training
from ray_peft.report.advice import advice
from ray_peft.report.document import Block, Document, Figure, Prompt, Section
from ray_peft.report.material import Material
from ray_peft.report.table import Row, seed_groups


def build(material: Material) -> Document:
    """The report of a sweep; sections without content are left out."""
    rows = material.rows
    sections: list[tuple[str, Sequence[Block]]] = [
        ("Recommendation", advice(material)),
        ("Scores", quality.scores(rows, material.intervals, material.loss_intervals)),
        ("Images", gallery.images(material)),
        ("Which differences are shown", quality.differences(material.families, material.left_out)),
        ("Over seeds", quality.over_seeds(seed_groups(rows))),
        ("Further benchmarks", benchmarks.further(rows, material.benchmark_questions, material.units)),
        ("Quality against cost", _figures(plots.quality_against_cost(material))),
        ("Training metrics", training.metrics(rows)),
        ("Loss over steps", [*training.dynamics(material), *_figures(plots.losses(material))]),
        ("Between stages", training.boundaries(rows)),
        ("Ensembles", training.ensembles(rows)),
        ("Resources", [*training.resources(rows), *_figures(plots.resources(material))]),
        ("How the base is held", training.base_held(rows)),
        ("Storage by dtype", training.storage(rows)),
        ("Settings that differ", facts.settings(rows)),
        ("Trials that did not finish", facts.unfinished(rows)),
        ("Trials that were not run", facts.not_run(material)),
        ("Samples", _samples(rows, material.samples)),
        ("Machine and versions", facts.machine(rows)),
        ("How to run it again", facts.rerun(rows)),
    ]
    return Document(
        material.title,
        tuple(facts.head(material)),
        tuple(Section(title, tuple(blocks)) for title, blocks in sections if blocks),
    )


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
