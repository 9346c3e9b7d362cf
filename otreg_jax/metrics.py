"""Word and character error rates and their bootstrap intervals.

An error rate is pooled over a set: with S substitutions, D deletions and I insertions of the
minimum edit alignment and N reference units (words or characters),

    rate = (S + D + I) / max(N, 1),

the errors of all utterances over the units of all references. An empty reference adds nothing to N
and its hypothesis adds insertions only, so silence answered with words counts against a model. The
alignment is jiwer's; in the style "open_asr" kaldialign's, for which words apart and together are
the same.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jiwer
import kaldialign
import numpy as np

from otreg_jax import languages, open_asr
from otreg_jax.normalize import normalize


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
    drawn = draws(len(errors), samples, seed)
    return percentiles([errors[i].sum() / max(lengths[i].sum(), 1) for i in drawn], level)


def draws(count: int, samples: int = 1000, seed: int = 0) -> Iterator[np.ndarray]:
    """Indices of `count` utterances drawn with replacement, `samples` times."""
    rng = np.random.default_rng(seed)
    for _ in range(samples):
        yield rng.integers(count, size=count)


def percentiles(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The interval that holds the share `level` of the values, as many below as above it."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
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
    style: str = "whisper",
    unfinished: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """All figures of one evaluation set, ready for JSON.

    Args:
      references, hypotheses: texts, one of each an utterance.
      langs: names of their languages, as `languages.find` knows them.
      style: how texts are normalised, one of `normalize.STYLES`.
      unfinished: whether a hypothesis ended at the limit of tokens, not by itself.

    Returns:
      `wer`, `cer`, the edit counts, `words` (N) and the 95 % `interval` of `wer` on normalised
      text; `wer_raw` and `cer_raw` on the text as it stands; `n` utterances; `insertion_rate`
      (I / N) and `deletion_rate` (D / N); `empty_references`, and of those `empty_answered`, which
      got words, and `empty_words`, how many; `empty_hypotheses` where the reference has words;
      `unfinished` hypotheses; with two or more languages, `languages` holds `n`, `wer` and `cer` of
      each.
    """
    langs = list(langs) if langs is not None else [None] * len(references)
    unfinished = list(unfinished) if unfinished is not None else [False] * len(references)
    _same_length(references, hypotheses)
    _same_length(references, langs)
    _same_length(references, unfinished)
    words, characters = normalized_counts(references, hypotheses, langs, style)
    empty = words.lengths == 0
    silent = words.hits + words.substitutions + words.insertions == 0
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
        "deletion_rate": float(words.deletions.sum() / max(words.lengths.sum(), 1)),
        "empty_references": int(empty.sum()),
        "empty_answered": int((empty & ~silent).sum()),
        "empty_words": int(words.insertions[empty].sum()),
        "empty_hypotheses": int((silent & ~empty).sum()),
        "unfinished": sum(map(bool, unfinished)),
    }
    codes = np.array([languages.find(lang).code for lang in langs])
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
    references: Sequence[str],
    hypotheses: Sequence[str],
    langs: Sequence[str | None],
    style: str = "whisper",
) -> tuple[Counts, Counts]:
    """Word and character edits of every utterance after `normalize` by its language."""
    _same_length(references, hypotheses)
    normal = lambda texts: [
        normalize(text, lang, style) for text, lang in zip(texts, langs, strict=True)
    ]
    references, hypotheses = normal(references), normal(hypotheses)
    if style == "open_asr":
        words = _count_words_or_compounds(references, hypotheses, langs)
    else:
        words = count_words(references, hypotheses)

    def spelled(texts):
        pairs = zip(texts, langs, strict=True)
        return [t.replace(" ", "") if languages.find(lang).unspaced else t for t, lang in pairs]

    return words, count_characters(spelled(references), spelled(hypotheses))


def _count_words_or_compounds(references, hypotheses, langs) -> Counts:
    """Word edits where words that differ in spaces alone are the same."""
    rows = []
    for reference, hypothesis, lang in zip(references, hypotheses, langs, strict=True):
        if languages.find(lang).code != "en":
            reference, hypothesis = open_asr.join_compounds(reference, hypothesis)
        reference, hypothesis = reference.split(), hypothesis.split()
        edits = kaldialign.edit_distance(reference, hypothesis, merge_compounds=True)
        hits = len(reference) - edits["sub"] - edits["del"]
        rows.append((hits, edits["sub"], edits["del"], edits["ins"]))
    return Counts(*np.array(rows, np.int64).reshape(-1, 4).T)


def _same_length(first: Sequence[Any], second: Sequence[Any]) -> None:
    if len(first) != len(second):
        raise ValueError(f"metrics: {len(first)} references but {len(second)} hypotheses")
