"""Word times from transport plans: forced alignment of a manifest's transcripts to its audio.

    python -m otreg_jax.align --workdir=DIR manifest.jsonl > aligned.jsonl
    python -m otreg_jax.align --workdir=DIR --textgrid=grids/ manifest.jsonl

Prints one JSON object an utterance: {"id", "words": [[word, start, end], ...]}, times in seconds;
the same "words" in a manifest are what long audio is cut by. --textgrid writes Praat files instead.
Times are multiples of one speech position (80 ms with 12.5 positions a second). How good they are
depends on the run: without OTReg or CTC, plans hold little of the alignment.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from otreg_jax import alignment, build, recognition
from otreg_jax import config as config_lib
from otreg_jax.data import sources


def as_textgrid(words: alignment.Words, duration: float) -> str:
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
        for utterance, words in recognition.aligned(run, utterances, options.batch_size):
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
