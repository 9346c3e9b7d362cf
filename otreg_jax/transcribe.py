"""Transcribes audio files.

    python -m otreg_jax.transcribe --workdir=DIR a.wav b.flac "talks/*.mp3"
    find . -name "*.wav" | python -m otreg_jax.transcribe --workdir=DIR -
    python -m otreg_jax.transcribe --workdir=DIR --language=de --context=words.txt talk.flac
    python -m otreg_jax.transcribe --workdir=DIR --task=translate --to=en talk.flac
    python -m otreg_jax.transcribe --workdir=DIR --task=answer --prompt="Who speaks?" talk.flac
    python -m otreg_jax.transcribe --workdir=DIR talk.flac --srt > talk.srt

Prints one line a file: its path, a tab, the text. Audio longer than the model was trained on is cut
at its quietest moments; --json gives the parts with their times in seconds, --srt and --vtt cues of
two lines, their words timed by `otreg_jax.align`'s plans. What a piece can say is limited by its
length; one that ran into the limit is unfinished, which is said. A file that cannot be read is
reported and left out; the exit status is then 1.
"""

import functools
import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from otreg_jax import build, command, decoding, recognition, sharding, subtitles
from otreg_jax.data import features, prompts, sets, sources, text
from otreg_jax.models import slm as slm_lib

MIN_CHUNK = 0.5  # of the longest allowed: where the search for a quiet moment begins
QUIET_WINDOW = 0.2  # seconds over which loudness is averaged
# No language is spoken faster: bounds a hypothesis that would not end.
TOKENS, TOKENS_PER_SECOND = 8, 16


class Segment(NamedTuple):
    """A piece of a file: start and end in seconds, its text, the log probability of it, and whether
    it ended, not ran into the limit of tokens."""

    start: float
    end: float
    text: str
    score: float
    finished: bool = True


def transcribe(
    run: build.Run,
    paths: Sequence[str],
    *,
    settings: decoding.Settings | None = None,
    chunk_seconds: float | None = None,
    silence_db: float | None = None,
    batch_size: int = 16,
    asked: Mapping[str, Any] | None = None,
) -> tuple[dict[str, list[Segment]], dict[str, str]]:
    """Transcribes audio files, all pieces of all files batched together.

    Args:
      run: a trained model, from `build.load_run`; `ask` says what it is asked.
      settings: how to decode; greedy by default. Of max_tokens, 0 is `decode.max_tokens` of the run
        or, by default, what the length of a piece allows: TOKENS and TOKENS_PER_SECOND.
      chunk_seconds: longest piece; by default the longest that the model was trained on.
      silence_db: a piece that is never louder (RMS of 0.2 s, in dB of full scale) says nothing.
      asked: what utterances hold beside audio, from `ask`.

    Returns:
      {path: segments in order of time} and {path: reason} of the files that could not be read.

    Raises:
      ValueError: a setting is none, or would have no effect.
    """
    settings = settings or decoding.Settings(0)
    decoding.check(settings)
    limit = longest_piece(run, chunk_seconds)
    pieces, failures = [], {}
    for path in paths:
        try:
            pieces += split(sources.from_file(path)._replace(**asked or {}), limit)
        except sources.BadAudio as error:
            failures[path] = str(error)
    segments: dict[str, list[Segment]] = {path: [] for path in paths if path not in failures}
    if silence_db is not None:
        everything, pieces = pieces, []
        for piece in everything:
            if loudness(sources.load_audio(piece)) > silence_db:
                pieces.append(piece)
            else:
                segments[piece.audio].append(_segment(piece, "", 0.0, True))
    if pieces:
        for piece, *heard in _recognize(run, pieces, settings, batch_size):
            segments[piece.audio].append(_segment(piece, *heard))
    return {path: sorted(found) for path, found in segments.items()}, failures


def ask(run: build.Run, task: str = "", template: str = "", **columns) -> tuple[build.Run, dict]:
    """The run with the one task and prompt that it is to be asked, and what utterances then hold;
    arguments and errors as for `prompts.ask`."""
    config, asked = prompts.ask(run.config, task, template, **columns)
    slm = run.slm._replace(prompt=prompts.shared(run.tokenizer, config))
    return run._replace(config=config, slm=slm), asked


def longest_piece(run: build.Run, chunk_seconds: float | None = None) -> float:
    """Seconds of audio to decode at once: `chunk_seconds`, or what the model was trained on.

    Raises ValueError when the model cannot take so much.
    """
    most = sets.max_seconds(run.config)
    if chunk_seconds is None:
        return min(run.longest_seconds, most)
    if not 0.1 <= chunk_seconds <= most:
        raise ValueError(f"chunk_seconds={chunk_seconds:g}: the model takes 0.1 to {most:g} s")
    return chunk_seconds


def _segment(piece: sources.Utterance, text: str, score: float, finished: bool) -> Segment:
    start = piece.offset or 0.0
    return Segment(start, start + piece.duration, text, score, finished)


def _recognize(run, pieces, settings, batch_size) -> Iterator[tuple]:
    """(piece, text, score, whether it ended) of every piece."""
    fixed = settings.max_tokens or run.config.decode.max_tokens
    longest = max(piece.duration for piece in pieces)
    settings = settings._replace(max_tokens=fixed or int(_tokens(longest)))
    params = decoding.for_run(run.slm, run.params)
    for batch in recognition.batches(run, pieces, batch_size, "transcribing"):
        seconds_B = batch["mel_length"] / features.FRAME_RATE
        limit_B = None if fixed else _tokens(seconds_B).astype("int32")
        mel, prompt = (batch["mel"], batch["mel_length"]), slm_lib.prompt_of(batch)
        decoded = decoding.recognize(run.slm, params, *mel, settings, limit_B, prompt)
        rows = sharding.to_host((*decoded, batch["index"]))
        for tokens_N, length, score, finished, i in zip(*rows, strict=True):
            if i >= 0:
                text = run.tokenizer.decode(tokens_N[:length].tolist()).strip()
                yield pieces[i], text, float(score), bool(finished)


def _tokens(seconds):
    """How many tokens so much audio may be said to hold."""
    return TOKENS + TOKENS_PER_SECOND * seconds


def loudness(audio_N: np.ndarray) -> float:
    """RMS of the loudest QUIET_WINDOW, in dB of full scale."""
    window = max(int(sources.SAMPLE_RATE * QUIET_WINDOW), 1)
    power_N = np.convolve(np.square(audio_N, dtype=np.float64), np.ones(window) / window)
    return 10 * np.log10(max(power_N.max(initial=0), 1e-20))


def word_times(
    run: build.Run,
    path: str,
    segments: Sequence[Segment],
    batch_size: int = 16,
    asked: Mapping[str, Any] | None = None,
) -> list[tuple[str, float, float]]:
    """The words of a file's segments with start and end in seconds, from transport plans."""
    whole = sources.from_file(path)._replace(**asked or {})
    spoken = [
        whole._replace(text=s.text, offset=s.start, duration=s.end - s.start)
        for s in segments
        if s.text
    ]
    timed = [
        (word.text, piece.offset + word.start, piece.offset + word.end)
        for piece, words in (recognition.aligned(run, spoken, batch_size) if spoken else ())
        for word in words
    ]
    return sorted(timed, key=lambda word: word[1:])


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
    """One line: {"file", "text", "segments": [{"start", "end", "text", "score", "unfinished"}]}."""
    line: dict[str, Any] = {"file": path, "text": joined(segments)}
    line["segments"] = [
        {
            "start": round(s.start, 3),
            "end": round(s.end, 3),
            "text": s.text,
            "score": s.score,
            "unfinished": not s.finished,
        }
        for s in segments
    ]
    return json.dumps(line, ensure_ascii=False)


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


def define_flags(define) -> None:
    command.define_run(define)
    define.bool("json", False, "Print one JSON object a file.")
    define.bool("srt", False, "Print SubRip subtitles (of one file).")
    define.bool("vtt", False, "Print WebVTT subtitles (of one file).")
    longest = "Longest piece decoded at once; by default the longest that was trained on."
    define.float("chunk_seconds", None, longest)
    define.float("silence_db", None, "Pieces never louder than this (-60, say) say nothing.")
    define.string("task", "", "What to do, one of the run's tasks; by default to transcribe.")
    define.string("language", "", "The language that is spoken, by any usual name.")
    define.string("to", "", "The language to translate into.")
    define.string("context", "", "File of words that may occur, one a line.")
    define.string("prompt", "", "A question about the audio; with {speech}, a whole prompt.")
    decoding.define_flags(define)
    define.integer("batch_size", 16, "Pieces decoded at once.", 1)


def main(values, arguments: Sequence[str]) -> int:
    if values.json + values.srt + values.vtt > 1:
        raise ValueError("--json, --srt, --vtt: choose one of them")
    kind = "srt" if values.srt else "vtt" if values.vtt else ""
    paths = expand(arguments, sys.stdin)
    if kind and len(paths) != 1:
        raise ValueError(f"--srt and --vtt take one file, these are {len(paths)}")
    run, asked = _asked(values, build.load_run(values.workdir, values.checkpoint))
    if kind and asked["task"] != prompts.TRANSCRIBE:
        raise ValueError(f"--{kind}: only words that are spoken have times; --task=transcribe")
    found, failures = transcribe(
        run,
        paths,
        asked=asked,
        chunk_seconds=values.chunk_seconds,
        batch_size=values.batch_size,
        silence_db=values.silence_db,
        settings=decoding.settings_of(values),
    )
    timed = {p: word_times(run, p, s, asked=asked) for p, s in found.items()} if kind else {}
    for path, segments in found.items():
        if values.json:
            print(as_json(path, segments))
        elif kind:
            print(subtitles.as_text(subtitles.cues(timed[path]), kind), end="")
        else:
            print(f"{path}\t{joined(segments)}")
        if unfinished := sum(not s.finished for s in segments):
            print(
                f"{path}: {unfinished} of {len(segments)} pieces ran into the limit of tokens; "
                "they may hold chatter instead of speech",
                file=sys.stderr,
            )
    for reason in failures.values():
        print(f"error: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _asked(values, run: build.Run) -> tuple[build.Run, dict]:
    """`ask` as the flags say."""
    words = ()
    if values.context:
        lines = Path(values.context).read_text(encoding="utf-8").splitlines()
        words = tuple(line.strip() for line in lines if line.strip())
    prompt = text.from_shell(values.prompt)
    is_template = text.SPEECH in prompt
    return ask(
        run,
        values.task,
        template=prompt if is_template else "",
        lang=values.language,
        target_lang=values.to,
        context=words,
        prompt="" if is_template else prompt,
    )


cli = functools.partial(command.run, main, define_flags, required=["workdir"], arguments="FILE...")

if __name__ == "__main__":
    sys.exit(cli())
