"""Mutated manifests, read in both ways of dealing with bad lines, and their audio."""

import json
import os
import random
from pathlib import Path

import mutate
import numpy as np
import soundfile
from harness import Wrong, refusal
from ml_collections import ConfigDict

from otreg_jax.data import sources

RATE = 16000
SECONDS = {"a.wav": 0.5, "b.flac": 1.0, "sub/c.ogg": 0.75, "long.wav": 3.0}
PATHS = (
    "http://host/a.wav https://host/a.wav s3://bucket/a.wav file:///nowhere.wav hf://x/y ../a.wav "
    "/etc/passwd /dev/zero sub . ./a.wav sub/../a.wav a.wav/b.wav A.WAV record:x:train:0 record: "
    "~/a.wav a.wav\0 C:\\a.wav pipe.wav"
).split(" ")


def prepare(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, seconds in SECONDS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        soundfile.write(folder / name, 0.1 * rng.standard_normal(int(RATE * seconds)), RATE)
    os.mkfifo(folder / "pipe.wav")


def case(folder: Path, seed: int) -> str:
    rng = random.Random(seed)
    path = folder / f"m{seed % 4}.jsonl"
    path.write_bytes(manifest(rng))
    divide = rng.random() < 0.3
    refusing, skipping = how(path, "raise", divide), how(path, "skip", divide)
    if refusing != skipping:
        raise Wrong(f"{refusing} with on_bad_audio=raise, {skipping} with skip")
    return refusing


def manifest(rng: random.Random) -> bytes:
    lines = []
    for i, (name, seconds) in enumerate(rng.choices([*SECONDS.items()], k=rng.randint(1, 5))):
        line = {"audio_filepath": name, "text": f"word number {i}", "id": f"u{i}"}
        extra = {"duration": seconds, "lang": "en", "speaker": "s", "offset": 0.1}
        line |= {key: value for key, value in extra.items() if rng.random() < 0.7}
        if "offset" in line and "duration" in line:
            line["duration"] = round(seconds - 0.1, 3)
        if rng.random() < 0.3:
            line["words"] = [["word", 0.0, 0.1], ["number", 0.1, 0.2], [f"{i}", 0.25, 0.3]]
        lines.append(line)
    for _ in range(rng.randint(1, 2)):
        at, accident = rng.randrange(len(lines)), rng.random()
        if accident < 0.15:
            lines[at] = lines[at] | {"audio_filepath": rng.choice(PATHS)}
        elif accident < 0.2:
            lines.insert(at, lines[at])
        elif isinstance(lines[at], dict):
            lines[at] = mutate.of_value(rng, lines[at])
    content = rng.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(
        mutate.as_json(rng, line) for line in lines
    )
    if rng.random() < 0.2:
        content = mutate.of_bytes(rng, content)
    if rng.random() < 0.05:
        content = rng.choice(
            [b"\xef\xbb\xbf" + content, content.decode("utf-8", "ignore").encode("utf-16")]
        )
    return content


def how(path: Path, mode: str, divide: bool) -> str:
    """How loading it ended. Raises Wrong if a line is lost, or used for what it is not."""
    numbers = {i for i, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()}
    skipped = path.with_suffix(".skipped")
    skipped.unlink(missing_ok=True)
    config = ConfigDict(
        {"on_bad_audio": mode, "long_audio": "chunk" if divide else "reject", "data_root": ""}
    )
    try:
        found = sources.load_utterances(
            str(path), config, max_duration=2.0, skipped_path=str(skipped)
        )
    except Exception as error:
        message = refusal(error)
        if message is None:
            raise
        if mode == "skip" and numbers:
            raise Wrong(f"nothing was skipped, all refused: {message}") from None
        if f"{path}:" not in message:
            raise Wrong(f"no line is named: {message}") from None
        return "refused"
    aside = (
        [json.loads(line) for line in skipped.read_text("utf-8").split("\n") if line]
        if skipped.exists()
        else []
    )
    number = lambda where: int(where.rpartition(":")[2])
    told = {number(problem["where"]) for problem in aside}
    used = {number(utterance.where) for utterance in found}
    if told | used != numbers and not (not numbers and told == {0}):
        raise Wrong(f"lines {numbers - told - used} are lost ({told | used - numbers} are made up)")
    for utterance in found:
        check(path, utterance)
    manifest = path.with_suffix(".again")
    sources.write_manifest(manifest, found)
    again = sources.read_manifest(manifest) if found else []
    plain = lambda utterances: [u._replace(where="", audio="") for u in utterances]
    if plain(again) != plain(found):
        raise Wrong("what is written is read as something else")
    return "refused" if aside else "used"


def check(path: Path, utterance: sources.Utterance) -> None:
    """Raises Wrong if an utterance is not what its line says, or its audio not what it names."""
    raw = path.read_bytes().split(b"\n")[int(utterance.where.rpartition(":")[2]) - 1]
    line = json.loads(raw.decode("utf-8-sig"))
    said = lambda key, kinds: (
        isinstance(line.get(key), kinds) and not isinstance(line.get(key), bool)
    )
    whole = "@" not in utterance.id or utterance.id == line.get("id")
    if whole and utterance.text != line["text"].strip():
        raise Wrong(f"{utterance.text!r} for {line['text']!r}")
    if line.get("duration") is not None and not said("duration", (int, float)):
        raise Wrong(f"a duration of {line['duration']!r} is used")
    if line.get("offset") is not None and not said("offset", (int, float)):
        raise Wrong(f"an offset of {line['offset']!r} is used")
    for key in ("lang", "speaker", "id"):
        if isinstance(line.get(key), list | dict | bool | float):
            raise Wrong(f"{key} {line[key]!r} is used")
    last = 0.0
    for _, start, end in utterance.words:
        if not 0 <= start <= end <= utterance.duration + 0.2 or start < last - 1e-6:
            raise Wrong(f"word times {utterance.words} in {utterance.duration} s")
        last = start
    try:
        samples = sources.load_audio(utterance)
    except sources.BadAudio as error:
        if utterance.where not in str(error):
            raise Wrong(f"no line is named: {error}") from None
        return
    name = Path(utterance.audio).resolve().relative_to(path.parent.resolve()).as_posix()
    if name not in SECONDS:
        raise Wrong(f"audio of {utterance.audio}")
    file, _ = soundfile.read(path.parent / name, dtype="float32")
    start = round((utterance.offset or 0.0) * RATE)
    expected = file[start : start + round(utterance.duration * RATE)]
    if len(samples) != len(expected) or not np.array_equal(samples, expected):
        raise Wrong(f"{len(samples)} samples, not the {len(expected)} that the line names")
