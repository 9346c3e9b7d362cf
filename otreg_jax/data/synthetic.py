"""Synthetic speech from eSpeak NG: many voices, any language, several recording conditions.

eSpeak NG is under the GPL and keeps hidden state between utterances, so it never enters the
caller's process: `synthesize` deals the utterances to fresh processes of this file, a fixed number
each, every one with the same random seed. The audio is therefore the same on every run and any
number of cores. What those processes run imports neither jax nor the rest of the package.
"""

import concurrent.futures
import ctypes
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SAMPLE_RATE = 16000  # utterances.SAMPLE_RATE, which these processes do not import
CHUNK = 100  # utterances a process; changing it changes the audio
VERSION = 3  # part of the cache key: raise it when the audio or the manifest changes


class Speech(NamedTuple):
    """One utterance to be synthesized, and the conditions it is recorded in."""

    text: str
    voice: str = "en-us"  # any eSpeak voice, with a variant after "+": "de+f3"
    rate: int = 175  # words a minute
    pitch: int = 50  # 0 to 99
    lang: str = "en"
    speaker: str = ""  # defaults to the voice
    reverb: float = 0.0  # seconds in which the room's echo falls by 60 dB
    snr: float | None = None  # dB of speech over added pink noise
    silence: tuple[float, float] = (0.0, 0.0)  # seconds before and after; otherwise trimmed


def synthesize(sets: Mapping[str, Sequence[Speech]], cache_dir: str | Path) -> dict[str, Path]:
    """Speaks every set into `cache_dir` as 16 kHz WAV files with a manifest beside them.

    A set already there under the same content is not spoken again, and one whose synthesis was
    interrupted leaves nothing behind that could be taken for a whole one.

    Args:
      sets: name of a set → its utterances.
      cache_dir: directory shared by any number of runs; made if missing.

    Returns:
      Name of a set → the path of its manifest.jsonl, in the order of `sets`. Beside the usual keys
      each line has "words": [[word, start, end], ...] in seconds, as eSpeak reports them.

    Raises:
      ImportError: eSpeak NG is not installed.
      ValueError: eSpeak NG does not know a voice, or an utterance came out silent.
    """
    cache_dir = Path(cache_dir)
    folders = {name: cache_dir / f"{name}-{_content_key(items)}" for name, items in sets.items()}
    missing = {n: f for n, f in folders.items() if not (f / "manifest.jsonl").exists()}
    if missing:
        if importlib.util.find_spec("espeakng_loader") is None:
            raise ImportError(
                "synthetic speech needs eSpeak NG, which is not installed: "
                "run `pip install espeakng-loader`"
            )
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".unfinished-") as scratch:
            _speak({name: sets[name] for name in missing}, Path(scratch))
            for name, folder in missing.items():
                # Another process may have finished the same set meanwhile: its files are the same.
                if not folder.exists():
                    (Path(scratch) / name).rename(folder)
    return {name: folder / "manifest.jsonl" for name, folder in folders.items()}


def _content_key(items: Sequence[Speech]) -> str:
    content = json.dumps([VERSION, CHUNK, [item._asdict() for item in items]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _speak(sets: Mapping[str, Sequence[Speech]], scratch: Path) -> None:
    """Speaks the sets into scratch/NAME, a chunk of utterances a process, a process a core."""
    import tqdm

    jobs = []
    for name, items in sets.items():
        (scratch / name / "audio").mkdir(parents=True)
        jobs += [
            (name, start, items[start : start + CHUNK]) for start in range(0, len(items), CHUNK)
        ]

    def run(job):
        name, start, items = job
        request = json.dumps({"start": start, "items": items})
        # -P: this folder's module names must not shadow those of the standard library.
        command = [sys.executable, "-P", __file__, str(scratch / name)]
        done = subprocess.run(command, input=request, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise ValueError(f"synthetic speech, set {name!r}: {reason[0]}")
        return name, start, done.stdout, len(items)

    lines = {}
    workers = min(len(jobs), os.cpu_count() or 1)
    total = sum(len(items) for items in sets.values())
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        tqdm.tqdm(total=total, desc="synthesizing speech", unit="utt", mininterval=0.5) as progress,
    ):
        futures = [pool.submit(run, job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                name, start, manifest, count = future.result()
                lines[name, start] = manifest
                progress.update(count)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for name in sets:
        manifest = "".join(lines[key] for key in sorted(lines) if key[0] == name)
        (scratch / name / "manifest.jsonl").write_text(manifest, encoding="utf-8")


# ------------------------------------------------------------------------------------------------
# What follows runs in a process of its own.
# ------------------------------------------------------------------------------------------------


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):  # espeak_EVENT of speak_lib.h
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # 1-based, in characters
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


class _Voice(ctypes.Structure):  # espeak_VOICE of speak_lib.h
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),  # a priority byte, a name, a zero byte; several times
        ("identifier", ctypes.c_char_p),
        ("attributes", ctypes.c_ubyte * 4),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    ]


_WORD, _RATE, _PITCH, _UTF8, _SYNCHRONOUS = 1, 1, 3, 1, 2
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


def _load_espeak():
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path().encode()
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
    if rate <= 0:
        raise RuntimeError(f"eSpeak NG did not start with its data in {data.decode()}")
    library.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(_Voice))
    library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    library.espeak_ng_SetRandSeed(1)
    return library, rate


def _set_voice(library, voice: str) -> None:
    """Selects a voice by its name or, as in "en-gb" and "fr-fr", by the language it speaks."""
    import espeakng_loader

    base, plus, variant = voice.partition("+")
    variants = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    # eSpeak itself passes over an unknown variant in silence.
    if plus and not (variants / variant).is_file():
        known = " ".join(sorted(path.name for path in variants.iterdir() if " " not in path.name))
        raise ValueError(f"eSpeak NG has no voice variant {variant!r} ({voice!r}); it has {known}")
    if library.espeak_SetVoiceByName(voice.encode()) == 0:
        return
    voices, i = library.espeak_ListVoices(None), 0
    while voices[i]:
        if voices[i].contents.languages[1:].decode() == base.lower():
            identifier = voices[i].contents.identifier.decode()
            if library.espeak_SetVoiceByName((identifier + plus + variant).encode()) == 0:
                return
        i += 1
    raise ValueError(f"eSpeak NG has no voice {voice!r}; `espeak-ng --voices` lists them")


def _pronounce(library, item: Speech):
    """Returns int16 samples at eSpeak's rate and [(word, start s), ...]."""
    import numpy as np

    pieces, words = [], []

    def receive(samples, count, events):
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type:
            if events[i].type == _WORD:
                words.append((events[i].text_position - 1, events[i].audio_position / 1000))
            i += 1
        return 0

    callback = _CALLBACK(receive)
    library.espeak_SetSynthCallback(callback)
    _set_voice(library, item.voice)
    library.espeak_SetParameter(_RATE, item.rate, 0)
    library.espeak_SetParameter(_PITCH, item.pitch, 0)
    text = item.text.encode() + b"\0"
    library.espeak_Synth(text, len(text), 0, 1, 0, _UTF8, None, None)
    # eSpeak speaks some pairs ("on the") as one word: a word reaches to where the next begins. Of
    # others ("no longer") it says that the second begins one letter into the first.
    words = [(first, time) for first, time in words if not _inside_word(item.text, first)]
    ends = [*(first for first, _ in words), len(item.text)][1:]
    timed = [
        (item.text[first:end].strip(), time) for (first, time), end in zip(words, ends, strict=True)
    ]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int16), timed


def _inside_word(text: str, i: int) -> bool:
    """Whether text[i] goes on a word: two letters in a row of a script with cases and spaces."""
    return i > 0 and all(letter.lower() != letter.upper() for letter in text[i - 1 : i + 1])


def _trim(audio, rate):
    """First and last sample of what is louder than 40 dB below the loudest 10 ms."""
    import numpy as np

    hop = rate // 100
    energy = np.square(audio[: len(audio) // hop * hop].reshape(-1, hop)).mean(1)
    loud = np.flatnonzero(energy > 1e-4 * energy.max(initial=0))
    return (loud[0] * hop, (loud[-1] + 1) * hop) if len(loud) else (0, 0)


def worsen(audio, rng, reverb: float = 0.0, snr: float | None = None):
    """Samples at SAMPLE_RATE in a room, then with pink noise: `reverb`, `snr` as of `Speech`."""
    import numpy as np

    if reverb:
        audio = _reverberate(audio, reverb, rng)
    if snr is not None:
        level = np.sqrt(np.square(audio).mean()) * 10 ** (-snr / 20)
        audio = audio + level * _pink_noise(len(audio), rng)
    return audio


def _reverberate(audio, seconds, rng):
    """Convolves with exponentially decaying noise after a direct path, at the same loudness."""
    import numpy as np
    import scipy.signal

    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    echo = rng.standard_normal(len(time)) * 10 ** (-3 * time / seconds)
    echo *= 1 / np.sqrt(np.square(echo).sum())  # as much energy in the echoes as in the direct path
    echo[0] = 1
    wet = scipy.signal.oaconvolve(audio, echo)[: len(audio) + len(time) // 2]
    return wet * np.sqrt(np.square(audio).mean() / np.square(wet).mean())


def _pink_noise(count, rng):
    import numpy as np
    import scipy.fft

    size = scipy.fft.next_fast_len(max(count, 2), real=True)
    spectrum = scipy.fft.rfft(rng.standard_normal(size)) / np.sqrt(np.arange(size // 2 + 1) + 1)
    noise = scipy.fft.irfft(spectrum, size)[:count]
    return noise / np.sqrt(np.square(noise).mean())


def _record(library, rate: int, item: Speech, index: int):
    """Returns float64 samples at SAMPLE_RATE and [[word, start s, end s], ...]."""
    import numpy as np
    import soxr

    samples, words = _pronounce(library, item)
    audio = samples / 32768
    start, stop = _trim(audio, rate)
    if start == stop:
        raise ValueError(f"eSpeak NG said nothing for {item.text!r} in voice {item.voice!r}")
    audio = soxr.resample(audio[start:stop], rate, SAMPLE_RATE)
    rng = np.random.default_rng([zlib.crc32(item.text.encode()), index])
    shift, end = start / rate - item.silence[0], item.silence[0] + len(audio) / SAMPLE_RATE
    audio = np.pad(audio, [round(seconds * SAMPLE_RATE) for seconds in item.silence])
    audio = worsen(audio, rng, item.reverb, item.snr)
    starts = [min(max(time - shift, item.silence[0]), end) for _, time in words]
    spans = zip(starts, [*starts[1:], end], strict=True) if starts else []
    timed = [
        [word, round(a, 3), round(b, 3)] for (word, _), (a, b) in zip(words, spans, strict=True)
    ]
    return audio * (0.7 / np.abs(audio).max()), timed


def _main(folder: Path) -> None:
    import soundfile

    request = json.load(sys.stdin)
    library, rate = _load_espeak()
    for offset, fields in enumerate(request["items"]):
        item, index = Speech(*fields), request["start"] + offset
        audio, words = _record(library, rate, item, index)
        path = f"audio/{index:06d}.wav"
        soundfile.write(folder / path, audio, SAMPLE_RATE, subtype="PCM_16")
        line = {
            "audio_filepath": path,
            "text": item.text,
            "duration": len(audio) / SAMPLE_RATE,
            "lang": item.lang,
            "speaker": item.speaker or item.voice,
            "words": words,
        }
        sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stdin.reconfigure(encoding="utf-8")
    _main(Path(sys.argv[1]))
