"""Sections on scores: against the base, between all rows, over seeds."""

from collections.abc import Callable, Mapping, Sequence

from ray_peft.metrics.intervals import DifferenceInterval
from ray_peft.report.columns import Column, Read, row_table
from ray_peft.report.digits import MISSING, fixed, percent, spread_text
from ray_peft.report.document import Block, Heading, Paragraph, Table
from ray_peft.report.table import Row, Score, SeedGroup
from ray_peft.report.ties import FEWEST_ROWS, Family, heading
from ray_peft.report.uncertainty import Intervals

_TIES = (
    "Each pair of rows is compared on the held-out rows that both {did}: difference in {measure} over {rows} rows, "
    "with its 95 % interval (Student's t of the differences of single rows). A difference is shown if a permutation "
    "test of their signs rejects equality, corrected for all {pairs} pairs (Holm), and the interval leaves out zero; "
    "else the rows are tied: no difference that these rows can show. Of equally good rows, any pair is told apart in "
    "at most one of twenty such comparisons. Tiers: first the rows that none is shown to be better than, then the rows "
    "that only those of the tiers before are shown to be better than, and so on. Inside a tier nothing is ranked: the "
    "order is that of this report. A row may be tied with rows of another tier, too; the second table says of each "
    "pair."
)
_SEEDS = (
    " A row with several seeds is the mean over them, seed by seed beside the seeds of the other row. Intervals are "
    "over held-out rows and seeds (variances of crossed random effects, Student's t); those of a row with one seed "
    "are over rows alone."
)
_LOSS_SEEDS = (
    " A row with several seeds is the mean over them, seed by seed beside the seeds of the other row. Intervals of "
    "losses are over held-out rows and seeds, those of differences over rows alone."
)
_RANGES = (
    " Losses are of the same {same} for all rows, so these intervals are narrow: a difference counts as shown only if "
    "the ranges over seeds do not touch, either."
)
_FEW = " With fewer than {fewest} held-out rows no difference is shown."
_STYLE = (
    "Style: cosine of centred Gram matrices of the frozen VAE encoder's layers (after Gatys et al. 2016) between made "
    "images and the held-out, or the training, paintings; mean over all pairs, at most 1. It knows textures and "
    "contrasts of colours, not what is depicted: it orders rows, and its size means little. Nearest painting: for each "
    "made image the highest cosine with a training painting, both in squares of 8 pixels and less their mean colours; "
    "mean over images. A copy is 1, so a value near 1 means that paintings were learned by heart."
)
_CUT = (
    "BLEU-4 of {bleu} tokens and ROUGE-L of {rouge}, as the script of the references asks (chosen once for all trials "
    "on the same rows); chrF is of characters."
)
_ROUGE_WORDS = {"rouge_score": "words of a-z and 0-9 (rouge_score)", "unicode": "words of Unicode"}
_NO_FOUR = " BLEU-4 is 0 whatever is answered where no reference has four tokens: read ROUGE-L and chrF there."


def scores(
    compared: Sequence[Row], intervals: Mapping[str, Intervals], losses: Mapping[str, DifferenceInterval] | None = None
) -> list[Block]:
    """Every score with its difference to the base.

    Args:
        compared: the rows.
        intervals: intervals of the text scores, by trial id.
        losses: intervals of the held-out loss, by trial id.
    """
    losses = losses or {}
    bleu = {trial: interval.bleu4 for trial, interval in intervals.items()}
    rouge = {trial: interval.rouge_l for trial, interval in intervals.items()}
    chrf = {trial: interval.chrf for trial, interval in intervals.items()}
    columns: list[Column] = [
        ("Status", lambda row: row.status.replace("_", " ")),
        ("Eval loss", lambda row: fixed(row.eval_loss.value, 4)),
        ("vs base", lambda row: _difference(row.eval_loss, losses.get(row.trial_id))),
        ("BLEU-4", lambda row: fixed(row.bleu4.value, 4)),
        ("vs base", lambda row: _difference(row.bleu4, bleu.get(row.trial_id))),
        ("ROUGE-L", lambda row: fixed(row.rouge_l.value, 4)),
        ("vs base", lambda row: _difference(row.rouge_l, rouge.get(row.trial_id))),
        ("chrF", lambda row: fixed(row.chrf.value, 4)),
        ("vs base", lambda row: _difference(row.chrf, chrf.get(row.trial_id))),
        ("Exact match", lambda row: fixed(row.exact_match, 4)),
        ("F1", lambda row: fixed(row.result.scores.token_f1, 4)),
        *((name, _own(name)) for name in dict.fromkeys(name for row in compared for name in row.result.scores.own)),
        ("General text, loss", lambda row: fixed(row.general_loss.value, 4)),
        ("vs base", lambda row: _difference(row.general_loss)),
        ("Style, held out", lambda row: fixed(row.style_heldout.value, 4)),
        ("vs base", lambda row: _difference(row.style_heldout)),
        ("Style, training", lambda row: fixed(row.style_train.value, 4)),
        ("Nearest painting", lambda row: fixed(row.nearest_train.value, 4)),
        ("Final train loss", lambda row: fixed(row.result.train_loss_final, 4)),
        ("Best eval loss", lambda row: fixed(row.result.eval_loss_best, 4)),
    ]
    blocks = row_table(compared, columns, text_columns=2)
    text = ""
    if any(row.base is not None for row in compared):
        images = compared[0].of_images
        text = "Eval loss: lower is better" + (
            "." if images else "; BLEU-4, ROUGE-L and chrF (0 to 1): higher is better."
        )
        text += " The base is the model without fine-tuning, scored on the same rows."
    if intervals or losses:
        rows = "generated rows" if intervals else "held-out images" if compared[0].of_images else "held-out rows"
        text += (
            f" In brackets: 95 % interval of the difference over the {rows}, row by row."
            ' "Tied with base": a difference that these rows do not show, by the interval and by a permutation test '
            "that is corrected for all rows of a column."
        )
    paragraphs = [text] if text else []
    paragraphs += _cut(compared)
    paragraphs += [_STYLE] if any(row.style_heldout.value is not None for row in compared) else []
    return [*blocks, *(Paragraph(interval) for interval in paragraphs)]


def _own(name: str) -> Read:
    return lambda row: fixed(row.result.scores.own.get(name), 4)


def _cut(compared: Sequence[Row]) -> list[str]:
    """How the texts were cut into tokens, for trials that record it."""
    scored = [
        trial_scores
        for row in compared
        if (trial_scores := row.result.scores).bleu_tokenizer and trial_scores.rouge_tokenizer
    ]
    bleu = dict.fromkeys(trial_scores.bleu_tokenizer or "" for trial_scores in scored)
    rouge = dict.fromkeys(_ROUGE_WORDS[trial_scores.rouge_tokenizer or "rouge_score"] for trial_scores in scored)
    if not scored:
        return []
    text = _CUT.format(bleu=" or ".join(bleu), rouge=" or ".join(rouge))
    if {"char"} & bleu.keys():
        text += " Japanese and Korean are cut into words where MeCab is installed: pip install sacrebleu[ja] or [ko]."
    return [text + (_NO_FOUR if all(not trial_scores.bleu4 for trial_scores in scored) else "")]


def over_seeds(groups: Sequence[SeedGroup]) -> list[Block]:
    """Means over seeds with their range."""
    if not groups:
        return []
    reads: list[tuple[str, int, bool, Callable[[Row], float | None]]] = [
        ("Eval loss", 4, False, lambda row: row.eval_loss.value),
        ("vs base", 4, True, lambda row: row.eval_loss.difference),
        ("BLEU-4", 4, False, lambda row: row.bleu4.value),
        ("vs base", 4, True, lambda row: row.bleu4.difference),
        ("ROUGE-L", 4, False, lambda row: row.rouge_l.value),
        ("vs base", 4, True, lambda row: row.rouge_l.difference),
        ("chrF", 4, False, lambda row: row.chrf.value),
        ("vs base", 4, True, lambda row: row.chrf.difference),
        ("Style, held out", 4, False, lambda row: row.style_heldout.value),
        ("vs base", 4, True, lambda row: row.style_heldout.difference),
        ("Style, training", 4, False, lambda row: row.style_train.value),
        ("Nearest painting", 4, False, lambda row: row.nearest_train.value),
        ("Peak memory [GiB]", 2, False, lambda row: row.peak_memory_gib),
        ("Training [s]", 1, False, lambda row: row.seconds("train_s")),
    ]
    spreads = [
        (name, [spread_text(group.spread(read), places, signed=signed) for group in groups])
        for name, places, signed, read in reads
    ]
    filled = [(name, cells) for name, cells in spreads if set(cells) != {MISSING}]
    lines = tuple(
        (group.label, f"{len(group.finished)} of {len(group.rows)}", *(cells[index] for _, cells in filled))
        for index, group in enumerate(groups)
    )
    header = ("Trials", "Seeds finished", *(name for name, _ in filled))
    return [Paragraph("Mean over the finished seeds (least to greatest)."), Table(header=header, lines=lines)]


def differences(families: Sequence[Family], left_out: Mapping[str, str]) -> list[Block]:
    """Tiers of rows that are tied, and every pair."""
    compared = [family for family in families if family.pairs]
    blocks: list[Block] = []
    for number, family in enumerate(compared, 1):
        if len(compared) > 1:
            blocks.append(Heading(heading(family, number, compared)))
        blocks += _family(family)
    names = [f"{label} ({reason})" for label, reason in left_out.items()]
    return [*blocks, Paragraph(f"Not compared: {', '.join(names)}.")] if blocks and names else blocks


def _family(family: Family) -> list[Block]:
    seeds = max(len(unit.finished) for unit in family.units)
    by_score = family.measure == "rouge_l"
    text = _TIES.format(
        rows=family.rows,
        did="answered" if by_score else "were scored on",
        measure=family.measure_name,
        pairs=len(family.pairs),
    )
    by_loss = family.measure == "eval_loss"
    text += (_LOSS_SEEDS if by_loss else _SEEDS) if seeds > 1 else ""
    evidence = "noise" if family.units[0].rows[0].of_images else "tokens"
    text += _RANGES.format(same=evidence) if by_loss else ""
    text += _FEW.format(fewest=FEWEST_ROWS) if family.rows < FEWEST_ROWS and not by_score else ""
    header = ("Trial", "Tier", family.measure_title, "95 % interval", *(["BLEU-4"] if by_score else []))
    tiers = Table(
        header=header,
        lines=tuple(
            (family.units[place].label, str(number), fixed(family.values[place], 4), _range(family, place), *bleu)
            for number, tier in enumerate(family.tiers(), 1)
            for place in tier
            for bleu in [_bleu(family.units[place]) if by_score else []]
        ),
        text_columns=2,
    )
    return [Paragraph(text), tiers, *_matrix(family), *_pairs(family)]


def _bleu(unit: SeedGroup) -> list[str]:
    return [spread_text(unit.spread(lambda row: row.bleu4.value), 4)]


def _range(family: Family, place: int) -> str:
    interval = family.intervals[place]
    return f"[{fixed(interval.low, 4)}, {fixed(interval.high, 4)}]"


def _matrix(family: Family) -> list[Block]:
    order = [place for tier in family.tiers() for place in tier]
    letters = {place: _letter(index) for index, place in enumerate(order)}
    lines = tuple(
        (f"{letters[row]}: {family.units[row].label}", *(_cell(family, row, column) for column in order))
        for row in order
    )
    name = family.measure_title
    sentence = f"{name} of the row's trial less that of the column's where the difference is shown, else tied."
    return [Paragraph(sentence), Table(header=("Trial", *letters.values()), lines=lines)]


def _letter(index: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    first, last = divmod(index, 26)
    return (_letter(first - 1) if first else "") + chr(ord("A") + last)


def _cell(family: Family, row: int, column: int) -> str:
    if row == column:
        return MISSING
    if not (family.better(row, column) or family.better(column, row)):
        return "tied"
    difference = family.pairs[min(row, column), max(row, column)].quality
    return fixed(difference.difference if row < column else -difference.difference, 4, signed=True)


def _pairs(family: Family) -> list[Block]:
    lines = tuple(
        (
            family.units[first].label,
            family.units[second].label,
            _interval(pair.quality, shown=family.better(first, second) or family.better(second, first)),
            *(
                [_interval(pair.bleu4, shown=pair.bleu4.shown and family.rows >= FEWEST_ROWS)]
                if pair.bleu4 is not None
                else []
            ),
        )
        for (first, second), pair in family.pairs.items()
    )
    names = [family.measure_title, *(["BLEU-4"] if family.measure == "rouge_l" else [])]
    header = ("First", "Second", *(f"{name}, first less second" for name in names))
    return [Heading("Every pair"), Table(header=header, lines=lines, text_columns=2, folded=True)]


def _interval(difference: DifferenceInterval, *, shown: bool) -> str:
    text = f"{fixed(difference.difference, 4, signed=True)} {_ends(difference)}"
    return text if shown else f"{text}, tied"


def _ends(difference: DifferenceInterval) -> str:
    return f"[{fixed(difference.low, 4, signed=True)}, {fixed(difference.high, 4, signed=True)}]"


def _difference(score: Score, interval: DifferenceInterval | None = None) -> str:
    if score.difference is None:
        return MISSING
    text = fixed(score.difference, 4, signed=True)
    if score.relative is not None:
        text += f" ({percent(score.relative, 1, signed=True)})"
    if interval is not None:
        text += f" {_ends(interval)}" + ("" if interval.shown else ", tied with base")
    return text
