"""Audio files and records as samples, what is wrong with them, and what is only odd."""

import io
import os
import re
import stat
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from etils import epath

from otreg_jax.data import embedded, records, remote
from otreg_jax.data.utterances import SAMPLE_RATE, BadAudio, Problem, Utterance, in_threads

RATES = (1000, 1_000_000)  # Hz that a header may give
TOLERANCE = 0.1  # seconds between what a manifest says and what is there
LOUDEST = 1e6  # times full scale: floats that are no audio
UNKNOWN = 2**63 - 1  # samples, of a FLAC file that was written into a pipe

# What is usable, but likely not what was meant: kind -> what it is.
ODDITIES = {
    "anti_phase": "the channels cancel out: their mean is silent",
    "silent": "no sample above -80 dB",
    "mostly_silent": "nine tenths or more are below -60 dB",
    "clipped": "1 % of the samples or more are at full scale",
    "over_full_scale": "samples beyond 1.5 of full scale; scaled down to it",
    "cut_off": "the header promises more than the file holds",
}


class Sound(NamedTuple):
    """samples: float32 [N] in [-1, 1]. odd: kinds of ODDITIES."""

    samples: np.ndarray
    odd: tuple[str, ...]


def load_audio(utterance: Utterance, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Reads an utterance's audio as mono at `sample_rate`.

    Args:
      utterance: what to read; WAV, FLAC, Ogg or MP3 at any rate, with any number of channels.
      sample_rate: Hz.

    Returns:
      float32 [N] in [-1, 1], N no more than the manifest's duration. Audio beyond full scale, as
      files of floats may hold it, is scaled down as a whole.

    Raises:
      BadAudio (a ValueError): the file is unreadable, truncated or empty, holds NaN, or is shorter
        or longer by 0.1 s than the manifest says. The message names the file and the line.
    """
    return listen(utterance, sample_rate).samples


def listen(utterance: Utterance, sample_rate: int = SAMPLE_RATE) -> Sound:
    """Audio as of `load_audio`, and what is odd about it."""
    try:
        return _listen(utterance, sample_rate)
    except BadAudio as error:
        raise BadAudio(error.kind, error.reason, utterance.where) from None


def _listen(utterance: Utterance, sample_rate: int) -> Sound:
    path, duration = utterance.audio, utterance.duration
    cut_off = False
    if path.startswith(records.PREFIX):
        audio, rate = records.read_audio(path)
        audio = audio[:, None] if audio.ndim == 1 else audio
        if utterance.offset is not None:
            start = round(utterance.offset * rate)
            audio = audio[start : start + round(duration * rate)]
    else:
        audio, rate, cut_off = _read_file(utterance)
    if not len(audio):
        raise BadAudio("zero_length", f"{path} holds no audio")
    _check_duration(path, len(audio) / rate, duration, rate)
    if not np.isfinite(audio).all():
        raise BadAudio("nan_samples", f"{path} holds samples that are not finite")
    if np.abs(audio).max() > LOUDEST:
        raise BadAudio("nan_samples", f"{path} holds samples as large as {np.abs(audio).max():.1g}")
    mono = audio[:, 0] if audio.shape[1] == 1 else audio.mean(axis=1)
    odd = _oddities(audio, mono, rate) + (["cut_off"] if cut_off else [])
    if rate != sample_rate:
        mono = soxr.resample(mono, rate, sample_rate)
    mono = mono[: round(duration * sample_rate)]
    return Sound(mono / max(1.0, np.abs(mono).max(initial=0.0)), tuple(odd))


def _check_duration(path: str, seconds: float, duration: float, rate: int) -> None:
    if abs(seconds - duration) > TOLERANCE:
        message = f"{path} holds {seconds:.2f} s of audio, the manifest says {duration:.2f} s"
        raise BadAudio("duration_mismatch", message + f" (its header says {rate} Hz)")


def _oddities(audio_NC: np.ndarray, mono_N: np.ndarray, rate: int) -> list[str]:
    level = np.abs(mono_N)
    peak, frame = level.max(), max(rate // 50, 1)
    power = np.square(mono_N[: len(mono_N) // frame * frame]).reshape(-1, frame).mean(axis=1)
    cancelled = np.square(mono_N).mean() < 1e-4 * np.square(audio_NC).mean()
    found = {
        "anti_phase": audio_NC.shape[1] > 1 and cancelled,
        "silent": peak < 1e-4 and not cancelled,
        "mostly_silent": peak >= 1e-4 and len(power) and (power < 1e-6).mean() >= 0.9,
        "clipped": peak <= 1 and (level > 0.999).mean() >= 0.01,
        "over_full_scale": peak > 1.5,
    }
    return [kind for kind, is_so in found.items() if is_so]


def _read_file(utterance: Utterance) -> tuple[np.ndarray, int, bool]:
    """float32 [N, channels], the rate of a file, or of the part of it that is the utterance, and
    whether the header promises more than is there."""
    path, offset, duration = utterance.audio, utterance.offset, utterance.duration
    with open_audio(path) as file:
        rate = file.samplerate
        try:
            if offset is None:
                # Nothing that is too long is read, whatever length a broken header promises.
                _check_duration(path, max(file.frames / rate, duration), duration, rate)
                audio = file.read(dtype="float32", always_2d=True)
            else:
                file.seek(min(round(offset * rate), file.frames))
                audio = file.read(round(duration * rate), "float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError, MemoryError) as error:
            raise BadAudio("unreadable", f"{path} is damaged: {_reason(error)}") from None
        if offset is None and 0 < len(audio) < file.frames:
            found = f"{len(audio)} of {file.frames} samples"
            raise BadAudio("unreadable", f"{path} is truncated: {found}")
        return audio, rate, bool(cut_off(file))


def read_duration(utterance: Utterance) -> float:
    """Seconds from an utterance's offset to the end of its file, by the header.

    Raises:
      BadAudio: the file is unreadable, holds no audio, or less than its header promises.
    """
    with open_audio(utterance.audio) as file:
        duration = file.frames / file.samplerate - (utterance.offset or 0.0)
        missing = cut_off(file)
    if missing:
        raise BadAudio("unreadable", f"{utterance.audio} is truncated: {missing}")
    if duration <= 0:
        raise BadAudio("zero_length", f"{utterance.audio} holds no audio")
    return duration


def fill_durations(utterances: list[Utterance]) -> tuple[list[Utterance], list[Problem]]:
    """Reads the duration from the audio file's header where the manifest does not give it."""
    without = [i for i, u in enumerate(utterances) if not u.duration]

    def read(i):
        utterance = utterances[i]
        try:
            return utterance._replace(duration=read_duration(utterance))
        except BadAudio as error:
            return Problem(error.kind, utterance.where, error.reason)

    filled = list(utterances)
    outcomes = in_threads(read, without, "reading durations") if without else []
    for i, outcome in zip(without, outcomes, strict=True):
        filled[i] = outcome
    problems = [outcome for outcome in filled if isinstance(outcome, Problem)]
    return [outcome for outcome in filled if isinstance(outcome, Utterance)], problems


def from_file(path: str) -> Utterance:
    """An audio file as an utterance without a transcript.

    Raises:
      BadAudio: it is unreadable.
      OSError: it lies in a bucket that does not answer.
    """
    try:
        place = remote.localize(path)
    except ValueError as error:
        raise BadAudio("unreadable", str(error)) from None
    remote.check([place], "the audio lies there")
    utterance = Utterance(path, place, "", 0.0, where=path)
    return utterance._replace(duration=read_duration(utterance))


def open_audio(path: str) -> soundfile.SoundFile:
    """Opens an audio file. Raises BadAudio if it is none, or its header promises what cannot be."""
    try:
        if embedded.is_address(path):
            data = embedded.read(path)
            return _opened(soundfile.SoundFile(io.BytesIO(data)), path, len(data))
        elsewhere = "://" in path
        size = epath.Path(path).stat().length if elsewhere else _size_of_file(path)
        if not size:
            raise BadAudio("unreadable", f"{path} is empty")
        file = soundfile.SoundFile(epath.Path(path).open("rb") if elsewhere else path)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        if isinstance(error, BadAudio):
            raise
        reason = _reason(error)
        raise BadAudio("unreadable", f"{path} cannot be read as audio: {reason}") from None
    return _opened(file, path, size)


def _opened(file: soundfile.SoundFile, path: str, size: int) -> soundfile.SoundFile:
    """The file, if its header promises what can be."""
    rate, frames = file.samplerate, file.frames
    # Digital silence in FLAC is the densest there is: some thousand samples a byte.
    if not (RATES[0] <= rate <= RATES[1] and 0 <= frames <= 10_000 * size):
        file.close()
        if frames == UNKNOWN:
            reason = "does not say in its header how long it is: write it anew, into a file"
            raise BadAudio("unreadable", f"{path} {reason}")
        promise = f"{frames} samples at {rate} Hz in a file of {size} bytes"
        raise BadAudio("unreadable", f"{path} has a broken header: it says {promise}")
    return file


def _size_of_file(path: str) -> int:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device may never end
        raise OSError("it is not a file")
    return found.st_size


def _reason(error: Exception) -> str:
    return getattr(error, "error_string", "") or getattr(error, "strerror", "") or str(error)


def cut_off(file: soundfile.SoundFile) -> str:
    """What an open file lacks of what its header promises; "" for nothing.

    libsndfile reads such files as if they were whole, but writes the difference into its log.
    """
    for promised, found in re.findall(r": (\d+) \(should be (\d+)\)", file.extra_info):
        # Programs that write into a pipe do not know the size, and write 2**31 - 1 or more.
        if int(found) + 100 < int(promised) < 2**31 - 2**16:
            return f"the header says {promised} bytes, there are {found}"
    if "lacks an end-of-stream bit" in file.extra_info:
        return "its last page is missing"
    if "Junk after the last page" in file.extra_info:
        return "it ends within a page"
    return ""


def places(odd: Sequence[tuple[str, Sequence[str]]]) -> dict[str, list[str]]:
    """{kind of ODDITIES: where} from (where, kinds) of utterances."""
    found = {kind: [where for where, kinds in odd if kind in kinds] for kind in ODDITIES}
    return {kind: places for kind, places in found.items() if places}


def report(odd: Sequence[tuple[str, Sequence[str]]], heard: int) -> list[str]:
    """Lines that name what is odd, from (where, kinds) of utterances; none if nothing is.

    heard: how many utterances were listened to.
    """
    number = sum(bool(kinds) for _, kinds in odd)
    lines = [f"data report: {number} of {heard} utterances can be used, but are odd:"]
    for kind, found in places(odd).items():
        shown = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
        lines.append(f"  {kind} {len(found)}: {ODDITIES[kind]} ({shown})")
    return lines if number else []
