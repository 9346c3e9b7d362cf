"""Pretrained parts and recordings in small pieces, for a machine that no network reaches.

    python -m benchmarks.carry pack PIECES --encoder=whisper-base --llm=smollm2-135m \\
        --corpora=read=DIR1,talk=DIR2          # PIECES/000.piece, ... and PIECES/pieces.json
    python -m benchmarks.carry unpack PIECES FOLDER        # there, once all have arrived

FOLDER then has encoder/, llm/ and a folder for each corpus, as `benchmarks.study_real` takes them.
Weights in float32 are rounded to bfloat16; of a Whisper model the encoder alone is taken, and of a
corpus the lines of one language; WAV files of 16 bits become FLAC. `unpack` names every piece that
is missing or damaged.
"""

import argparse
import hashlib
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
import soundfile

from benchmarks import laptop

INDEX = "pieces.json"
SPLITS = ("train", "dev", "test")


def copy_model(source: Path, target: Path, skip: str = "") -> None:
    """A Hugging Face directory, what is float32 in bfloat16.

    skip: tensors whose name holds this are left out.
    """
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="numpy") as file:
                names = [name for name in file.keys() if not (skip and skip in name)]  # noqa: SIM118
                arrays = {name: file.get_tensor(name) for name in names}
            for name, array in arrays.items():
                if array.dtype == np.float32:
                    arrays[name] = array.astype(ml_dtypes.bfloat16)
            safetensors.numpy.save_file(arrays, target / path.name, {"format": "pt"})
        elif path.suffix in (".json", ".jinja", ".model", ".txt"):
            (target / path.name).write_bytes(path.read_bytes())


def copy_corpus(source: Path, target: Path, lang: str) -> None:
    """Its manifests with the lines of one language, "" for all, and the recordings these name."""
    target.mkdir(parents=True)
    for split in SPLITS:
        path = laptop.of_language(source / f"{split}.jsonl", lang, target / f"{split}.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for i, line in enumerate(lines):
            recording = Path(line["audio_filepath"])
            is_wav = recording.suffix == ".wav" and soundfile.info(recording).subtype == "PCM_16"
            line["audio_filepath"] = f"{split}/{i:06d}{'.flac' if is_wav else recording.suffix}"
            copy = target / line["audio_filepath"]
            copy.parent.mkdir(exist_ok=True)
            if is_wav:
                samples, rate = soundfile.read(recording, dtype="int16")
                soundfile.write(copy, samples, rate)
            else:
                copy.write_bytes(recording.read_bytes())
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def cut(whole: Path, size: int, pieces: Path) -> None:
    """A file as pieces of `size` bytes at most, and the index of them."""
    pieces.mkdir(parents=True, exist_ok=True)
    index = []
    with whole.open("rb") as file:
        while content := file.read(size):
            name = f"{len(index):03d}.piece"
            (pieces / name).write_bytes(content)
            index.append({"name": name, "sha256": hashlib.sha256(content).hexdigest()})
    (pieces / INDEX).write_text(json.dumps(index, indent=1))


def join(pieces: Path, folder: Path) -> None:
    """What was cut, and unpacked into `folder`.

    Raises:
      ValueError: pieces are missing or damaged; all of them are named.
    """
    index = json.loads((pieces / INDEX).read_text())
    bad = []
    for piece in index:
        path = pieces / piece["name"]
        if not path.exists():
            bad.append(f"{path} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != piece["sha256"]:
            bad.append(f"{path} is damaged")
    if bad:
        raise ValueError("\n".join(bad))
    with tempfile.TemporaryFile() as file:
        for piece in index:
            file.write((pieces / piece["name"]).read_bytes())
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            archive.extractall(folder, filter="data")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack")
    pack.add_argument("pieces", type=Path)
    pack.add_argument("--encoder", type=Path, required=True, help="directory of a Whisper model")
    pack.add_argument("--llm", type=Path, required=True, help="directory of a language model")
    pack.add_argument("--corpora", required=True, help="name=folder,...")
    pack.add_argument("--lang", default="en", help='lines of this language only; "": all')
    pack.add_argument("--megabytes", type=float, default=60, help="of a piece, at most")
    unpack = commands.add_parser("unpack")
    unpack.add_argument("pieces", type=Path)
    unpack.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "unpack":
        try:
            join(args.pieces, args.folder)
        except ValueError as error:
            sys.exit(f"carry: {error}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        copy_model(args.encoder, scratch / "all" / "encoder", skip="decoder")
        copy_model(args.llm, scratch / "all" / "llm")
        for name, folder in laptop.corpora(args.corpora).items():
            copy_corpus(folder, scratch / "all" / name, args.lang)
        with tarfile.open(scratch / "all.tar", "w:xz", preset=3) as archive:  # higher: much slower
            archive.add(scratch / "all", arcname="")
        cut(scratch / "all.tar", int(1e6 * args.megabytes), args.pieces)
    for path in sorted(args.pieces.iterdir()):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
