"""Word times from transport plans: forced alignment of a manifest's transcripts to its audio.

    python -m otreg_jax.align --workdir=DIR manifest.jsonl > aligned.jsonl
    python -m otreg_jax.align --workdir=DIR --textgrid=grids/ manifest.jsonl

Prints one JSON object an utterance: {"id", "words": [[word, start, end], ...]}, times in seconds;
the same "words" in a manifest are what long audio is cut by. --textgrid writes Praat files instead.
Times are multiples of one speech position (80 ms with 12.5 positions a second). How good they are
depends on the run: without OTReg or CTC, plans hold little of the alignment.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from otreg_jax import build, evaluate, otreg
from otreg_jax import config as config_lib
from otreg_jax.data import sources
from otreg_jax.models import slm as slm_lib
from otreg_jax.models.layers import length_mask

# A slight position prior settles which of two equal words is which.
POSITION_WEIGHT = 0.3

Words = list[tuple[str, float, float]]


def align(
    run: build.Run, utterances: Sequence[sources.Utterance], batch_size: int = 16
) -> Iterator[tuple[sources.Utterance, Words]]:
    """Yields every utterance with its words and their start and end in seconds.

    Audio that cannot be read is left out and printed.
    """
    for batch in evaluate.batches(run, utterances, batch_size, "aligning"):
        shares_BST, length_B = _shares(run.slm, run.params, batch, run.config.otreg.layer)
        rows = evaluate.to_host(
            (shares_BST, length_B, batch["mel_length"], batch["tokens"], batch["token_length"],
             batch["index"])
        )  # fmt: skip
        for shares_ST, length, frames, tokens_T, num_tokens, i in zip(*rows, strict=True):
            if i < 0 or not num_tokens:
                continue
            starts_T, ends_T = monotone_spans(shares_ST[:length, :num_tokens])
            seconds = frames / 100 / length
            yield (
                utterances[i],
                words_of(
                    run.tokenizer,
                    tokens_T[:num_tokens].tolist(),
                    starts_T * seconds,
                    ends_T * seconds,
                ),
            )


@functools.partial(jax.jit, static_argnames=("slm", "layer"))
def _shares(slm, params, batch, layer: int):
    """The share of each speech position's mass that goes to each token, [B, S, T]."""
    out = slm_lib.forward(slm, params, batch, layer)
    speech_mask_BS = length_mask(out.speech_length_B, out.speech_BSD.shape[1])
    text_mask_BT = length_mask(batch["token_length"], out.text_BTD.shape[1])
    options = evaluate.MEASURED_PLAN | {"position_weight": POSITION_WEIGHT}
    plan_BST = otreg.regularizer(
        out.speech_BSD, out.text_BTD, speech_mask_BS, text_mask_BT, center="mean", **options
    ).plan
    mass_BS1 = plan_BST.sum(axis=2, keepdims=True)
    return plan_BST / jnp.maximum(mass_BS1, 1e-12), out.speech_length_B


def monotone_spans(shares_ST: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The spans [start, end) of speech positions, one a token in order, of largest log share.

    Viterbi: position s belongs to token t(s), t rises by 0 or 1 from one position to the next and
    runs from the first token to the last. With fewer positions than tokens, positions are divided
    first.
    """
    num_speech, num_text = shares_ST.shape
    fold = -(-num_text // num_speech)  # parts of a position, so that every token gets one
    score_ST = np.log(np.maximum(np.repeat(shares_ST, fold, axis=0), 1e-6))
    total_T = np.full(num_text, -np.inf)
    total_T[0] = score_ST[0, 0]
    advanced_ST = np.zeros(score_ST.shape, bool)
    for s in range(1, len(score_ST)):
        from_before_T = np.concatenate([[-np.inf], total_T[:-1]])
        advanced_ST[s] = from_before_T > total_T
        total_T = np.maximum(total_T, from_before_T) + score_ST[s]
    starts_T = np.zeros(num_text)
    t = num_text - 1
    for s in range(len(score_ST) - 1, 0, -1):
        if advanced_ST[s, t]:
            starts_T[t] = s
            t -= 1
    ends_T = np.append(starts_T[1:], len(score_ST))
    return starts_T / fold, ends_T / fold


def words_of(tokenizer, tokens: Sequence[int], starts_T, ends_T) -> Words:
    """Joins tokens to the words of the decoded text (by whitespace)."""
    words = tokenizer.decode(tokens).split()
    spans: dict[int, tuple[float, float]] = {}
    for t, index in enumerate(evaluate.word_index(tokenizer, tokens)):
        start, _ = spans.get(index, (float(starts_T[t]), 0.0))
        spans[index] = (start, float(ends_T[t]))
    return [(words[i], *span) for i, span in sorted(spans.items()) if i < len(words)]


def as_textgrid(words: Words, duration: float) -> str:
    """A Praat TextGrid with one interval tier, "words"; gaps are empty intervals."""
    intervals, at = [], 0.0
    for word, start, end in words:
        if start > at:
            intervals.append(("", at, start))
        intervals.append((word, start, end))
        at = end
    if duration > at:
        intervals.append(("", at, duration))
    end = max(duration, at)
    lines = [
        'File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {end:g}",
        "tiers? <exists>", "size = 1", "item []:", "    item [1]:",
        '        class = "IntervalTier"', '        name = "words"', "        xmin = 0",
        f"        xmax = {end:g}", f"        intervals: size = {len(intervals)}",
    ]  # fmt: skip
    for i, (word, start, stop) in enumerate(intervals, 1):
        quoted = word.replace('"', '""')
        lines += [
            f"        intervals [{i}]:", f"            xmin = {start:g}",
            f"            xmax = {stop:g}", f'            text = "{quoted}"',
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m otreg_jax.align", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("manifest", help="utterances with transcripts (JSONL)")
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--checkpoint", default="newest", help="newest, best or a step")
    parser.add_argument("--textgrid", help="folder for one Praat TextGrid an utterance")
    parser.add_argument("--batch_size", type=int, default=16)
    options = parser.parse_args(arguments)
    config_lib.quiet_and_cached()
    try:
        utterances = sources.read_manifest(options.manifest)
        run = build.load_run(options.workdir, options.checkpoint)
        for utterance, words in align(run, utterances, options.batch_size):
            if options.textgrid:
                name = utterance.id.replace("/", "_").strip("._") + ".TextGrid"
                path = Path(options.textgrid) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(as_textgrid(words, utterance.duration), encoding="utf-8")
            else:
                rounded = [[word, round(start, 3), round(end, 3)] for word, start, end in words]
                print(json.dumps({"id": utterance.id, "words": rounded}, ensure_ascii=False))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
