"""Does a model from pretrained parts write the language that its prompt asks for?

    python -m benchmarks.prompted --encoder=whisper-base --llm=smollm2-135m

eSpeak NG speaks the sentences of configs/tasks.py in English, German and French. On frozen Whisper
base and SmolLM2, an adapter and LoRA learn to write what they hear in the language that the prompt
names: configs/laptop.py, but for what `recipe` changes. The test asks each recording of sentences
and voices that were not trained on for all three languages. An answer obeys if, of its sentence's
three versions, it is nearest (chrF) to the one in the language asked for. The run lies in --out and
resumes there; its figures go to benchmarks/results/prompted.json, for the documents' table.
"""

import json
import runpy
from pathlib import Path

import sacrebleu
from absl import app, flags

from benchmarks import common, tables
from otreg_jax import command, evaluate, train

ROOT = Path(__file__).parent.parent
LANGS = ("en", "de", "fr")
NUM_TEST = 12  # sentences, each in three languages
SHOWN = 0  # the sentence that the documents show


def write_manifests(folder: Path) -> dict[str, Path]:
    """{"train": manifest, "en": the test asked for English, ...}. Each recording is in "train" for
    each of the languages, and each row has the sentence in all of them: `in_en`, ..."""
    tasks = runpy.run_path(str(ROOT / "configs" / "tasks.py"))
    lines = {name: [] for name in ("train", *LANGS)}
    for name, rows in tasks["speak"](folder / "speech").items():
        split, _, lang = name.partition("-")
        for i, row in enumerate(rows if split == "train" else rows[:NUM_TEST]):
            line = {"audio_filepath": str(row["audio"]), "duration": row["duration"]}
            line |= {"text": row["text"], "source_lang": lang}
            versions = {to: tasks["in_language"](to, *row["told"]) for to in LANGS}
            for to, version in versions.items():
                asked = {"id": f"{lang}-{i}-{to}", "target_lang": to, "target_text": version}
                lines["train" if split == "train" else to].append(line | asked)
    for name, rows in lines.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in lines}


def recipe(values, manifests: dict[str, Path]):
    """configs/laptop.py for one task, short sentences and few steps."""
    c = runpy.run_path(str(ROOT / "configs" / "laptop.py"))["get_config"]("otreg")
    c.encoder.path, c.llm.path, c.seed = values.encoder, values.llm, values.seed
    c.data.train = str(manifests["train"])
    c.data.test = ",".join(f"{to}={manifests[to]}" for to in LANGS)
    c.data.num_buckets, c.data.max_duration = 1, 6.0
    c.tasks = {"translate": {"prompts": ("{target_language}: {speech}\n",)}}
    c.decode.max_tokens = 24
    c.num_steps, c.checkpoint_every = values.align + values.steps, 50
    c.stages.sft.start = values.align
    return c


def score(workdir: Path) -> dict:
    """Of the answers in hypotheses.jsonl: the share that obeys, by the language heard and the one
    asked for; of how many recordings all three do; BLEU by the language asked for."""
    lines = (workdir / "eval" / "hypotheses.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {tuple(row["id"].split("-")): row for row in map(json.loads, lines)}
    obeyed, answers = {}, {}
    for (heard, i, asked), row in rows.items():
        near = {
            to: sacrebleu.sentence_chrf(row["hypothesis"], [rows[heard, i, to]["reference"]]).score
            for to in LANGS
        }
        obeyed[heard, i, asked] = near[asked] > max(near[to] for to in LANGS if to != asked)
        if int(i) == SHOWN:
            answers.setdefault(heard, {"said": rows[heard, i, heard]["reference"]})
            answers[heard][asked] = row["hypothesis"]
    recordings = {(heard, i) for heard, i, _ in rows}
    share = lambda found: sum(found) / len(found)
    return {
        "answers": len(rows),
        "obeyed": share(list(obeyed.values())),
        "all_three": share([all(obeyed[h, i, to] for to in LANGS) for h, i in recordings]),
        "by_language": {
            heard: {
                asked: share([ok for (h, _, a), ok in obeyed.items() if (h, a) == (heard, asked)])
                for asked in LANGS
            }
            for heard in LANGS
        },
        "exact": share([row["hypothesis"] == row["reference"] for row in rows.values()]),
        "shown": answers,
    }


def minutes_of(workdir: Path) -> float:
    """From the start of training to its end, pauses included."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return max(line["elapsed"] for line in lines) / 60


def main(argv):
    del argv
    command.quiet_and_cached()
    values = flags.FLAGS
    out = Path(values.out)
    manifests = write_manifests(out)
    config = recipe(values, manifests)
    if int(train.train(config, out / "run").step) < config.num_steps:
        raise SystemExit("stopped; the same command goes on")
    results = evaluate.evaluate(out / "run", batch_size=12)
    print(evaluate.table(results))
    found = score(out / "run") | {
        "bleu": {to: results["tasks"][to]["bleu"] for to in LANGS},
        "steps": [values.align, values.steps],
        "batch": config.batch_size,
        "seed": values.seed,
        "minutes": minutes_of(out / "run"),
        "machine": common.describe_machine("flax", "ott-jax"),
    }
    path = tables.RESULTS / "prompted.json"
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(tables.prompted())


if __name__ == "__main__":
    flags.DEFINE_string("encoder", None, "Directory of a Whisper model.")
    flags.DEFINE_string("llm", None, "Directory of a language model.")
    flags.DEFINE_integer("align", 300, "Steps that align the adapter alone.")
    flags.DEFINE_integer("steps", 200, "Steps through the LLM.")
    flags.DEFINE_integer("seed", 0, "Of the run.")
    flags.DEFINE_string("out", "runs/prompted", "Where data and run are.")
    flags.mark_flags_as_required(["encoder", "llm"])
    app.run(main)
