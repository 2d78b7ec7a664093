"""Scores in every script: identical answers score 1, another one less, and English scores stay what they were."""

import random

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from ray_peft.metrics.chrf_scores import chrf, chrf_from_statistics, chrf_row_statistics
from ray_peft.metrics.scripts import loose_words, script, tokenizers, words
from ray_peft.metrics.text_scores import bleu4, rouge_l, rouge_l_rows

# Two different sentences a script, and the tokeniser of BLEU that suits it where MeCab is not installed.
TEXTS = {
    "Chinese": ("是的，没有任何问题。", "不，我们明天再谈这件事。", "zh"),
    "Japanese": ("はい、何の問題もありません。", "いいえ、明日また話しましょう。", "char"),
    "Korean": ("네, 아무 문제가 없습니다.", "아니요, 내일 다시 이야기합시다.", "char"),
    "Arabic": ("نعم، لا توجد أي مشكلة على الإطلاق.", "لا، سنتحدث عن ذلك مرة أخرى غدا.", "intl"),
    "Hebrew": ("כן, אין שום בעיה בכלל.", "לא, נדבר על זה שוב מחר.", "intl"),
    "Hindi": ("हाँ, बिल्कुल कोई समस्या नहीं है।", "नहीं, हम इस बारे में कल फिर बात करेंगे।", "intl"),
    "Thai": ("ใช่ ไม่มีปัญหาใดๆ เลย", "ไม่ เราจะคุยเรื่องนี้กันอีกครั้งพรุ่งนี้", "char"),
    "Russian": ("Да, никаких проблем совсем нет.", "Нет, поговорим об этом завтра ещё раз.", "intl"),
    "Greek": ("Ναι, δεν υπάρχει κανένα πρόβλημα.", "Όχι, θα το συζητήσουμε ξανά αύριο.", "intl"),
    "emoji": ("👍🏽👨‍👩‍👧🇩🇪🎉", "👎🏽👩‍👧🇫🇷🙈", "intl"),
    "Vietnamese": ("Vâng, không có vấn đề gì cả.", "Không, chúng ta sẽ nói về việc đó vào ngày mai.", "13a"),
}


@pytest.fixture(autouse=True)
def _without_mecab(monkeypatch):
    """The same tokenisers on every machine."""
    monkeypatch.setattr("ray_peft.metrics.scripts._installed", lambda name: "mecab" not in name)


@pytest.mark.parametrize(("own", "other", "tokenizer"), TEXTS.values(), ids=TEXTS)
def test_identical_answers_score_one_and_others_less(own, other, tokenizer):
    references = [own, other] * 5
    assert tokenizers(references).bleu == tokenizer
    assert tokenizers(references).rouge == "unicode"
    swapped = [other, own] * 5
    for score in (bleu4, rouge_l, chrf):
        assert score(references, references) == pytest.approx(1, abs=1e-12)
        one_wrong = score([other, *references[1:]], references)
        assert score(swapped, references) < one_wrong < 1
    assert rouge_l(swapped, references) < 0.5


def test_words_keep_their_marks_and_characters_without_spaces_stand_alone():
    assert words("हाँ, कोई समस्या नहीं है।") == ["हाँ", "कोई", "समस्या", "नहीं", "है"]
    assert words("ที่นี่") == ["ที่", "นี่"]
    assert words("コーヒーを 2杯") == ["コ", "ー", "ヒ", "ー", "を", "2", "杯"]
    assert words("用 Python 写代码!") == ["用", "python", "写", "代", "码"]
    assert words("می‌خواهم بروم") == ["می‌خواهم", "بروم"]
    assert words("Zoe\u0308 x_y") == ["zoë", "x", "y"]
    assert words("👍🏽👨‍👩‍👧🇩🇪❤️") == ["👍🏽", "👨‍👩‍👧", "🇩🇪", "❤️"]
    assert words("?!") == ["?", "!"]
    assert words(" \n") == []
    assert loose_words("x_y हाँ, 是的 👍") == ["x_y", "हाँ", "是", "的"]


def test_words_of_ascii_are_those_of_rouge_score():
    rng = random.Random(0)
    pieces = ["the", "Cat", "don't", "a_b", "3.14", "well-\nknown", "(x)", "U.S.", "\t", "50%", "...", "`z`", "e-mail"]
    for _ in range(300):
        text = rng.choice([" ", ""]).join(rng.choices(pieces, k=rng.randrange(12))) + " end"
        assert words(text) == tokenize(text, None)


def test_english_scores_stay_what_they_were():
    rng = random.Random(1)
    common = ["the", "a", "cat", "sat", "on", "red", "mat", "of", "its"]
    rare = ["café", "naïve", "“quoted”", "don’t", "3.14", "π", "5°", "Łódź", "北京", "U.S.-made", "résumé"]
    references = [
        " ".join(rng.choices(common, k=rng.randrange(4, 30)) + rng.choices(rare, k=rng.random() < 0.2))
        for _ in range(150)
    ]
    predictions = [" ".join(word for word in text.split() if rng.random() > 0.1) for text in references]
    assert (tokenizers(references).bleu, tokenizers(references).rouge) == ("13a", "rouge_score")
    scorer = RougeScorer(["rougeL"])
    expected = [scorer.score(r, p)["rougeL"].fmeasure for r, p in zip(references, predictions, strict=True)]
    assert rouge_l_rows(predictions, references) == expected
    official = BLEU(smooth_method="none").corpus_score(predictions, [references]).score / 100
    assert bleu4(predictions, references) == pytest.approx(official, abs=1e-12)


@pytest.mark.parametrize("name", ["zh", "char", "intl"])
def test_bleu4_is_that_of_sacrebleu_with_the_same_tokenizer(name):
    own = [text for text, _, tokenizer in TEXTS.values() if tokenizer == name]
    other = [text for _, text, tokenizer in TEXTS.values() if tokenizer == name]
    references = own + other + [a + b for a, b in zip(own, other, strict=True)]
    predictions = own + other + own
    expected = BLEU(smooth_method="none", tokenize=name).corpus_score(predictions, [references]).score / 100
    assert 0 < expected < 1
    assert bleu4(predictions, references, name) == pytest.approx(expected, abs=1e-12)


def test_mixed_data_sets_take_the_tokenizer_of_what_is_not_latin():
    english = ["yes, there is no problem at all", "ask me again tomorrow"] * 5
    chinese, russian = [TEXTS["Chinese"][0]] * 10, [TEXTS["Russian"][0]] * 10
    assert tokenizers([*english, *chinese]).bleu == "zh"
    assert tokenizers([*english, *russian]).bleu == "intl"
    assert tokenizers([*russian, *chinese]).bleu == "zh"
    assert tokenizers([*chinese, *[TEXTS["Thai"][0]] * 10]).bleu == "char"
    assert tokenizers(["用 Python 写代码 print(x)"] * 4).bleu == "zh"  # code and names beside Han
    # One row in twenty changes nothing for the others, and ROUGE-L still reads it.
    rare = [*english, *english[:9], chinese[0]]
    assert (tokenizers(rare).bleu, tokenizers(rare).rouge) == ("13a", "rouge_score")
    assert rouge_l_rows([*rare[:-1], "是"], rare)[-1] == pytest.approx(2 / 9)
    # Kana beside Han is Japanese, one borrowed character is not.
    assert script("の" + "漢字" * 20) == "han"
    assert script(TEXTS["Japanese"][0]) == "japanese"


def test_mecab_is_taken_where_it_is(monkeypatch):
    monkeypatch.setattr("ray_peft.metrics.scripts._installed", lambda name: True)
    assert tokenizers([TEXTS["Japanese"][0]] * 3).bleu == "ja-mecab"
    assert tokenizers([TEXTS["Korean"][0]] * 3).bleu == "ko-mecab"


@pytest.mark.parametrize("text", ["", " \n\t", "...", "42", "🎉", "是", "yes"])
def test_short_and_empty_references_have_a_score(text):
    references = [text] * 8
    for score in (bleu4, rouge_l, chrf):
        assert 0 <= score(references, references) <= 1
        assert score([""] * 8, references) == 0
    if text in ("42", "🎉", "是", "yes"):
        assert chrf(references, references) == 1
    if text in ("42", "是", "yes"):
        assert rouge_l(references, references) == 1


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match="13a, intl, zh, ja-mecab, ko-mecab, char, found moses"):
        bleu4(["a"], ["a"], "moses")


def test_chrf_worked_by_hand():
    # "abc" against "abd": 2 of 3 characters, 1 of 2 pairs, 0 of 1 triple; three orders exist.
    assert chrf(["a bc"], ["abd"]) == pytest.approx((2 / 3 + 1 / 2) / 3, abs=1e-15)
    assert chrf_row_statistics(["a bc"], ["abd"])[0, :9].tolist() == [3, 3, 2, 2, 2, 1, 1, 1, 0]


def test_chrf_equals_sacrebleu():
    rng = random.Random(2)
    texts = [text for own, other, _ in TEXTS.values() for text in (own, other)] + ["", " ", "a", "the cat sat", "x y z"]
    for _ in range(100):
        rows = rng.randrange(1, 8)
        several = [[rng.choice(texts) + rng.choice(["", " end"]) for _ in range(2)] for _ in range(rows)]
        predictions = [rng.choice(texts)[: rng.randrange(1, 40)] for _ in range(rows)]
        expected = CHRF().corpus_score(predictions, [list(column) for column in zip(*several, strict=True)]).score / 100
        assert chrf(predictions, several) == pytest.approx(expected, abs=1e-12)
    many = np.stack([chrf_row_statistics(["a bc"], ["abd"])[0]] * 2)
    assert chrf_from_statistics(many).shape == (2,)
