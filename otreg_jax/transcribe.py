"""Transcribes audio files.

    python -m otreg_jax.transcribe --workdir=DIR a.wav b.flac "talks/*.mp3"
    find . -name "*.wav" | python -m otreg_jax.transcribe --workdir=DIR -
    python -m otreg_jax.transcribe --workdir=DIR talk.flac --srt > talk.srt

Prints one line a file: its path, a tab, the text. Audio longer than the model takes is cut at its
quietest moments; --json, --srt and --vtt give the parts with their times in seconds. A file that
cannot be read is reported and left out; the exit status is then 1.
"""

import argparse
import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from otreg_jax import build, decoding, recognition
from otreg_jax import config as config_lib
from otreg_jax.data import sets, sources

MIN_CHUNK = 0.5  # of the longest allowed: where the search for a quiet moment begins
QUIET_WINDOW = 0.2  # seconds over which loudness is averaged
TOKENS_PER_SECOND = 16  # no language is spoken faster; bounds a hypothesis that would not end


class Segment(NamedTuple):
    """A piece of a file: start and end in seconds, its text, and the log probability of it."""

    start: float
    end: float
    text: str
    score: float


def transcribe(
    run: build.Run,
    paths: Sequence[str],
    *,
    settings: decoding.Settings | None = None,
    chunk_seconds: float | None = None,
    batch_size: int = 16,
) -> tuple[dict[str, list[Segment]], dict[str, str]]:
    """Transcribes audio files, all pieces of all files batched together.

    Args:
      run: a trained model, from `build.load_run`.
      settings: how to decode; greedy by default.
      chunk_seconds: longest piece; by default what the model was trained to take.

    Returns:
      {path: segments in order of time} and {path: reason} of the files that could not be read.
    """
    limit = min(chunk_seconds or np.inf, sets.max_seconds(run.config))
    pieces, failures = [], {}
    for path in paths:
        try:
            pieces += split(sources.from_file(path), limit)
        except sources.BadAudio as error:
            failures[path] = str(error)
    segments: dict[str, list[Segment]] = {path: [] for path in paths if path not in failures}
    if pieces:
        longest = max(piece.duration for piece in pieces)
        max_tokens = run.config.decode.max_tokens or 8 + int(TOKENS_PER_SECOND * longest)
        settings = settings or decoding.Settings(max_tokens)
        for piece, text, score in _recognize(run, pieces, settings, batch_size):
            start = piece.offset or 0.0
            segments[piece.audio].append(Segment(start, start + piece.duration, text, score))
    return {path: sorted(found) for path, found in segments.items()}, failures


def _recognize(run, pieces, settings, batch_size) -> Iterator[tuple[sources.Utterance, str, float]]:
    for batch in recognition.batches(run, pieces, batch_size, "transcribing"):
        decoded = decoding.recognize(
            run.slm, run.params, batch["mel"], batch["mel_length"], settings
        )
        tokens_BN, length_B, score_B, _, index_B = recognition.to_host((*decoded, batch["index"]))
        for tokens_N, length, score, i in zip(tokens_BN, length_B, score_B, index_B, strict=True):
            if i >= 0:
                text = run.tokenizer.decode(tokens_N[:length].tolist()).strip()
                yield pieces[i], text, float(score)


def split(utterance: sources.Utterance, limit: float) -> list[sources.Utterance]:
    """Pieces of at most `limit` seconds, cut where the audio is quietest; one if it is short.

    Raises BadAudio when the audio cannot be read.
    """
    if utterance.duration <= limit:
        sources.load_audio(utterance)
        return [utterance]
    edges = quiet_cuts(sources.load_audio(utterance), sources.SAMPLE_RATE, limit)
    return [
        utterance._replace(id=f"{utterance.id}@{start:.2f}", offset=start, duration=end - start)
        for start, end in zip(edges, edges[1:], strict=False)
    ]


def quiet_cuts(audio_N: np.ndarray, sample_rate: int, limit: float) -> list[float]:
    """Times in seconds, 0 and the end included, that part the audio at its quietest moments.

    Every part is at most `limit` seconds, and all but the last at least MIN_CHUNK of it.
    """
    hop = sample_rate // 100
    frames = -(-len(audio_N) // hop)
    power_F = np.square(np.pad(audio_N, (0, frames * hop - len(audio_N)))).reshape(-1, hop).mean(1)
    window = int(100 * QUIET_WINDOW)
    loudness_F = np.convolve(power_F, np.ones(window) / window, mode="same")
    edges, most = [0], int(100 * limit)
    while frames - edges[-1] > most:
        first = edges[-1] + int(MIN_CHUNK * most)
        # The last of equally quiet moments: digital silence should not cut every piece short.
        candidates = loudness_F[first : edges[-1] + most + 1][::-1]
        edges.append(first + len(candidates) - 1 - int(candidates.argmin()))
    return [edge / 100 for edge in edges] + [len(audio_N) / sample_rate]


# Output ----------------------------------------------------------------------------------------


def as_json(path: str, segments: Sequence[Segment]) -> str:
    """One line: {"file", "text", "segments": [{"start", "end", "text", "score"}]}."""
    line: dict[str, Any] = {"file": path, "text": joined(segments)}
    line["segments"] = [
        {"start": round(s.start, 3), "end": round(s.end, 3), "text": s.text, "score": s.score}
        for s in segments
    ]
    return json.dumps(line, ensure_ascii=False)


def as_subtitles(segments: Sequence[Segment], kind: str) -> str:
    """SubRip ("srt") or WebVTT ("vtt") subtitles; pieces without text are left out."""
    mark = "," if kind == "srt" else "."

    def stamp(seconds: float) -> str:
        milliseconds = round(1000 * seconds)
        minutes, milliseconds = divmod(milliseconds, 60_000)
        whole = f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}"
        return f"{whole}{mark}{milliseconds % 1000:03}"

    spoken = [s for s in segments if s.text]
    cues = [
        f"{i}\n{stamp(s.start)} --> {stamp(s.end)}\n{s.text}\n" for i, s in enumerate(spoken, 1)
    ]
    return ("WEBVTT\n\n" if kind == "vtt" else "") + "\n".join(cues)


def joined(segments: Sequence[Segment]) -> str:
    """The text of a whole file."""
    return " ".join(s.text for s in segments if s.text)


def expand(arguments: Iterable[str], stdin: Iterable[str]) -> list[str]:
    """Paths of the arguments: globs expanded, "-" replaced by the lines of stdin, each path once.

    Raises FileNotFoundError, naming every argument that fits no file.
    """
    listed = [
        item
        for argument in arguments
        for item in ([line.strip() for line in stdin] if argument == "-" else [argument])
        if item
    ]
    paths, missing = {}, []
    for item in listed:
        found = [item] if os.path.exists(item) else sorted(glob.glob(item, recursive=True))
        paths.update(dict.fromkeys(found))
        missing += [] if found else [item]
    if missing:
        raise FileNotFoundError("no such audio file: " + ", ".join(missing))
    return list(paths)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m otreg_jax.transcribe", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("files", nargs="+", help='audio files or globs; "-": a list on stdin')
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--checkpoint", default="newest", help="newest, best or a step")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object a file")
    output.add_argument("--srt", action="store_true", help="SubRip subtitles (one file)")
    output.add_argument("--vtt", action="store_true", help="WebVTT subtitles (one file)")
    parser.add_argument("--chunk_seconds", type=float, help="longest piece decoded at once")
    parser.add_argument("--batch_size", type=int, default=16)
    options = parser.parse_args(arguments)
    config_lib.quiet_and_cached()
    try:
        paths = expand(options.files, sys.stdin)
        if (options.srt or options.vtt) and len(paths) != 1:
            raise ValueError(f"--srt and --vtt take one file, these are {len(paths)}")
        run = build.load_run(options.workdir, options.checkpoint)
        found, failures = transcribe(
            run, paths, chunk_seconds=options.chunk_seconds, batch_size=options.batch_size
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path, segments in found.items():
        if options.json:
            print(as_json(path, segments))
        elif options.srt or options.vtt:
            print(as_subtitles(segments, "srt" if options.srt else "vtt"), end="")
        else:
            print(f"{path}\t{joined(segments)}")
    for reason in failures.values():
        print(f"error: {reason}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
