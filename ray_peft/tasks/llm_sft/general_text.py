"""A fixed general text, whose loss says what a model forgets while it learns something else.

Its passages are in the public domain: C. Darwin 1859, M. Faraday 1861, A. Lincoln 1863, J. Austen 1813, H. Melville
1851 and the Declaration of Independence 1776. Most models have seen them, which is the point: the loss is compared with
that of the same model before it was trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MOST_TOKENS = 256
"""Of a row: a passage is cut into rows that each model can take."""

GENERAL_TOKENS = 600
"""Of the whole text, by a usual tokenizer; predictions of time count with it."""

PASSAGES = (
    "When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the distribution of the "
    "inhabitants of South America, and in the geological relations of the present to the past inhabitants of that "
    "continent. These facts seemed to me to throw some light on the origin of species, that mystery of mysteries, "
    "as it has been called by one of our greatest philosophers. On my return home, it occurred to me, in 1837, that "
    "something might perhaps be made out on this question by patiently accumulating and reflecting on all sorts of "
    "facts which could possibly have any bearing on it.",
    "There is no better, there is no more open door by which you can enter into the study of natural philosophy "
    "than by considering the physical phenomena of a candle. I trust, therefore, I shall not disappoint you in "
    "choosing this for my subject rather than any newer topic, which could not be better, were it even so good.",
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in "
    "Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil "
    "war, testing whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on "
    "a great battle-field of that war. We have come to dedicate a portion of that field, as a final resting place "
    "for those who here gave their lives that that nation might live. It is altogether fitting and proper that we "
    "should do this.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of "
    "a wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, "
    "this truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful "
    "property of some one or other of their daughters.",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and "
    "nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of "
    "the world. It is a way I have of driving off the spleen, and regulating the circulation.",
    "When in the Course of human events, it becomes necessary for one people to dissolve the political bands which "
    "have connected them with another, and to assume among the powers of the earth, the separate and equal station "
    "to which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of mankind "
    "requires that they should declare the causes which impel them to the separation.",
)


def general_rows(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """The text as rows with `input_ids` and `labels`: every token but the first of a row carries loss.

    Args:
        tokenizer: of the model.
        max_length: of the trial's rows [tokens]; no row of the text is longer.
    """
    from datasets import Dataset

    most = min(max_length, MOST_TOKENS)
    rows: list[list[int]] = []
    for passage in PASSAGES:
        ids = list(tokenizer(passage)["input_ids"])
        rows += [ids[start : start + most] for start in range(0, len(ids), most) if len(ids) - start > 1]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})
