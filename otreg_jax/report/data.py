"""What the report shows of a run, and how figures.npz holds the larger part of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from otreg_jax.data import features

MAX_NOTES = 8  # lines of the report about utterances that could not be evaluated


class Plan(NamedTuple):
    """Transport plan of one utterance: S speech positions, T transcript tokens, F mel frames.

    words: (word, its start and end by `align`, its start and end by the manifest), in seconds.
    """

    set: str
    id: str
    seconds: float
    mel_FM: np.ndarray
    plan_ST: np.ndarray
    tokens: Sequence[str]
    words: Sequence[tuple[str, float, float, float, float]] = ()


class Run(NamedTuple):
    """One run's column of the report.

    sets, hypotheses: as in results.json ("sets") and hypotheses.jsonl. curve: rows of
    metrics.jsonl. config: flat {"data.train": value}. speech_ND, text_ND: embeddings of a few
    utterances for the map, or None. differences: {set: paired_difference of the first run − this}.
    style: how texts were normalised.
    """

    name: str
    sets: dict[str, dict[str, Any]]
    hypotheses: Sequence[dict[str, Any]] = ()
    curve: Sequence[dict[str, float]] = ()
    config: dict[str, Any] | None = None
    plans: Sequence[Plan] = ()
    speech_ND: np.ndarray | None = None
    text_ND: np.ndarray | None = None
    differences: dict[str, dict[str, Any]] | None = None
    style: str = "whisper"
    tasks: dict[str, dict[str, Any]] = {}  # of other tasks, as in results.json


def arrays(plans, samples, tokenizer) -> dict[str, np.ndarray]:
    """The arrays of figures.npz: plans of the first and the last set, points of the map.

    plans: (name of the set, sample, plan [S, T], `alignment.word_times`). samples: of
    `recognition.decode_sets`.
    """
    found = {}
    for i, (name, sample, plan_ST, words) in enumerate(plans[:1] + plans[1:][-1:]):
        found |= {
            f"set{i}": np.array(name),
            f"id{i}": np.array(sample.utterance.id),
            f"mel{i}": sample.mel_FM.astype(np.float16),
            f"plan{i}": plan_ST,
            f"tokens{i}": np.array(tokenizer.tokens(sample.ids_T.tolist())),
            f"words{i}": np.array([word.text for word, *_ in words], np.str_),
            f"times{i}": np.array([[w.start, w.end, *said] for w, *said in words]),
        }
    first = next(iter(samples.values()), [])
    if first:
        found["speech"] = np.concatenate([s.speech_SD for s in first])[:600].astype(np.float16)
        found["text"] = np.concatenate([s.text_TD for s in first])[:300].astype(np.float16)
    return found


def column(
    name: str,
    config: dict[str, Any],
    results: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    curve: Sequence[dict[str, Any]],
    figures: dict[str, np.ndarray],
) -> Run:
    """A run's column: results.json, rows of hypotheses.jsonl and of metrics.jsonl, figures.npz and
    the flat configuration."""
    plans = [
        Plan(
            str(figures[f"set{i}"]),
            str(figures[f"id{i}"]),
            len(figures[f"mel{i}"]) / features.FRAME_RATE,
            figures[f"mel{i}"].astype(np.float32),
            figures[f"plan{i}"],
            list(figures[f"tokens{i}"]),
            [
                (str(word), *times)
                for word, times in zip(
                    figures.get(f"words{i}", ()), figures.get(f"times{i}", ()), strict=True
                )
            ],
        )
        for i in range(2)
        if f"id{i}" in figures
    ]
    return Run(
        name,
        sets=results["sets"],
        hypotheses=rows,
        curve=curve,
        config=config,
        plans=plans,
        speech_ND=figures.get("speech"),
        text_ND=figures.get("text"),
        style=results["normalizer"]["style"],
        tasks=results.get("tasks", {}),
    )


def notes(results: dict[str, Any], problems: Sequence[dict[str, str]]) -> list[str]:
    """Sentences about what the figures leave out or what is odd in them.

    problems: {"where", "message"} of the utterances that could not be evaluated.
    """
    lines = [f"Not evaluated: {p['where']}: {p['message']}" for p in problems[:MAX_NOTES]]
    if len(problems) > MAX_NOTES:
        lines.append(f"… and {len(problems) - MAX_NOTES} more")
    for name, row in results["sets"].items():
        if row["empty_references"]:
            lines.append(
                f"{name}: {row['empty_references']} references are empty, {row['empty_answered']} "
                f"of them were answered, with {row['empty_words']} words."
            )
        if row["empty_hypotheses"]:
            lines.append(f"{name}: {row['empty_hypotheses']} hypotheses are empty.")
        if row["unfinished"]:
            lines.append(
                f"{name}: {row['unfinished']} hypotheses are unfinished: they ran into the limit "
                f"of {results['decode']['max_tokens']} tokens."
            )
    for name, row in results.get("tasks", {}).items():
        if row["unfinished"]:
            lines.append(f"{name}: {row['unfinished']} answers ran into the limit of tokens.")
    return lines
