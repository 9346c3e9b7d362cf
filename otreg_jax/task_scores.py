"""Figures of the tasks that are not transcription, and of the words that a context lists.

Every figure is a function of sums over utterances (of errors, of n-grams that match, ...), so that
each has a bootstrap interval, and a paired one for the difference of two runs, from `Statistics`.
BLEU and chrF are sacrebleu's (Post 2018); biased word error rates are those of Le et al. 2021
("Contextualized streaming end-to-end speech recognition", section 4); exact match and token F1 are
SQuAD's (Rajpurkar et al. 2016) on normalised text.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jiwer
import numpy as np
import sacrebleu

from otreg_jax import languages, metrics
from otreg_jax.normalize import normalize

_TAG = re.compile(r"\s*<([^<>]*)>\s*")
# sacrebleu's tokenizers of languages that put no spaces between words; without further libraries.
_BLEU_TOKENIZERS = {"zh": "zh"} | dict.fromkeys(("ja", "th", "lo", "km", "my"), "char")

# The figure that a run is known by, for each task; of other tasks it is F1.
MAIN = {"transcribe": "wer", "translate": "bleu", "identify": "accuracy"}


class Statistics(NamedTuple):
    """What a figure is made of: one row an utterance, and the figure of a row or a sum of rows."""

    sums_NK: np.ndarray
    figure: Callable[[np.ndarray], float]

    @property
    def value(self) -> float:
        return float(self.figure(self.sums_NK.sum(axis=0)))


def scale(figure: str) -> float:
    """What a figure is multiplied by to be shown in percent; sacrebleu's are so already."""
    return 1.0 if figure in ("bleu", "chrf") else 100.0


def main_figure(task: str) -> str:
    """The name of a task's main figure."""
    return MAIN.get(task, "f1")


def statistics(task: str, rows: Sequence[Mapping[str, Any]], style: str) -> dict[str, Statistics]:
    """The figures of a set of one task, by name; the main one first.

    rows: of hypotheses.jsonl: "reference", "hypothesis", "lang" (of the reference).
    """
    references = [row["reference"] for row in rows]
    hypotheses = [row["hypothesis"] for row in rows]
    langs = [row["lang"] for row in rows]
    if task == "translate":
        return _translation(references, hypotheses, langs)
    if task == "identify":
        return _identification(rows, style)
    normal = lambda texts: [
        normalize(text, lang, style) for text, lang in zip(texts, langs, strict=True)
    ]
    pairs = list(zip(normal(references), normal(hypotheses), strict=True))
    exact = [(reference == hypothesis, 1) for reference, hypothesis in pairs]
    overlap = [(token_f1(*pair), 1) for pair in pairs]
    return {"f1": _mean(overlap), "exact_match": _mean(exact)}


def score(task: str, rows: Sequence[Mapping[str, Any]], style: str) -> dict[str, Any]:
    """All figures of a set of one task, ready for JSON: `task`, `n`, the figures by name, their
    95 % `intervals`, and what belongs to the task: `signatures` of sacrebleu; `confusion`."""
    found = statistics(task, rows, style)
    result = {"task": task, "n": len(rows), "unfinished": sum(bool(r["unfinished"]) for r in rows)}
    result |= {name: figure.value for name, figure in found.items()}
    result["intervals"] = {name: interval(figure) for name, figure in found.items()}
    if task == "translate":
        scorers = _scorers([row["lang"] for row in rows])
        for metric in scorers.values():
            metric.corpus_score([""], [[""]])  # only then they know how many references there are
        result["signatures"] = {name: str(m.get_signature()) for name, m in scorers.items()}
    if task == "identify":
        result["confusion"] = confusion(rows)
    return result


def interval(figure: Statistics, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval when utterances are drawn with replacement."""
    drawn = metrics.draws(len(figure.sums_NK), samples, seed)
    return metrics.percentiles([figure.figure(figure.sums_NK[i].sum(axis=0)) for i in drawn])


def paired_difference(ours: Statistics, theirs: Statistics, samples: int = 1000, seed: int = 0):
    """{"difference": ours − theirs, "interval"}: both are scored on the same draws of the same
    utterances, given in the same order."""
    of = lambda side, rows: side.figure(side.sums_NK[rows].sum(axis=0))
    drawn = metrics.draws(len(ours.sums_NK), samples, seed)
    interval = metrics.percentiles([of(ours, rows) - of(theirs, rows) for rows in drawn])
    return {"difference": ours.value - theirs.value, "interval": interval}


def _mean(pairs: Sequence[tuple[float, float]]) -> Statistics:
    """Σ of the first over Σ of the second."""
    sums = np.array(pairs, np.float64).reshape(-1, 2)
    return Statistics(sums, lambda total: total[0] / max(total[1], 1))


# Translation -----------------------------------------------------------------------------------


def _translation(references, hypotheses, langs) -> dict[str, Statistics]:
    found = {}
    for name, metric in _scorers(langs).items():
        # sacrebleu keeps what its own bootstrap is made of to itself: rows of counts.
        rows = metric._extract_corpus_statistics(hypotheses, [references])
        figure = lambda total, metric=metric: metric._compute_score_from_stats(list(total)).score
        found[name] = Statistics(np.array(rows), figure)
    return found


def _scorers(langs) -> dict[str, Any]:
    """BLEU, with the tokenizer of the most frequent language, and chrF."""
    code = Counter(languages.find(lang).code for lang in langs).most_common(1)[0][0]
    tokenize = _BLEU_TOKENIZERS.get(code, "13a")
    return {"bleu": sacrebleu.BLEU(tokenize=tokenize), "chrf": sacrebleu.CHRF()}


# Languages -------------------------------------------------------------------------------------


def language_of(answer: str) -> tuple[str, str]:
    """The language that an answer begins with, "<de> wo ist", and the rest; ("", answer) without a
    tag, and "?" for a tag that no one knows."""
    found = _TAG.match(answer)
    if not found:
        return "", answer
    return languages.find(found[1]).code or "?", answer[found.end() :]


def confusion(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """{language: {language that was heard: utterances}}; "" where an answer has no tag."""
    pairs = Counter(
        (language_of(row["reference"])[0], language_of(row["hypothesis"])[0]) for row in rows
    )
    table: dict[str, dict[str, int]] = {}
    for (said, heard), count in sorted(pairs.items()):
        table.setdefault(said, {})[heard] = count
    return table


def _identification(rows, style: str) -> dict[str, Statistics]:
    said, heard = ([language_of(row[key]) for row in rows] for key in ("reference", "hypothesis"))
    right = [(a == b, 1) for (a, _), (b, _) in zip(said, heard, strict=True)]
    found = {"accuracy": _mean(right)}
    if any(text for _, text in said):
        texts = [[text for _, text in side] for side in (said, heard)]
        words, _ = metrics.normalized_counts(*texts, [row["lang"] for row in rows], style)
        found["wer"] = _mean(list(zip(words.errors, words.lengths, strict=True)))
    return found


# Answers ---------------------------------------------------------------------------------------


def token_f1(reference: str, hypothesis: str) -> float:
    """The harmonic mean of precision and recall of the words, as bags; 1 for two empty texts."""
    said, heard = Counter(reference.split()), Counter(hypothesis.split())
    common = (said & heard).total()
    if not said or not heard:
        return float(said == heard)
    return 2 * common / (said.total() + heard.total())


# Context ---------------------------------------------------------------------------------------


def biased(rows: Sequence[Mapping[str, Any]], style: str) -> dict[str, Statistics]:
    """`biased_wer`, over the words of a reference that its row's "context" lists, and
    `unbiased_wer`, over all others; an inserted word counts where it would stand if it were said.
    {} where no row lists words."""
    rows = [row for row in rows if row.get("context")]
    if not rows:
        return {}
    sums = []
    for row in rows:
        texts = [row["reference"], row["hypothesis"], " ".join(row["context"])]
        said, heard, listed = (normalize(text, row["lang"], style).split() for text in texts)
        sums.append(_biased_edits(said, heard, set(listed)))
    sums_N4 = np.array(sums, np.float64)
    return {
        name: Statistics(sums_N4, lambda total, k=k: total[k] / max(total[k + 1], 1))
        for name, k in (("biased_wer", 0), ("unbiased_wer", 2))
    }


def _biased_edits(said: list[str], heard: list[str], listed: set[str]) -> tuple[int, ...]:
    """(errors, words) of the listed words, and of the others."""
    errors, words = Counter(), Counter(word in listed for word in said)
    alignment = jiwer.process_words(" ".join(said), " ".join(heard)).alignments[0]
    for chunk in alignment:
        if chunk.type == "insert":
            errors.update(w in listed for w in heard[chunk.hyp_start_idx : chunk.hyp_end_idx])
        elif chunk.type != "equal":
            errors.update(w in listed for w in said[chunk.ref_start_idx : chunk.ref_end_idx])
    return errors[True], words[True], errors[False], words[False]
