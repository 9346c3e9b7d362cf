"""Error rates against jiwer and by hand, normalisation by language, bootstrap coverage."""

import unicodedata

import jiwer
import numpy as np
import pytest

from otreg_jax import metrics


def test_counts_match_hand_computed_table():
    references = ["the cat sat", "a b c d", "one", "", "x y"]
    hypotheses = ["the cat sat", "a x c", "one two three", "noise", ""]
    counts = metrics.count_words(references, hypotheses)
    #                       hits, sub, del, ins
    expected = [[3, 0, 0, 0], [2, 1, 1, 0], [1, 0, 0, 2], [0, 0, 0, 1], [0, 0, 2, 0]]
    np.testing.assert_array_equal(np.stack(counts, 1), expected)
    assert counts.rate == pytest.approx(7 / 10)


def test_rates_equal_jiwer():
    rng = np.random.default_rng(0)
    words = np.array(["a", "bb", "ccc", "dd", "e"])
    references = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(40)]
    hypotheses = [" ".join(rng.choice(words, rng.integers(0, 9))) for _ in range(40)]
    assert metrics.count_words(references, hypotheses).rate == pytest.approx(
        jiwer.wer(references, hypotheses)
    )
    assert metrics.count_characters(references, hypotheses).rate == pytest.approx(
        jiwer.cer(references, hypotheses)
    )


def test_empty_references_are_defined():
    assert metrics.count_words([], []).rate == 0.0
    assert metrics.count_words([""], [""]).rate == 0.0
    assert metrics.count_words([""], ["two words"]).rate == 2.0
    silence = metrics.score(["", "", "stop"], ["", "you you", "stop"])
    assert silence["wer"] == 2.0
    assert (silence["empty_references"], silence["empty_answered"]) == (2, 1)
    assert silence["empty_words"] == 2
    assert metrics.score([], [])["n"] == 0


def test_what_error_rates_do_not_show_is_counted():
    row = metrics.score(
        ["a b c d", "a b", "", "x"], ["a b a b", "...", "", "x"], unfinished=[True, False, False, 0]
    )
    assert (row["empty_hypotheses"], row["unfinished"], row["empty_answered"]) == (1, 1, 0)
    assert (row["deletion_rate"], row["insertion_rate"]) == (2 / 7, 0.0)


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 references but 1 hypotheses"):
        metrics.count_words(["a", "b"], ["a"])


@pytest.mark.parametrize(
    "lang, text, expected",
    [
        ("en", "Mr. Smith's colour isn't grey!", "mister smith is color is not gray"),
        ("en-US", "Twenty-one [laughter] dogs", "21 dogs"),
        ("de", "Öl für die Straße, schön!", "öl für die straße schön"),
        ("fr", "L’été, où ça? Œuvre.", "l été où ça œuvre"),
        ("es", "¿Mañana? ¡Pingüino!", "mañana pingüino"),
        ("pl", "Zażółć gęślą jaźń, łódź.", "zażółć gęślą jaźń łódź"),
        ("hi", "नमस्ते दुनिया, हिन्दी।", "नमस्ते दुनिया हिन्दी"),
        ("zh", "你好，世界！", "你 好 世 界"),
        ("ja", "がっこうへ、行く。", "が っ こ う へ 行 く"),
        ("ar", "مَرْحَبًا، كيف الحال؟", "مَرْحَبًا كيف الحال"),
        ("th", "ที่นี่ ดี", "ที่ นี่ ดี"),
    ],
)
def test_normalisation_keeps_letters_and_marks(lang, text, expected):
    assert metrics.normalize(text, lang) == unicodedata.normalize("NFC", expected)


@pytest.mark.parametrize("lang", ["de", "fr", "es", "pl", "hi", "zh", "ja", "ar", "th", None])
def test_no_combining_mark_is_lost(lang):
    text = "über naïf mañana żółć किताबें में 中文字 ガギグ القُرْآن ภาษาไทยที่ดี"
    kept = metrics.normalize(text, lang).replace(" ", "")
    assert kept == unicodedata.normalize("NFKC", text).replace(" ", "")


def test_composed_and_decomposed_text_are_the_same():
    assert metrics.normalize("schön", "de") == metrics.normalize("scho\u0308n", "de")
    assert metrics.normalize("क\u200dष", "hi") == metrics.normalize("कष", "hi")


def test_languages_without_spaces_are_scored_by_character():
    result = metrics.score(["今天天气好"], ["今天 天汽好"], ["zh"])
    assert result["wer"] == result["cer"] == pytest.approx(1 / 5)
    assert result["wer_raw"] == 2.0


def test_languages_are_scored_apart():
    result = metrics.score(["ja nein", "good day"], ["ja", "good day"], ["de", "en"])
    assert result["languages"]["de"]["wer"] == 0.5
    assert result["languages"]["en"]["wer"] == 0.0
    assert result["deletions"] == 1


def test_word_diff_reads_in_order():
    assert metrics.word_diff("turn the light on", "turn light on now") == [
        ("equal", "turn", "turn"),
        ("delete", "the", ""),
        ("equal", "light on", "light on"),
        ("insert", "", "now"),
    ]


def test_intervals_cover_at_the_nominal_rate():
    rng = np.random.default_rng(1)
    inside = paired_inside = 0
    trials, utterances = 300, 120
    for trial in range(trials):
        lengths = rng.integers(1, 16, utterances)
        hardness = rng.beta(2, 8, utterances)  # errors cluster by utterance, as they do in speech
        ours, theirs = rng.binomial(lengths, hardness), rng.binomial(lengths, hardness * 0.8)
        low, high = metrics.bootstrap_interval(ours, lengths, samples=400, seed=trial)
        inside += low <= 0.2 <= high
        low, high = metrics.bootstrap_interval(ours - theirs, lengths, samples=400, seed=trial)
        paired_inside += low <= 0.2 * 0.2 <= high
    # 300 trials at 95 %: a standard error of 1.3 points.
    assert 0.91 <= inside / trials <= 0.985
    assert 0.91 <= paired_inside / trials <= 0.985


def test_paired_interval_is_narrower_than_the_two_alone():
    rng = np.random.default_rng(2)
    lengths = rng.integers(5, 20, 200)
    errors = rng.binomial(lengths, rng.beta(1, 3, 200))
    better = np.maximum(errors - rng.integers(0, 2, 200), 0)
    zeros = np.zeros_like(lengths)
    theirs = metrics.Counts(lengths - errors, errors, zeros, zeros)
    ours = metrics.Counts(lengths - better, better, zeros, zeros)
    paired = metrics.paired_difference(ours, theirs)
    low, high = paired["interval"]
    assert low <= paired["difference"] <= high < 0
    alone = metrics.bootstrap_interval(errors, lengths)
    assert high - low < (alone[1] - alone[0]) / 2


def test_paired_interval_needs_the_same_references():
    ours, theirs = metrics.count_words(["a b"], ["a"]), metrics.count_words(["a"], ["a"])
    with pytest.raises(ValueError, match="same references"):
        metrics.paired_difference(ours, theirs)
