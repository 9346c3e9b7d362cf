"""Word and character error rates, text normalisation and bootstrap intervals.

An error rate is pooled over a set: with S substitutions, D deletions and I insertions of the
minimum edit alignment and N reference units (words or characters),

    rate = (S + D + I) / max(N, 1),

the errors of all utterances over the units of all references. An empty reference adds nothing to N
and its hypothesis adds insertions only, so silence answered with words counts against a model. The
alignment is jiwer's.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import jiwer
import numpy as np
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

# ISO 639 codes of languages written without spaces: a word there is one grapheme cluster, the
# practice of the Whisper paper (appendix C), so that word and character errors agree.
UNSPACED = frozenset({"bo", "cmn", "dz", "ja", "km", "lo", "my", "th", "wuu", "yue", "zh"})


class Counts(NamedTuple):
    """Edit operations of N utterances, each int64 [N]."""

    hits: np.ndarray
    substitutions: np.ndarray
    deletions: np.ndarray
    insertions: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        return self.substitutions + self.deletions + self.insertions

    @property
    def lengths(self) -> np.ndarray:
        """Units in the references."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        return float(self.errors.sum() / max(self.lengths.sum(), 1))


def language_code(lang: str | None) -> str:
    """`"en-US"`, `"en_GB"` and `"EN"` are all `"en"`; None is `""`."""
    return (lang or "").replace("_", "-").split("-")[0].lower()


@cache
def _normalizer(code: str):
    if code in ("en", "eng"):
        return EnglishTextNormalizer()
    # Without preserve_marks the basic normaliser cuts Hindi and Thai words at every vowel sign.
    return BasicTextNormalizer(preserve_marks=True, split_letters=code in UNSPACED)


def normalize(text: str, lang: str | None = None) -> str:
    """Text as it is scored: lower case, no punctuation, no bracketed remarks, single spaces.

    English goes through Whisper's English normaliser (spelling variants, contractions, numbers as
    digits). Everywhere else letters, combining marks and vowel signs all survive; invisible format
    characters (zero-width joiners, direction marks, soft hyphens) do not. Languages in `UNSPACED`
    come back with a space between grapheme clusters.
    """
    visible = "".join(c for c in text if unicodedata.category(c) != "Cf")
    normal = _normalizer(language_code(lang))(visible)
    return " ".join(unicodedata.normalize("NFC", normal).split())


def _counts(alignments: Sequence[Sequence[Any]]) -> Counts:
    table = np.zeros((len(alignments), 4), np.int64)
    columns = {"equal": 0, "substitute": 1, "delete": 2, "insert": 3}
    for row, chunks in zip(table, alignments, strict=True):
        for chunk in chunks:
            units = max(
                chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx
            )
            row[columns[chunk.type]] += units
    return Counts(*table.T)


def count_words(references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    """Word edits of every utterance. ValueError when the two lists differ in length."""
    _same_length(references, hypotheses)
    if not references:
        return _counts([])
    return _counts(jiwer.process_words(list(references), list(hypotheses)).alignments)


def count_characters(references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    """Character (code point, spaces included) edits of every utterance."""
    _same_length(references, hypotheses)
    if not references:
        return _counts([])
    return _counts(jiwer.process_characters(list(references), list(hypotheses)).alignments)


def word_diff(reference: str, hypothesis: str) -> list[tuple[str, str, str]]:
    """The alignment as (operation, reference words, hypothesis words) in reading order.

    Operations are `equal`, `substitute`, `delete` and `insert`.
    """
    out = jiwer.process_words([reference], [hypothesis])
    reference_words, hypothesis_words = out.references[0], out.hypotheses[0]
    return [
        (
            chunk.type,
            " ".join(reference_words[chunk.ref_start_idx : chunk.ref_end_idx]),
            " ".join(hypothesis_words[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in out.alignments[0]
    ]


def bootstrap_interval(
    errors: np.ndarray,
    lengths: np.ndarray,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of Σ errors / Σ lengths when utterances are drawn with replacement.

    Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation",
    ICASSP 2004. `errors` may be the difference of two runs' errors on the same utterances: then the
    interval is the paired one of the difference of their rates.
    """
    errors, lengths = np.asarray(errors), np.asarray(lengths)
    if not len(errors):
        return (0.0, 0.0)
    rng = np.random.default_rng(seed)
    rates = np.empty(samples)
    for i in range(samples):
        drawn = rng.integers(len(errors), size=len(errors))
        rates[i] = errors[drawn].sum() / max(lengths[drawn].sum(), 1)
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(ours: Counts, theirs: Counts, **kwargs: Any) -> dict[str, Any]:
    """`difference` of rates (ours − theirs, negative is better) and its paired `interval`.

    Both must hold the same references in the same order; ValueError otherwise.
    """
    if not np.array_equal(ours.lengths, theirs.lengths):
        raise ValueError("metrics: a paired interval needs the same references in both runs")
    interval = bootstrap_interval(ours.errors - theirs.errors, ours.lengths, **kwargs)
    return {"difference": ours.rate - theirs.rate, "interval": interval}


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    langs: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """All figures of one evaluation set, ready for JSON.

    Returns `wer`, `cer`, the edit counts, `words` (N) and the 95 % `interval` of `wer` on
    normalised text; `wer_raw` and `cer_raw` on the text as it stands; `n` utterances;
    `insertion_rate` (I / N); `empty_references` and `empty_answered`, how many of those got words;
    with two or more languages, `languages` holds `n`, `wer` and `cer` of each.
    """
    langs = list(langs) if langs is not None else [None] * len(references)
    _same_length(references, hypotheses)
    _same_length(references, langs)
    words, characters = normalized_counts(references, hypotheses, langs)
    empty = words.lengths == 0
    result = {
        "wer": words.rate,
        "cer": characters.rate,
        "wer_raw": count_words(references, hypotheses).rate,
        "cer_raw": count_characters(references, hypotheses).rate,
        "interval": bootstrap_interval(words.errors, words.lengths),
        "substitutions": int(words.substitutions.sum()),
        "deletions": int(words.deletions.sum()),
        "insertions": int(words.insertions.sum()),
        "words": int(words.lengths.sum()),
        "n": len(references),
        "insertion_rate": float(words.insertions.sum() / max(words.lengths.sum(), 1)),
        "empty_references": int(empty.sum()),
        "empty_answered": int((empty & (words.insertions > 0)).sum()),
    }
    codes = np.array([language_code(lang) for lang in langs])
    if len(set(codes)) > 1:
        result["languages"] = {
            code or "unknown": {
                "n": int((codes == code).sum()),
                "wer": Counts(*(column[codes == code] for column in words)).rate,
                "cer": Counts(*(column[codes == code] for column in characters)).rate,
            }
            for code in sorted(set(codes))
        }
    return result


def normalized_counts(
    references: Sequence[str], hypotheses: Sequence[str], langs: Sequence[str | None]
) -> tuple[Counts, Counts]:
    """Word and character edits of every utterance after `normalize` by its language."""
    references = [normalize(text, lang) for text, lang in zip(references, langs, strict=True)]
    hypotheses = [normalize(text, lang) for text, lang in zip(hypotheses, langs, strict=True)]
    words = count_words(references, hypotheses)

    def spelled(texts):
        pairs = zip(texts, langs, strict=True)
        return [t.replace(" ", "") if language_code(lang) in UNSPACED else t for t, lang in pairs]

    return words, count_characters(spelled(references), spelled(hypotheses))


def _same_length(first: Sequence[Any], second: Sequence[Any]) -> None:
    if len(first) != len(second):
        raise ValueError(f"metrics: {len(first)} references but {len(second)} hypotheses")
