"""Word times from transport plans: forced alignment of a manifest's transcripts to its audio.

    python -m otreg_jax.align --workdir=DIR manifest.jsonl > aligned.jsonl
    python -m otreg_jax.align --workdir=DIR --textgrid=grids/ manifest.jsonl

Prints one JSON object an utterance, {"id", "words": [[word, start, end], ...], "confidence"}: times
in seconds, and for each word a number from 0 to 1, the plan's share that backs its time. The same
"words" in a manifest are what long audio is cut by. --textgrid writes Praat files instead. Words
are the transcript's, in languages without spaces its letters; silence belongs to none of them.
Times are multiples of one speech position (80 ms with 12.5 positions a second). How good they are
depends on the run: without OTReg or CTC, plans hold little of the alignment.
"""

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from otreg_jax import alignment, build, command, recognition
from otreg_jax.data import prompts, sources


def as_textgrid(words: Sequence[alignment.Word], duration: float) -> str:
    """A Praat TextGrid with one interval tier, "words"; gaps are empty intervals."""
    intervals, at = [], 0.0
    for word, start, end, _ in words:
        if start > at:
            intervals.append(("", at, start))
        intervals.append((word, start, end))
        at = end
    if duration > at:
        intervals.append(("", at, duration))
    end = max(duration, at)
    lines = [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        "xmin = 0",
        f"xmax = {end:g}",
        "tiers? <exists>",
        "size = 1",
        "item []:",
        "    item [1]:",
        '        class = "IntervalTier"',
        '        name = "words"',
        "        xmin = 0",
        f"        xmax = {end:g}",
        f"        intervals: size = {len(intervals)}",
    ]
    for i, (word, start, stop) in enumerate(intervals, 1):
        quoted = word.replace('"', '""')
        lines += [
            f"        intervals [{i}]:",
            f"            xmin = {start:g}",
            f"            xmax = {stop:g}",
            f'            text = "{quoted}"',
        ]
    return "\n".join(lines) + "\n"


def define_flags(define) -> None:
    command.define_run(define)
    define.string("textgrid", None, "Folder for one Praat TextGrid an utterance.")
    define.integer("batch_size", 16, "Utterances aligned at once.", 1)


def main(values, arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise ValueError(f"one manifest is aligned at a time, these are {len(arguments)}")
    run = build.load_run(values.workdir, values.checkpoint)
    utterances, problems = sources.scan(
        arguments[0], require_text=not run.config.tasks, columns=prompts.columns(run.config)
    )
    utterances, unfit = prompts.expand(utterances, run.config)
    sources.handle(problems + unfit, "raise", None)
    utterances = [u for u in utterances if u.task in ("", prompts.TRANSCRIBE)]
    for utterance, words in recognition.aligned(run, utterances, values.batch_size):
        if values.textgrid:
            name = utterance.id.replace("/", "_").strip("._") + ".TextGrid"
            path = Path(values.textgrid) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(as_textgrid(words, utterance.duration), encoding="utf-8")
        else:
            line = {
                "id": utterance.id,
                "words": [[word.text, round(word.start, 3), round(word.end, 3)] for word in words],
                "confidence": [round(word.confidence, 3) for word in words],
            }
            print(json.dumps(line, ensure_ascii=False))


cli = functools.partial(command.run, main, define_flags, required=["workdir"], arguments="MANIFEST")

if __name__ == "__main__":
    sys.exit(cli())
