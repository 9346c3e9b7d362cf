"""A run of several tasks: evaluated by task, and asked what it was trained with."""

import json

import numpy as np
import pytest
import sacrebleu
import soundfile
from toy_run import TEXTS, make_run

from otreg_jax import build, evaluate, recognition, task_scores, transcribe
from otreg_jax import config as config_lib
from otreg_jax.data import prompts, sources

TASKS = {
    "transcribe": {"prompts": ("turn on the {language} radio [[call {context} ]]{speech}\n",)},
    "translate": {"prompts": ("turn {target_language} on {speech}\n",)},
    "identify": {"prompts": ("meet {speech}\n",)},
    "answer": {"prompts": ("{prompt} {speech}\n",)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rng, lines = np.random.default_rng(0), []
    for i in range(6):
        samples = rng.normal(size=5000 + 1000 * i).astype(np.float32) * 0.1
        soundfile.write(folder / f"{i}.wav", samples, 16000)
        line = {"audio_filepath": f"{i}.wav", "text": TEXTS[i % 5], "lang": "de" if i % 2 else "en"}
        line |= {"context": ["anna", "radio"], "target_text": TEXTS[i % 3], "target_lang": "fr"}
        lines.append(line | ({"prompt": "call the light", "answer": "stop"} if i > 3 else {}))
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, seed in (("ours", 0), ("theirs", 1)):
        make_run(folder / name, dev=folder / "set.jsonl", seed=seed, tasks=TASKS)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return evaluate.evaluate(folder / "ours", compare=[folder / "theirs"], batch_size=8)


def test_every_task_is_scored_by_its_own_figures(folder, results):
    stored = json.loads((folder / "ours" / "eval" / "results.json").read_text())
    assert list(stored["sets"]) == ["dev/transcribe"] and stored["sets"]["dev/transcribe"]["wer"]
    figures = {name: set(row["intervals"]) for name, row in stored["tasks"].items()}
    assert figures == {
        "dev/translate": {"bleu", "chrf"},
        "dev/identify": {"accuracy", "wer"},
        "dev/answer": {"f1", "exact_match"},
    }
    assert {row["n"] for row in stored["tasks"].values()} == {6, 2}
    for row in (*stored["sets"].values(), *stored["tasks"].values()):
        assert row["in_domain"] and row["alignment"]["transport_cost"] > 0
    assert "nrefs:1" in stored["tasks"]["dev/translate"]["signatures"]["bleu"]
    confusion = stored["tasks"]["dev/identify"]["confusion"]
    assert {said: sum(row.values()) for said, row in confusion.items()} == {"de": 3, "en": 3}
    assert set(stored["sets"]["dev/transcribe"]["context"]) == {
        "biased_wer",
        "unbiased_wer",
        "intervals",
    }
    rows = map(json.loads, (folder / "ours/eval/hypotheses.jsonl").read_text().splitlines())
    references = {(row["set"], row["lang"]): row["reference"] for row in rows}
    assert references["dev/identify", "de"].startswith("<de> ")
    assert references["dev/translate", "fr"] in TEXTS


def test_the_report_and_the_comparison_show_tasks(folder, results):
    page = (folder / "ours" / "eval" / "report.html").read_text()
    for shown in ("Other tasks", "BLEU", "chrF", "token F1", "no tag", "listed words", "nrefs:1"):
        assert shown in page
    (differences,) = results["compare"].values()
    assert set(differences) == {*results["sets"], *results["tasks"]}
    theirs = json.loads((folder / "theirs" / "eval" / "results.json").read_text())["tasks"]
    for name, row in results["tasks"].items():
        figure = task_scores.main_figure(row["task"])
        difference = row[figure] - theirs[name][figure]
        np.testing.assert_allclose(differences[name]["difference"], difference, atol=1e-9)
    table = evaluate.table(results)
    assert "dev/translate" in table and "bleu" in table and "listed words" in table


def test_a_run_is_asked_as_it_was_trained(folder, results):
    run = build.load_run(folder / "ours")
    asked_run, asked = transcribe.ask(run, lang="German", context=("anna", "radio"))
    piece = sources.from_file(str(folder / "3.wav"))._replace(**asked)
    (batch,) = recognition.batches(asked_run, [piece], 1, "")
    found, _ = sources.scan(f"{folder}/set.jsonl", columns=prompts.columns(run.config))
    row = found[3]._replace(task="transcribe")
    trained = prompts.prompt(prompts.make(run.config, run.tokenizer), row)
    for name in ("prefix", "suffix"):
        ids = np.asarray(batch[name])[0, : int(batch[f"{name}_length"][0])]
        assert tuple(ids) == getattr(trained, name)
    found, _ = transcribe.transcribe(asked_run, [str(folder / "3.wav")], asked=asked)
    rows = map(json.loads, (folder / "ours/eval/hypotheses.jsonl").read_text().splitlines())
    heard = {row["id"]: row["hypothesis"] for row in rows if row["set"] == "dev/transcribe"}
    assert transcribe.joined(found[str(folder / "3.wav")]) == heard["3.wav"]


def test_what_a_run_was_never_trained_with_is_refused(folder):
    config = config_lib.load(folder / "ours" / "config.json")
    config, asked = prompts.ask(config, "ast", target_lang="fr")
    assert asked["task"] == "translate" and prompts.tasks_of(config).keys() == {"translate"}
    config = config_lib.load(folder / "ours" / "config.json")
    for wrong, message in (
        ({"task": "sing"}, "trained on transcribe, answer, identify, translate"),
        ({"lang": "de", "target_lang": "fr"}, "target_lang='fr': the run was never trained with"),
        ({"task": "identify", "context": ("a",)}, "context=.*never trained"),
        ({"template": "{mood} {speech}"}, "never trained with {mood}"),
        ({"task": "translate"}, "prompts need target_language"),
    ):
        with pytest.raises(ValueError, match=message):
            prompts.ask(config, **wrong)
    plain = config_lib.default()
    with pytest.raises(ValueError, match="lang='de': the run was never trained with it"):
        prompts.ask(plain, lang="de")
    assert prompts.ask(plain, template="Say it: {speech}\n")[1]["fields"] == ()


def test_figures_of_tasks_follow_their_definitions():
    def rows(*pairs, **more):
        known = {"lang": "en", "unfinished": False} | more
        return [{"reference": said, "hypothesis": heard} | known for said, heard in pairs]

    said = rows(("the cat sat on the mat", "the cat sat on a mat"), ("so be it", "so it be"))
    found = task_scores.score("translate", said, "whisper")
    sides = [row["hypothesis"] for row in said], [[row["reference"] for row in said]]
    assert found["bleu"] == sacrebleu.corpus_bleu(*sides).score
    assert found["chrf"] == sacrebleu.corpus_chrf(*sides).score
    assert found["intervals"]["bleu"][0] <= found["bleu"] <= found["intervals"]["bleu"][1]
    tagged = rows(("<de> ja", "<DE> ja"), ("<en> yes", "yes"), ("<en> no", "<fr> no"))
    found = task_scores.score("identify", tagged, "whisper")
    assert found["accuracy"] == 1 / 3 and found["wer"] == 0
    assert found["confusion"] == {"de": {"de": 1}, "en": {"": 1, "fr": 1}}
    found = task_scores.score("answer", rows(("a big dog", "Big dog!"), ("no", "no")), "whisper")
    np.testing.assert_allclose([found["f1"], found["exact_match"]], [(0.8 + 1) / 2, 0.5])
    # "anna" is missed and "radio" inserted: both are listed, and one listed word was said.
    listed = rows(("call anna now please", "call now please radio"), context=["anna", "radio"])
    found = {key: figure.value for key, figure in task_scores.biased(listed, "basic").items()}
    assert found == {"biased_wer": 2.0, "unbiased_wer": 0.0}
    assert task_scores.biased(rows(("a", "a")), "basic") == {}
