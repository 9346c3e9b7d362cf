"""Four tasks in three languages from four kinds of data set, mixed in one run; a tiny model.

    python configs/tasks.py                      # speaks the data into runs/tasks-data (eSpeak NG)
    python -m otreg_jax.train --config=configs/tasks.py:runlocal --workdir=runs/tasks
    python -m otreg_jax.evaluate --workdir=runs/tasks
    python -m otreg_jax.transcribe --workdir=runs/tasks --task=translate --language=de --to=en a.wav

German comes as a manifest in NeMo's manner (`taskname`, `source_lang`, `target_lang`), French as a
Kaldi directory, English as a Parquet file as the Hugging Face hub has them, with words of context,
and questions about all three languages as a WebDataset tar. Rows that name no task are for each
task whose fields they have.
"""

import io
import itertools
import json
import random
import sys
import tarfile
from pathlib import Path

from otreg_jax import config as config_lib

ARMS = ("runlocal",)
DATA = Path("runs/tasks-data")
VOICES = {  # of each split, so that no voice that tests was heard in training
    "train": {
        "en": (("en-us", 40), ("en-us+f2", 55), ("en-gb", 50)),
        "de": (("de", 45), ("de+f2", 60), ("de+m3", 35)),
        "fr": (("fr-fr", 45), ("fr-fr+f2", 60), ("fr-fr+m3", 35)),
    },
    "test": {
        "en": (("en-us+f4", 60), ("en-gb+m5", 45)),
        "de": (("de+f4", 60), ("de+m5", 45)),
        "fr": (("fr-fr+f4", 60), ("fr-fr+m5", 45)),
    },
}
LANGS = ("en", "de", "fr")
NAMES = "anna peter maria david laura paul".split()
VERBS = (
    {"en": "open", "de": "öffne", "fr": "ouvre"},
    {"en": "close", "de": "schließe", "fr": "ferme"},
    {"en": "find", "de": "finde", "fr": "trouve"},
    {"en": "bring", "de": "bringe", "fr": "apporte"},
    {"en": "clean", "de": "putze", "fr": "nettoie"},
)
THINGS = (
    {"en": "the door", "de": "die tür", "fr": "la porte"},
    {"en": "the window", "de": "das fenster", "fr": "la fenêtre"},
    {"en": "the book", "de": "das buch", "fr": "le livre"},
    {"en": "the lamp", "de": "die lampe", "fr": "la lampe"},
    {"en": "the car", "de": "das auto", "fr": "la voiture"},
    {"en": "the table", "de": "den tisch", "fr": "la table"},
)
NUM_TEST = 24  # of the sentences of each set


def get_config(arm: str = "runlocal"):
    """The recipe; `runlocal` is its only arm."""
    if arm not in ARMS:
        raise ValueError(f"configs/tasks.py:{arm}: no such arm, choose from {', '.join(ARMS)}")
    c = config_lib.default()
    c.data.train = ",".join(str(path) for path in paths("train").values())
    c.data.test = ",".join(f"{name}={path}" for name, path in paths("test").items())
    c.tasks = {
        "transcribe": {
            "prompts": (
                "transcribe the {language} speech[[ with {context}]] {speech}\n",
                "write down {language} [[{context} ]]{speech}\n",
            ),
            "weight": 2.0,
        },
        "translate": {
            "prompts": ("translate {source_language} to {target_language} {speech}\n",),
            "weight": 1.0,
        },
        "identify": {"prompts": ("which language {speech}\n",), "weight": 1.0},
        "answer": {"prompts": ("{prompt} {speech}\n",), "weight": 1.0},
    }
    c.data.distractors = 2
    c.num_steps, c.batch_size, c.checkpoint_every = 500, 16, 250
    c.data.num_buckets, c.data.max_duration = 1, 6.0
    c.tokenizer.model_type, c.tokenizer.vocab_size = "word", 160
    c.encoder.update({"embed_dim": 64, "mlp_dim": 256, "strides": (2, 2, 2), "max_positions": 100})
    c.adapter.hidden_dim = 128
    c.llm.update({"embed_dim": 64, "num_kv_heads": 4, "head_dim": 16, "mlp_dim": 192})
    c.ctc.weight, c.otreg.weight, c.otreg.position_weight = 0.5, 1.0, 3.0
    c.optim.learning_rate = 3e-3
    return c


def paths(split: str) -> dict[str, Path]:
    """The four data sets of a split."""
    return {
        "nemo": DATA / f"{split}.jsonl",
        "kaldi": DATA / f"{split}-kaldi",
        "parquet": DATA / f"{split}.parquet",
        "questions": DATA / f"{split}-questions.tar",
    }


# The data --------------------------------------------------------------------------------------


def main() -> None:
    """Speaks the sentences and writes each part in the manner of another tool."""
    DATA.mkdir(parents=True, exist_ok=True)
    rows = speak(DATA / "speech")
    for split in ("train", "test"):
        places = paths(split)
        write_nemo(places["nemo"], rows[f"{split}-de"])
        write_kaldi(places["kaldi"], rows[f"{split}-fr"])
        write_parquet(places["parquet"], rows[f"{split}-en"])
        some = [row for lang in LANGS for row in rows[f"{split}-{lang}"][::3]]
        write_questions(places["questions"], some)


def speak(folder: Path) -> dict[str, list[dict]]:
    """{"train-de": lines of a manifest, ...}, "audio" their files and "told" what `in_language`
    takes. What tests in one language is trained on in none, and in other voices."""
    from otreg_jax.data import synthetic

    choices = list(itertools.product(NAMES, VERBS, THINGS))
    random.Random(0).shuffle(choices)
    told = {"train": choices[NUM_TEST:], "test": choices[:NUM_TEST]}
    spoken = {
        f"{split}-{lang}": [
            synthetic.Speech(in_language(lang, *one), voice, pitch=pitch, lang=lang, speaker=voice)
            for one, (voice, pitch) in zip(told[split], itertools.cycle(VOICES[split][lang]))
        ]
        for split in told
        for lang in LANGS
    }
    rows = {}
    for name, path in synthetic.synthesize(spoken, folder).items():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows[name] = [
            line | {"audio": (path.parent / line["audio_filepath"]).absolute(), "told": one}
            for line, one in zip(lines, told[name.partition("-")[0]], strict=True)
        ]
    return rows


def in_language(lang: str, who: str, verb: dict, thing: dict) -> str:
    return f"{who} {verb[lang]} {thing[lang]}"


def write_nemo(path: Path, rows) -> None:
    """Every German sentence twice: for no task by name, and to translate."""
    lines = []
    for row in rows:
        line = {"audio_filepath": str(row["audio"]), "text": row["text"], "source_lang": "de"}
        line |= {"duration": row["duration"], "speaker": row["speaker"]}
        lines.append(line | {"id": row["audio"].stem, "target_lang": "de"})
        translated = {"taskname": "ast", "target_lang": "en"}
        translated["target_text"] = in_language("en", *row["told"])
        lines.append(line | {"id": f"{row['audio'].stem}-en"} | translated)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_kaldi(folder: Path, rows) -> None:
    folder.mkdir(exist_ok=True)
    columns = {"wav.scp": "audio", "text": "text", "utt2lang": "lang", "utt2spk": "speaker"}
    for name, column in columns.items():
        lines = [f"{row['audio'].stem}-fr {row[column]}\n" for row in rows]
        (folder / name).write_text("".join(lines), encoding="utf-8")


def write_parquet(path: Path, rows) -> None:
    """With the name in the sentence, and another one, as words of context."""
    import pyarrow
    import pyarrow.parquet

    others = random.Random(1)
    table = {
        "audio": [{"bytes": row["audio"].read_bytes(), "path": row["audio"].name} for row in rows],
        "sentence": [row["text"] for row in rows],
        "locale": ["en"] * len(rows),
        "context": [others.sample([row["told"][0], others.choice(NAMES)], 2) for row in rows],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)


def write_questions(path: Path, rows) -> None:
    with tarfile.open(path, "w") as tar:
        for i, row in enumerate(rows):
            told = {"text": row["text"], "lang": row["lang"]}
            told |= {"prompt": "who is called", "answer": row["told"][0]}
            parts = {"wav": row["audio"].read_bytes(), "json": json.dumps(told).encode()}
            for ending, data in parts.items():
                member = tarfile.TarInfo(f"{row['lang']}-{i:04}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    sys.exit(main())
