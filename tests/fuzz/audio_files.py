"""Damaged audio files, with a manifest that says how long they are and without one."""

import random
from pathlib import Path

import mutate
import numpy as np
import soundfile
from harness import Wrong, refusal

from otreg_jax.data import audio
from otreg_jax.data.utterances import BadAudio, Utterance

SECONDS = 2.0
FORMATS = [  # name, libsndfile's format and subtype; rate, channels
    ("pcm16.wav", "WAV", "PCM_16", 16000, 1),
    ("pcm24.wav", "WAV", "PCM_24", 44100, 2),
    ("float.wav", "WAV", "FLOAT", 16000, 2),
    ("ulaw.wav", "WAV", "ULAW", 8000, 1),
    ("extensible.wav", "WAVEX", "PCM_16", 48000, 1),
    ("rf64.wav", "RF64", "PCM_16", 16000, 1),
    ("a.w64", "W64", "PCM_16", 16000, 1),
    ("a.aiff", "AIFF", "PCM_16", 22050, 1),
    ("a.au", "AU", "PCM_16", 16000, 1),
    ("a.caf", "CAF", "PCM_16", 16000, 1),
    ("a.flac", "FLAC", "PCM_16", 16000, 1),
    ("b.flac", "FLAC", "PCM_24", 48000, 2),
    ("a.ogg", "OGG", "VORBIS", 16000, 1),
    ("a.opus", "OGG", "OPUS", 16000, 1),
    ("a.mp3", "MP3", "MPEG_LAYER_III", 16000, 1),
    ("b.mp3", "MP3", "MPEG_LAYER_III", 44100, 2),
]


def prepare(folder: Path) -> None:
    for name, form, subtype, rate, channels in FORMATS:
        rng = np.random.default_rng(0)
        samples = 0.1 * rng.standard_normal((int(SECONDS * rate), channels))
        soundfile.write(folder / f"good-{name}", samples, rate, format=form, subtype=subtype)


def case(folder: Path, seed: int) -> str:
    rng = random.Random(seed)
    name, *_ = rng.choice(FORMATS)
    good = (folder / f"good-{name}").read_bytes()
    data, lost = damage(rng, good)
    suffix = name if rng.random() < 0.9 else rng.choice(["a.wav", "a.mp3", "a", "a.raw", "a.flac"])
    path = str(folder / f"bad{seed % 4}-{suffix}")
    Path(path).write_bytes(data)
    known = Utterance("u", path, "text", SECONDS, where="m.jsonl:1")
    found = [read(path, None, lost), read(path, known, lost)]
    if rng.random() < 0.3:
        offset = rng.choice([0.5, SECONDS - 0.01, SECONDS, 100.0])
        found.append(read(path, known._replace(offset=offset, duration=1.0), 0.0))
    return "used" if "used" in found else "refused"


def damage(rng: random.Random, data: bytes) -> tuple[bytes, float]:
    """The damaged file, and the share of its bytes that a cut at its end took."""
    accident = rng.random()
    if accident < 0.25:
        kept = rng.random()
        return data[: int(len(data) * kept)], 1 - kept
    if accident < 0.55:  # in the header
        head = rng.choice([16, 48, 100, 400])
        return mutate.of_bytes(rng, data[:head]) + data[head:], 0.0
    if accident < 0.8:
        return mutate.of_bytes(rng, data), 0.0
    size, at = rng.randint(1, 4000), rng.randrange(len(data))
    floats = np.full(size, rng.choice([np.nan, np.inf, 1e30]), "<f4").tobytes()
    others = [
        b"",
        rng.randbytes(size),
        bytes(size),
        b"<html>not found</html>",
        data + data,
        data + rng.randbytes(size),
        rng.randbytes(size) + data,
        data[:at] + bytes(size) + data[at + size :],
        data[:at] + bytes([255]) * size + data[at + size :],
        data[: 44 + size // 4 * 4] + floats + data[44 + size * 4 :],
    ]
    return rng.choice(others), 0.0


def read(path: str, utterance: Utterance | None, lost: float) -> str:
    where = utterance.where if utterance else path
    try:
        utterance = utterance or audio.from_file(path)
        sound = audio.listen(utterance)
    except BadAudio as error:
        if path not in str(error) or "\n" in str(error) or where not in str(error):
            raise Wrong(f"the file is not named in one line: {error}") from None
        return "refused"
    except Exception as error:
        if refusal(error) is None:
            raise
        raise Wrong(f"no BadAudio: {error}") from None
    samples, seconds = sound.samples, len(sound.samples) / audio.SAMPLE_RATE
    if samples.dtype != np.float32 or samples.ndim != 1:
        raise Wrong(f"{samples.dtype} {samples.shape}")
    if not np.isfinite(samples).all() or np.abs(samples).max(initial=0) > 1:
        raise Wrong("samples beyond full scale, or not finite")
    if abs(seconds - utterance.duration) > 0.11:
        raise Wrong(f"{seconds} s of audio for {utterance.duration} s")
    # A third of a file cannot be gone without a word.
    if lost > 0.3:
        raise Wrong(f"{lost:.0%} of the file are cut off, and nothing is said")
    return "used"
