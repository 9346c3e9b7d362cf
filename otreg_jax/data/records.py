"""Speech in ArrayRecord files as TFDS lays them out, read and written without TensorFlow.

Data sets made by `otreg_jax.data.prepare` hold 16 kHz int16 audio as bytes; `tfds.data_source`
reads them too. Data sets that others made with the TFDS feature `Audio` (LibriSpeech, Common Voice,
FLEURS, ...) are read here from their records: `Audio` itself cannot be had without TensorFlow.
"""

import functools
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from etils import epath

from otreg_jax import rundir
from otreg_jax.data import remote
from otreg_jax.data.utterances import SAMPLE_RATE, BadAudio

PREFIX = "record:"  # an utterance's audio: "record:FOLDER:SPLIT:INDEX"
NAME = "speech"  # of the data sets written here

# Names that published data sets give to the same thing, the preferred one first.
TEXT = ("text", "transcription", "sentence", "normalized_text", "transcript", "raw_transcription")
LANG = ("lang", "locale", "language")
SPEAKER = ("speaker", "speaker_id", "client_id")
# Where features.json does not say: Common Voice's clips.
_RATES = {"common_voice": 48000, "commonvoice": 48000}


class Schema(NamedTuple):
    """Which features of a data set hold what; "" for what it does not have."""

    audio: str
    rate: int
    encoded: bool  # the audio is a FLAC, MP3, ... file, not samples
    text: str
    lang: str
    speaker: str
    id: str


@functools.cache
def schema(folder: str) -> Schema:
    """Reads a TFDS data set's features.json.

    Raises:
      ValueError: it has no audio or no transcript, or its description is not one of TFDS.
    """
    try:
        content = json.loads((epath.Path(folder) / "features.json").read_text(encoding="utf-8"))
        info = json.loads((epath.Path(folder) / "dataset_info.json").read_text(encoding="utf-8"))
        return _schema(folder, content["featuresDict"]["features"], info["name"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}: features.json and dataset_info.json are not as TFDS writes them "
            f"({type(error).__name__}: {error})"
        ) from None


def _schema(folder: str, features: dict, dataset: str) -> Schema:
    classes = {name: f["pythonClassName"].rpartition(".")[2] for name, f in features.items()}
    audio = [name for name, kind in classes.items() if kind == "Audio"]
    audio += [name for name in ("audio", "speech") if classes.get(name) == "Tensor"]
    strings = [name for name, kind in classes.items() if kind == "Text"]
    first = lambda names: next((name for name in names if name in strings), "")
    if not audio or not first(TEXT):
        raise ValueError(f"{folder}: no audio or no transcript among {', '.join(sorted(features))}")
    details = features[audio[0]].get("audio", {})
    rate = int(details.get("sampleRate") or _RATES.get(dataset, SAMPLE_RATE))
    lazy = bool(details.get("lazyDecode"))
    speaker, identity = first(SPEAKER), first(("id",))
    return Schema(audio[0], rate, lazy, first(TEXT), first(LANG), speaker, identity)


@functools.lru_cache(maxsize=64)
def _source(folder: str, split: str):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    paths = [os.fspath(path) for path in at_hand(shards(folder, split))]
    try:
        return ArrayRecordDataSource(paths)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{folder}: the shards of {split!r} cannot be read: {reason}") from None


def at_hand(paths: list) -> list:
    """The files, or copies of those on gs://, since ArrayRecord's reader takes local ones only.

    Copies are kept in the user's cache directory, and made anew if their size has changed.
    """
    cache = remote.user_cache() / "records"
    copies = [cache / str(p).partition("://")[2] if "://" in str(p) else p for p in paths]
    missing = [
        (path, copy)
        for path, copy in zip(paths, copies, strict=True)
        if copy is not path and not (copy.is_file() and copy.stat().st_size == path.stat().length)
    ]
    if missing:
        size = sum(path.stat().length for path, _ in missing) / 2**30
        folder, where = missing[0][0].parent, missing[0][1].parent
        print(f"copying {len(missing)} shards ({size:.2f} GiB) of {folder} to {where}")
    for path, copy in missing:
        copy.parent.mkdir(parents=True, exist_ok=True)
        part = copy.with_name(f".{copy.name}.{os.getpid()}")
        with path.open("rb") as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, 2**24)
        part.replace(copy)
    return copies


def shards(folder: str | os.PathLike, split: str) -> list:
    """The files of a split, in order. Raises FileNotFoundError if there is none, or not all."""
    paths = sorted(epath.Path(folder).glob(f"*-{split}.array_record-?????-of-?????"))
    promised = {int(path.name.rpartition("-of-")[2]) for path in paths}
    if promised != {len(paths)}:
        names = [path.name for path in epath.Path(folder).iterdir()]
        there = (re.match(r"[^.]*-(\w+)\.array_record", name) for name in names)
        splits = ", ".join(sorted({shard[1] for shard in there if shard})) or "none"
        wrong = f"{len(paths)} of {max(promised)} shards" if paths else f"splits here: {splits}"
        raise FileNotFoundError(
            f"{folder}: no whole split {split!r} in ArrayRecord files ({wrong})"
        )
    return paths


def _read(folder: str, split: str, index: int):
    """The features of a record, its audio and the rate. Raises BadAudio if it is damaged."""
    from tensorflow_datasets.proto import tf_example_pb2

    form, source = schema(folder), _source(folder, split)
    try:
        example = tf_example_pb2.Example.FromString(source[index]).features.feature
        return example, *_decode(example[form.audio], form)
    except Exception as error:  # of the readers of records, of protobuf, of libsndfile
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        place = address(folder, split, index)
        raise BadAudio("unreadable", f"{place} is damaged: {reason}") from None


def address(folder: str | os.PathLike, split: str, index: int) -> str:
    """What stands for an audio file's path when the audio is a record."""
    return f"{PREFIX}{os.fspath(folder)}:{split}:{index}"


def is_data_set(folder: str) -> bool:
    """Whether a folder, local or remote, is a data set as TFDS lays it out."""
    return (epath.Path(folder) / "dataset_info.json").exists()


def read_audio(audio: str) -> tuple[np.ndarray, int]:
    """Reads the audio at an `address`: float32 [N] or [N, channels], and its rate in Hz.

    Raises:
      FileNotFoundError: there is no such split, or not all of it.
      BadAudio: there is no such record, or it is damaged.
    """
    folder, _, rest = audio.removeprefix(PREFIX).rpartition(":")
    folder, _, split = folder.rpartition(":")
    # A bucket is not asked for every record: what it lacks, the source below tells.
    there = folder and ("://" in folder or is_data_set(folder))
    if not (there and rest.isdecimal()):
        raise BadAudio("missing_file", f"{audio} is no record:FOLDER:SPLIT:NUMBER")
    if int(rest) >= len(_source(folder, split)):
        raise BadAudio("missing_file", f"{audio}: the split has not so many records")
    return _read(folder, split, int(rest))[1:]


def _decode(value, form: Schema) -> tuple[np.ndarray, int]:
    if form.encoded:
        return soundfile.read(io.BytesIO(value.bytes_list.value[0]), dtype="float32")
    if value.HasField("bytes_list"):
        samples = np.frombuffer(value.bytes_list.value[0], np.int16)
    elif value.HasField("int64_list"):
        samples = np.array(value.int64_list.value, np.int32)
    else:
        return np.array(value.float_list.value, np.float32), form.rate
    return samples.astype(np.float32) / 32768, form.rate


def read_index(folder: str | os.PathLike, split: str) -> list[dict]:
    """One manifest line (without `audio_filepath`) for every record of a split, in order.

    It is kept in the data set's folder as SPLIT.jsonl: the records themselves, audio and all, are
    gone through only the first time. Of a damaged record the line says only what is wrong, under
    "damaged".
    """
    path = epath.Path(folder) / f"{split}.jsonl"
    folder = os.fspath(folder)
    size = len(_source(folder, split))
    if path.exists():
        return _known_index(path, size)
    import tqdm

    form, lines = schema(folder), []
    for i in tqdm.trange(size, desc=f"indexing {folder}", delay=2):
        try:
            example, samples, rate = _read(folder, split, i)
        except BadAudio as error:
            lines.append({"damaged": error.reason})
            continue
        line = {"duration": len(samples) / rate}
        for key in ("text", "lang", "speaker", "id"):
            name = getattr(form, key)
            if name:
                line[key] = example[name].bytes_list.value[0].decode("utf-8", "replace")
        lines.append(line)
    try:
        write_index(path, lines)
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}): every start will index the data again")
    return lines


def _known_index(path: Path, size: int) -> list[dict]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if len(lines) != size or not all(isinstance(line, dict) for line in lines):
            raise ValueError(f"{len(lines)} lines for {size} records")
    except ValueError as error:
        raise ValueError(
            f"{path}: not the index of this data set ({error}); remove it, and the next start "
            "makes it anew"
        ) from None
    return lines


def write_index(path: Path, lines: list[dict]) -> None:
    """Writes an index whole or not at all."""
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    rundir.write_bytes(path, content.encode())


@functools.cache
def features():
    """The TFDS features of the data sets written here."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
            "text": tfds.features.Text(),
            "lang": tfds.features.Text(),
            "speaker": tfds.features.Text(),
            "duration": tfds.features.Scalar(dtype=np.float32),
        }
    )


def encode(audio_N: np.ndarray, line: dict) -> bytes:
    """A record: float32 [N] audio at 16 kHz, and the utterance's manifest line."""
    samples = np.clip(np.round(audio_N * 32768), -32768, 32767).astype(np.int16)
    return features().serialize_example({"audio": samples, **line})


def write_metadata(folder: Path, splits: dict[str, list[tuple[int, int]]]) -> None:
    """Writes dataset_info.json and features.json. splits: (records, bytes) of each shard."""
    import tensorflow_datasets as tfds
    from etils import epath

    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[records for records, _ in shards],
            num_bytes=sum(size for _, size in shards),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=epath.Path(folder),
                dataset_name=NAME,
                split=split,
                filetype_suffix="array_record",
            ),
        )
        for split, shards in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features(), split_infos=infos, check_data=False
    )
