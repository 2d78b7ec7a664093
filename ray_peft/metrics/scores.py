"""What held-out rows say of a trial: its scores, and what is behind them row by row."""

from __future__ import annotations

from typing import Literal

from ray_peft.foundation.measured import Measured
from ray_peft.foundation.names import PathPart
from ray_peft.foundation.strict import Strict


class Scores(Measured):
    """Quality on the held-out rows; None where it was not measured."""

    eval_loss: float | None = None
    """Text: mean negative log-likelihood of the answers' tokens [nats]; of pairs, of the chosen answers'; of labelled
    rows, of the desirable ones'. Images: mean squared error of what the UNet
    predicts of held-out images, over evenly spread timesteps with fixed noise, all weighed alike."""
    general_loss: float | None = None
    """Text: mean negative log-likelihood of the tokens of a fixed general text [nats]. What it is above that of the
    untouched base was forgotten in training."""
    reward_accuracy: float | None = None
    """Judged text: share of held-out pairs in which training raised the log-probability of the chosen answer by more
    than that of the rejected one, 0 to 1; an equal rise counts half, so that the untouched base has 0.5. Of labelled
    rows, the share in which it rose for a desirable answer, or fell for another."""
    reward_margin: float | None = None
    """Mean over held-out pairs of the chosen answer's reward less the rejected one's; a reward is `beta` times the rise
    of an answer's log-probability in training. Of labelled rows, the mean reward, negative for undesirable answers."""
    preference_loss: float | None = None
    """Mean of DPO's loss over held-out pairs."""
    bleu4: float | None = None
    """Corpus BLEU-4, 0 to 1."""
    rouge_l: float | None = None
    """Mean ROUGE-L F-measure, 0 to 1."""
    chrf: float | None = None
    """Corpus chrF2, 0 to 1: of characters, so it needs no tokenizer."""
    exact_match: float | None = None
    """Share of answers that are the reference, but for case, punctuation and articles, 0 to 1."""
    token_f1: float | None = None
    """Mean F1 of the words of answer and reference, normalised in the same way, 0 to 1."""
    own: dict[str, float] = {}
    """Means over rows of the metrics in `evaluation.metrics`, by the name of the function."""
    bleu_tokenizer: str | None = None
    """What cut the texts for bleu4, by sacrebleu's name: that of the references' script (metrics/scripts.py). Of rows
    that do not say it, it was 13a."""
    rouge_tokenizer: Literal["rouge_score", "unicode"] | None = None
    """What cut them for rouge_l: a-z and 0-9, or words of Unicode. Of rows that do not say it, the former."""
    style_heldout: float | None = None
    """Mean cosine of the style vectors of made images with those of the held-out paintings, at most 1. A style vector
    is the Gram matrices of the frozen VAE encoder's layers; it knows textures and colours, not what is depicted."""
    style_train: float | None = None
    """The same with the training paintings."""
    nearest_train: float | None = None
    """Likeness in content to the training painting that is nearest to a made image: the cosine of the two in squares
    of 8 pixels, less their mean colours; averaged over made images. A copy is 1.0."""
    eval_rows: int = 0
    """Held-out rows, or images, behind eval_loss."""
    generated_rows: int = 0
    """Held-out rows behind bleu4, rouge_l and chrf; made images behind the style scores."""
    benchmarks: dict[str, float] = {}
    """Scores of lm-eval's tasks by "task/metric", or "task/metric/filter" where a metric has several filters."""
    benchmark_stderr: dict[str, float] = {}
    """Their standard errors, of those that lm-eval gives one for."""
    benchmark_rows: dict[str, int] = {}
    """Questions behind each, by the same keys."""


class Sample(Strict):
    """One held-out prompt with its answers."""

    row: int
    """Index in the held-out rows."""
    source_dataset: str
    prompt: str
    reference: str
    answer: str


class ImageFile(Strict):
    """One made image in a trial's folder: an entry of `images/images.json`."""

    prompt: str
    seed: int
    file: PathPart
    """Its name in the folder of images."""
    before: PathPart | None = None
    """The name of what the untouched base makes of the same prompt and seed."""
    nearest: str | None = None
    """The training painting that is nearest to it in content."""
    nearest_likeness: float | None = None
    """How near: the cosine behind `Scores.nearest_train`; a copy is 1.0."""


class RowLoss(Measured):
    """The loss of one held-out row: a line of `losses.jsonl`."""

    row: int
    loss: float
    """Of an image, or the mean over the answer's tokens."""
    tokens: int | None = None
    """Answer tokens behind it, which are its weight in the loss of all rows; None where all rows weigh the same."""


class RowReward(Measured):
    """What one held-out pair or labelled row says of the rewards: a line of `rewards.jsonl`."""

    row: int
    margin: float
    """The chosen answer's reward less the rejected one's. Of a labelled row the reward, negative if undesirable."""

    @property
    def right(self) -> float:
        """1 for a positive margin, 0 for a negative one, and 0.5 for none."""
        return 0.5 if self.margin == 0 else float(self.margin > 0)


class QuestionScores(Measured):
    """What one question of a further benchmark was given: a line of `benchmarks.jsonl`. It holds no text of it."""

    task: str
    """lm-eval's name of it."""
    question: int
    """Index in the task's questions."""
    hash: str
    """The first half of a SHA-256 of the question, its prompt with the examples before it, and its answer."""
    values: dict[str, float]
    """By the keys of `Scores.benchmarks`, groups that the task is part of included. The score need not be their mean:
    a perplexity is not. Values that are no numbers, such as the texts behind a corpus BLEU, are not kept."""
