"""A recogniser from pretrained parts on a laptop: what it learns from which speech.

    python -m benchmarks.laptop --encoder=DIR --llm=DIR --corpora=read=DIR1,talk=DIR2 \\
        --sentences=FILE --lang=en

Trains configs/laptop.py on each corpus alone, on `--sentences` spoken by eSpeak NG alone, and on
all together, then evaluates every run on the test set of every corpus. A corpus is a folder with
train.jsonl, dev.jsonl and test.jsonl. The runs lie in --out and resume there; each finished one is
a line of benchmarks/results/laptop.jsonl. --reference adds what the Whisper model in --encoder
writes with its own decoder (needs torch and transformers). The table is printed.

With several languages, --lang=en,de,nl, a corpus is a training and a test set for each: "read-de".
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import tqdm
from absl import app, flags

from benchmarks import common, tables
from otreg_jax import metrics
from otreg_jax.data import audio, manifest

ROOT = Path(__file__).parent.parent
RESULTS = tables.RECOGNIZER
SPOKEN, ALL, ITSELF = "spoken", tables.ALL, "Whisper itself"
COURSE_STEPS = 50


def corpora(text: str) -> dict[str, Path]:
    """ "read=DIR1,talk=DIR2" as {"read": Path, ...}."""
    return {name: Path(folder) for name, _, folder in (p.partition("=") for p in text.split(","))}


def of_language(manifest: Path, lang: str, out: Path) -> Path:
    """A copy of a manifest with the lines of one language; "": all of them."""
    if not out.exists():
        lines = map(json.loads, manifest.read_text().splitlines())
        kept = [line for line in lines if not lang or line.get("lang") == lang]
        for line in kept:
            line["audio_filepath"] = str((manifest.parent / line["audio_filepath"]).absolute())
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
    return out


def manifests(folders: dict[str, Path], langs: list[str], out: Path) -> dict[str, dict[str, Path]]:
    """{corpus: {"train": manifest, "dev": ..., "test": ...}}; of several languages
    {corpus-language: ...}, without those that a corpus has nothing of."""
    found = {}
    for name, folder in folders.items():
        for lang in langs:
            key = name if len(langs) == 1 else f"{name}-{lang}"
            found[key] = {
                split: of_language(
                    folder / f"{split}.jsonl", lang, out / "manifests" / f"{key}-{split}.jsonl"
                )
                for split in ("train", "dev", "test")
            }
    return {key: split for key, split in found.items() if split["train"].stat().st_size}


def data_flags(condition: str, sets, values) -> list[str]:
    """What training on one condition adds to the command."""
    chosen = sets if condition == ALL else {n: s for n, s in sets.items() if n == condition}
    train = ",".join(str(split["train"]) for split in chosen.values())
    given = [f"--config.data.train={train}"] if train else []
    if condition in (SPOKEN, ALL) and values.sentences:
        given += [
            f"--config.synthetic.sentences={values.sentences}",
            f"--config.synthetic.num_train={values.num_spoken}",
        ]
    return given


def train_and_evaluate(condition: str, sets, values, out: Path) -> dict:
    """One run: a line of the results."""
    langs = values.lang if len(values.lang) > 1 else []
    workdir = out / "-".join([condition, *langs, values.arm, str(values.seed)])
    tests = ",".join(f"{name}={split['test']}" for name, split in sets.items())
    record = workdir / "minutes.json"
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "otreg_jax.train",
        f"--config=configs/laptop.py:{values.arm}",
        f"--workdir={workdir}",
        f"--config.encoder.path={values.encoder}",
        f"--config.llm.path={values.llm}",
        f"--config.seed={values.seed}",
        f"--config.data.cache={out / 'cache'}",  # of all runs: what is spoken and encoded once
        *data_flags(condition, sets, values),
        *values.flags,
    ]
    print(" ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)
    spent = json.loads(record.read_text()) if record.exists() else 0.0
    record.write_text(json.dumps(spent + (time.perf_counter() - start) / 60))
    evaluate = [
        sys.executable,
        "-m",
        "otreg_jax.evaluate",
        f"--workdir={workdir}",
        f"--sets={tests}",
        "--in_domain=" + ",".join(in_domain(condition, list(sets))),
    ]
    subprocess.run(evaluate, cwd=ROOT, check=True)
    results = json.loads((workdir / "eval" / "results.json").read_text())
    config = json.loads((workdir / "config.json").read_text())
    lines = (workdir / "eval" / "hypotheses.jsonl").read_text().splitlines()
    hypotheses = [json.loads(line) for line in lines]
    return {
        "trained_on": condition,
        "arm": values.arm,
        "seed": values.seed,
        "steps": results["step"],
        "batch": config["batch_size"],
        "dtype": config["compute_dtype"],
        "minutes": json.loads(record.read_text()),
        "sets": {name: _scores(row) for name, row in results["sets"].items()},
        "first_ten": {
            name: [
                [row["reference"], row["hypothesis"]] for row in hypotheses if row["set"] == name
            ][:10]
            for name in results["sets"]
        },
        "course": course(workdir),
        "machine": common.describe_machine("flax", "ott-jax"),
    }


def in_domain(condition: str, names: list[str]) -> list[str]:
    """The test sets that the report calls in-domain; for spoken text the first, as there must be
    one."""
    return names if condition == ALL else [condition] if condition in names else names[:1]


def course(workdir: Path) -> list[dict]:
    """The losses on the training data, every COURSE_STEPS steps."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        {key: round(line[key], 3) for key in ("step", "ctc", "otreg", "ce") if key in line}
        for line in lines
        if line["step"] % COURSE_STEPS == 0 and "loss" in line
    ]


def _scores(row: dict) -> dict:
    return {key: row[key] for key in ("n", "wer", "interval", "cer")}


def load_whisper(directory, **options):
    """A Whisper model of transformers, in float32, and its processor."""
    import torch
    import transformers

    model = transformers.WhisperForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, **options
    )
    return model.eval(), transformers.WhisperProcessor.from_pretrained(directory)


def whisper_prompt(processor, lang: str) -> list[int]:
    """What Whisper's decoder begins with to transcribe a language, without times."""
    # Named outright: a directory's generation_config.json need not know the languages' tokens.
    said = ("startoftranscript", lang, "transcribe", "notimestamps")
    return processor.tokenizer.convert_tokens_to_ids([f"<|{token}|>" for token in said])


def whisper_itself(sets, values) -> dict:
    """What the Whisper model writes with its own decoder, greedily, on each test set."""
    import torch

    model, processor = load_whisper(values.encoder)
    scores = {}
    for name, split in sets.items():
        utterances = manifest.read_manifest(split["test"])
        start_ids = whisper_prompt(processor, utterances[0].lang)
        hypotheses = []
        for start in tqdm.trange(0, len(utterances), 16, desc=f"Whisper itself on {name}"):
            waves = [audio.load_audio(u) for u in utterances[start : start + 16]]
            inputs = processor(waves, sampling_rate=16000, return_tensors="pt")
            with torch.no_grad():
                ids = model.generate(
                    inputs.input_features,
                    decoder_input_ids=torch.tensor([start_ids] * len(waves)),
                    num_beams=1,
                    do_sample=False,
                )
            hypotheses += processor.batch_decode(ids, skip_special_tokens=True)
        references = [u.text for u in utterances]
        scores[name] = _scores(metrics.score(references, hypotheses, [u.lang for u in utterances]))
    return {"trained_on": ITSELF, "arm": "", "seed": 0, "sets": scores}


def main(argv):
    del argv
    values = flags.FLAGS
    out = Path(values.out)
    sets = manifests(corpora(values.corpora), values.lang, out)
    done = tables.read_lines(RESULTS)
    key = lambda line: (line["trained_on"], line["arm"], line["seed"], tuple(line["sets"]))
    known = {key(line) for line in done}
    conditions = [*sets, *([SPOKEN] if values.sentences else []), ALL]
    jobs = {
        (name, values.arm, values.seed): lambda name=name: train_and_evaluate(
            name, sets, values, out
        )
        for name in values.conditions or conditions
    }
    if values.reference:
        jobs[(ITSELF, "", 0)] = lambda: whisper_itself(sets, values)
    for wanted, job in jobs.items():
        if (*wanted, tuple(sets)) not in known:
            line = job()
            done.append(line)
            with open(RESULTS, "a") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(tables.error_rates([line for line in done if set(line["sets"]) == set(sets)]))


if __name__ == "__main__":
    flags.DEFINE_string("encoder", None, "Directory of a Whisper model.")
    flags.DEFINE_string("llm", None, "Directory of a language model.")
    flags.DEFINE_string("corpora", None, "name=folder,... with train.jsonl, dev.jsonl, test.jsonl.")
    flags.DEFINE_string("sentences", "", "Text to be spoken, a sentence a line.")
    flags.DEFINE_integer("num_spoken", 4000, "Spoken utterances to train on.")
    flags.DEFINE_list("lang", ["en"], "Take only the lines of these languages.")
    flags.DEFINE_string("arm", "ctc", "Of configs/laptop.py.")
    flags.DEFINE_integer("seed", 0, "Of the run.")
    flags.DEFINE_list("conditions", [], "Train on these alone: corpora, spoken, all.")
    flags.DEFINE_multi_string("flags", [], "Further flags of otreg_jax.train; repeatable.")
    flags.DEFINE_string("out", "runs/laptop", "Where the runs are.")
    flags.DEFINE_bool("reference", False, "Also measure Whisper with its own decoder.")
    flags.mark_flags_as_required(["encoder", "llm", "corpora"])
    app.run(main)
