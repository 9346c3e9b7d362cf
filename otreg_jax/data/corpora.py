"""The published folder layouts of speech corpora, as manifest lines.

Each function takes a corpus as its archive unpacks, and a split as the corpus names it, and yields
(where, line): "file:number", and a dict in the manifest convention of `sources`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

Lines = Iterator[tuple[str, dict]]

# ISO 639-1 codes of the languages that Multilingual LibriSpeech's folders are named after.
_MLS_LANGUAGES = {
    "dutch": "nl",
    "english": "en",
    "french": "fr",
    "german": "de",
    "italian": "it",
    "polish": "pl",
    "portuguese": "pt",
    "spanish": "es",
}


def librispeech(root: Path, split: str) -> Lines:
    """root/train-clean-100/SPEAKER/CHAPTER/{*.trans.txt,*.flac} (openslr.org/12)."""
    for transcripts in sorted((root / split).glob("*/*/*.trans.txt")):
        for where, line in _lines(transcripts):
            key, _, text = line.partition(" ")
            audio = transcripts.parent / f"{key}.flac"
            yield where, _line(audio, text, lang="en", speaker=key.partition("-")[0], id=key)


def mls(root: Path, split: str) -> Lines:
    """mls_LANGUAGE/train/{transcripts.txt,audio/SPEAKER/BOOK/*.flac} (openslr.org/94); the language
    by its name, or by its code."""
    name = root.name.removeprefix("mls_").removesuffix("_opus")
    lang = name if name in _MLS_LANGUAGES.values() else _MLS_LANGUAGES.get(name, "")
    suffix = "opus" if root.name.endswith("_opus") else "flac"
    for where, line in _lines(root / split / "transcripts.txt"):
        key, _, text = line.partition("\t")
        speaker, book, _ = (key + "__").split("_", 2)
        audio = root / split / "audio" / speaker / book / f"{key}.{suffix}"
        yield where, _line(audio, text, lang=lang, speaker=speaker, id=key)


def common_voice(root: Path, split: str) -> Lines:
    """LANGUAGE/{train.tsv,clips/*.mp3} (commonvoice.mozilla.org)."""
    for where, row in _rows(root / f"{split}.tsv", "path", "sentence", "client_id"):
        name = row["path"]
        audio = root / "clips" / (name if "." in name else f"{name}.mp3")
        lang = row.get("locale") or root.name
        yield where, _line(audio, row["sentence"], lang=lang, speaker=row["client_id"], id=name)


def fleurs(root: Path, split: str) -> Lines:
    """LANGUAGE/{train.tsv,audio/train/*.wav} (huggingface.co/datasets/google/fleurs)."""
    for where, line in _lines(root / f"{split}.tsv"):
        # id, file name, raw transcription, transcription, letters, samples, gender
        columns = line.split("\t") + [""] * 4
        audio = root / "audio" / split / columns[1]
        lang = root.name.partition("_")[0]
        yield where, _line(audio, columns[3], lang=lang, id=columns[1])


def voxpopuli(root: Path, split: str) -> Lines:
    """LANGUAGE/{asr_train.tsv,YEAR/*.ogg} (github.com/facebookresearch/voxpopuli: get_asr_data)."""
    table = root / f"asr_{split}.tsv"
    for where, row in _rows(table, "id", "raw_text", "normalized_text", "speaker_id"):
        key = row["id"]
        text = row["normalized_text"] or row["raw_text"]
        audio = root / key[:4] / f"{key}.ogg"
        yield where, _line(audio, text, lang=root.name, speaker=row["speaker_id"], id=key)


def aishell(root: Path, split: str) -> Lines:
    """data_aishell/{transcript/aishell_transcript_v0.8.txt,wav/train/SPEAKER/*.wav}
    (openslr.org/33). The transcript serves all splits, and its words are divided by spaces."""
    audio = {path.stem: path for path in (root / "wav" / split).glob("*/*.wav")}
    for where, line in _lines(root / "transcript" / "aishell_transcript_v0.8.txt"):
        key, _, text = line.partition(" ")
        if key in audio:
            path, text = audio[key], text.replace(" ", "")
            yield where, _line(path, text, lang="zh", speaker=path.parent.name, id=key)


LAYOUTS: dict[str, Callable[[Path, str], Lines]] = {
    layout.__name__: layout
    for layout in (librispeech, mls, common_voice, fleurs, voxpopuli, aishell)
}


def _line(audio: Path, text: str, **line) -> dict:
    return {"audio_filepath": str(audio), "text": text, **line}


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line.rstrip("\r")


def _rows(path: Path, *needed: str) -> Iterator[tuple[str, dict]]:
    """The rows of a table under its header, all columns filled; `needed` must be among them."""
    header = None
    for where, line in _lines(path):
        cells = line.split("\t")
        if header is None:
            header, missing = cells, set(needed) - set(cells)
            if missing:
                raise ValueError(f"{where}: no column {', '.join(sorted(missing))} in the header")
        else:
            yield where, dict(zip(header, cells + [""] * len(header), strict=False))


def read_text(path: Path) -> str:
    """Raises ValueError with the line of what is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: byte {error.start} is not UTF-8") from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file") from None
