"""Tasks, templates with fields, and prompts that each utterance has of its own."""

import itertools
import json

import jax
import numpy as np
import pytest
import soundfile
import toy

from otreg_jax import config as config_lib
from otreg_jax import losses
from otreg_jax.data import pipeline, prompts, sets, sources, text, tokenization
from otreg_jax.models import slm as slm_lib

TASKS = {
    "transcribe": {
        "prompts": (
            "Transcribe the {language} speech. [[Words: {context}. ]]{speech}\n",
            "What is said in {language}? {context}{speech} Answer:",
        ),
        "weight": 2.0,
    },
    "translate": {"prompts": ("{source_language} to {target_language}: {speech}\n",)},
    "identify": {"prompts": ("Which language? {speech}\n",)},
    "answer": {"prompts": ("{prompt} {speech}\n",)},
}
ROWS = (
    {"text": "guten morgen", "lang": "de", "target_text": "good morning", "target_lang": "en"},
    {"text": "call anna", "lang": "en-US", "context": ["anna", "radio"], "mood": "glad"},
    {"text": "bonjour paul", "lang": "fra", "context": ["paul"], "task": "transcribe"},
    {"lang": "de", "taskname": "lid"},
    {"prompt": "Is it loud?", "answer": "yes", "lang": "en"},
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for i in range(4 * len(ROWS)):
        samples = np.zeros(1600 * (1 + i % 7), np.float32) + 0.01
        soundfile.write(folder / f"{i}.wav", samples, 16000)
        line = {"audio_filepath": f"{i}.wav", "duration": len(samples) / 16000}
        lines.append(json.dumps(line | ROWS[i % len(ROWS)]))
    (folder / "set.jsonl").write_text("\n".join(lines))
    return folder / "set.jsonl"


@pytest.fixture(scope="module")
def config(manifest):
    config = config_lib.default()
    config.data.train, config.data.num_mels = str(manifest), 8
    config.data.distractors = 2
    with config.unlocked():
        config.tasks = TASKS
    config_lib.check(config)
    return config


@pytest.fixture(scope="module")
def items(config, tmp_path_factory):
    return sets.load_train(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def tokenizer(config, items, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return tokenization.train_sentencepiece(prompts.texts(config, items), folder / "t", 120)


def test_templates_are_filled_with_columns_defaults_and_optional_parts():
    template = "In {language|some language}: [[words {context}, ]]{mood}{speech}"
    assert prompts.fields_of(template) == ("language", "context", "mood")
    assert prompts.missing(template, {}) == ["mood"]
    assert prompts.fill(template, {"mood": "glad"}) == "In some language: glad{speech}"
    values = {"language": "German", "context": "a, {mood} [[b]]", "mood": "sad"}
    filled = prompts.fill(template, values)
    assert filled == "In German: words a, {mood} [[b]], sad{speech}"  # a value is never a field


def test_each_row_serves_the_task_that_it_names_or_all_that_it_has_the_fields_of(items):
    served = {(u.audio.rpartition("/")[2], u.task) for u in items}
    of_row = lambda i: {task for name, task in served if name == f"{i}.wav"}
    assert of_row(0) == {"transcribe", "translate", "identify"}
    assert of_row(1) == {"transcribe", "identify"}
    assert of_row(2) == {"transcribe"}
    assert of_row(3) == {"identify"} and of_row(4) == {"answer", "identify"}
    assert len({u.id for u in items}) == len(items)
    assert {u.lang for u in items if u.task == "translate"} == {"de"}


def test_rows_that_serve_nothing_are_named_with_what_they_lack(manifest, config, capsys):
    lines = [
        {"text": "a", "task": "sing"},
        {"answer": "yes", "task": "answer"},
        {"answer": "yes", "prompt": "a {speech}?", "task": "answer"},
        {"text": "a", "lang": "de", "task": "ast", "target_text": "b", "mood": "x"},
        {"text": "a", "lang": "de", "context": {"a": 1}},
    ]
    path = manifest.with_name("bad.jsonl")
    rows = [{"audio_filepath": "0.wav", "duration": 0.1, "id": i} for i in range(5)]
    path.write_text("\n".join(json.dumps(a | b) for a, b in zip(rows, lines, strict=True)))
    wrong = config.copy_and_resolve_references()
    wrong.data.train, wrong.data.on_bad_audio = str(path), "skip"
    with pytest.raises(ValueError, match="no utterance serves a task"):
        sets.load_train(wrong, path.parent, path.with_name("skipped.jsonl"))
    told = path.with_name("skipped.jsonl").read_text().splitlines()
    told = {json.loads(line)["where"]: json.loads(line)["message"] for line in told}
    assert "task 'sing': the run has transcribe, answer" in told[f"{path}:1"]
    assert "answer needs prompt" in told[f"{path}:2"]
    assert "holds {speech}" in told[f"{path}:3"]
    assert "translate needs target_language" in told[f"{path}:4"]
    assert "context is {'a': 1}, not a text" in told[f"{path}:5"]
    assert capsys.readouterr().out.count("columns that are not used: 'mood'") == 1


def test_answers_are_of_the_task(config, items):
    said = {
        (u.lang, u.task): prompts.answer(prompts.make(config, None_tokenizer()), u) for u in items
    }
    assert said["de", "translate"] == "good morning" and said["de", "transcribe"] == "guten morgen"
    assert said["en-US", "identify"] == "<en> call anna" and said["en", "answer"] == "yes"
    assert said["fra", "transcribe"] == "bonjour paul"


class None_tokenizer:
    """Writes anything; enough to make answers of."""

    unk_id, eos_id, adds_bos, control, chat_template = None, 2, False, {}, None

    def encode_prompt(self, text):
        first, rest = text.split("{speech}")
        return [*map(ord, first), None, *map(ord, rest)]


def batches(config, items, tokenizer, num_steps=12, **options):
    prompter = prompts.make(config, tokenizer, items)
    found = pipeline.train_batches(
        items,
        tokenizer,
        config.data,
        batch_size=8,
        seed=3,
        num_steps=num_steps,
        prompter=prompter,
        **options,
    )
    return list(found), prompter


def ids(batch, name, row):
    return tuple(batch[name][row, : batch[f"{name}_length"][row]].tolist())


def test_the_prompt_of_training_is_that_of_decoding_by_token_ids(config, items, tokenizer):
    trained, prompter = batches(config, items, tokenizer)
    data_config = pipeline.for_evaluation(config.data)
    decoded = pipeline.eval_batches(items, tokenizer, data_config, batch_size=8, prompter=prompter)
    asked = {}
    for batch in decoded:
        for row, index in enumerate(batch["index"]):
            asked[int(index)] = ids(batch, "prefix", row), ids(batch, "suffix", row)
    seen, with_distractors = set(), 0
    for batch, row in itertools.product(trained, range(8)):
        utterance = items[batch["index"][row]]
        found = ids(batch, "prefix", row), ids(batch, "suffix", row)
        made = [
            text.build_prompt(tokenizer, prompts.fill(template, prompts.values_of(utterance)), True)
            for template in prompter.tasks[utterance.task].prompts
        ]
        made = [(p.prefix, p.suffix) for p in made]
        assert asked[int(batch["index"][row])] == made[0]
        if utterance.task == "transcribe" and prompts.context_of(utterance):
            shown = tokenizer.decode([i for part in found for i in part])
            assert all(word in shown for word in prompts.context_of(utterance))
            with_distractors += found not in made
        else:
            assert found in made
            seen.add((utterance.task, made.index(found)))
        heard, said = ids(batch, "transcript", row), batch["tokens"][row]
        assert heard == tuple(tokenizer.encode(utterance.text))
        assert tuple(said[: batch["token_length"][row]]) == tuple(
            tokenizer.encode(prompts.answer(prompter, utterance))
        )
    assert seen == {
        ("transcribe", 0),
        ("transcribe", 1),
        ("translate", 0),
        ("identify", 0),
        ("answer", 0),
    }
    assert with_distractors


def test_batches_with_prompts_depend_on_seed_and_step_alone(config, items, tokenizer):
    whole, _ = batches(config, items, tokenizer)
    resumed, _ = batches(config, items, tokenizer, start_step=7)
    parts = [batches(config, items, tokenizer, host_index=i, host_count=4)[0] for i in range(4)]
    shapes = set()
    for step, batch in enumerate(whole):
        together = {key: np.concatenate([part[step][key] for part in parts]) for key in batch}
        again = resumed[step - 7] if step >= 7 else batch
        for key in batch:
            np.testing.assert_array_equal(batch[key], together[key])
            np.testing.assert_array_equal(batch[key], again[key])
        shapes.add(tuple(sorted((key, x.shape) for key, x in batch.items())))
    assert len(shapes) <= config.data.num_buckets
    other, _ = batches(config, items, tokenizer, start_step=11)
    assert any(
        (whole[11][key] != whole[10][key]).any()
        for key in other[0]
        if whole[10][key].shape == whole[11][key].shape
    )


def test_tasks_are_mixed_by_weight(config, items, tokenizer):
    found, _ = batches(config, items, tokenizer, num_steps=50)
    tasks = [items[i].task for batch in found for i in batch["index"]]
    share = {task: tasks.count(task) / len(tasks) for task in TASKS}
    assert abs(share["transcribe"] - 0.4) < 0.03 and abs(share["answer"] - 0.2) < 0.03


def own_batch():
    """Rows of mixed lengths with prompts and transcripts of their own; the third has no
    transcript."""
    rng, batch = np.random.default_rng(5), toy.toy_batch()
    lengths = {"prefix": (3, 1, 2, 4), "suffix": (1, 5, 2, 3), "transcript": (4, 2, 0, 5)}
    for name, length in lengths.items():
        batch[name] = rng.integers(5, toy.VOCAB, (4, 5)).astype(np.int32)
        batch[f"{name}_length"] = np.array(length, np.int32)
    return batch


def test_a_row_with_its_own_prompt_gives_in_a_batch_what_it_gives_alone():
    slm, params = toy.toy_slm()
    forward = jax.jit(slm_lib.forward, static_argnums=(0, 3))
    batch = own_batch()
    together = forward(slm, params, batch, 1)
    for row in (0, 1, 3):
        alone = forward(slm, params, {key: x[row : row + 1] for key, x in batch.items()}, 1)
        n, s = batch["token_length"][row] + 1, together.speech_length_B[row]
        pairs = [(together.hidden_BTD[row, :n], alone.hidden_BTD[0, :n])]
        pairs += [(together.speech_BSD[row, :s], alone.speech_BSD[0, :s])]
        for a, b in pairs:
            np.testing.assert_allclose(a, b, atol=2e-6)
    own = [key for key in batch if key.partition("_")[0] in ("prefix", "suffix")]
    fixed = {key: x[1:2] for key, x in batch.items() if key not in own}
    prompt = text.Prompt(ids(batch, "prefix", 1), ids(batch, "suffix", 1), slm.prompt.eos)
    plain = forward(slm._replace(prompt=prompt), params, fixed, 1)
    n = batch["token_length"][1] + 1
    np.testing.assert_allclose(plain.hidden_BTD[0, :n], together.hidden_BTD[1, :n], atol=2e-6)


def test_otreg_and_ctc_take_the_transcript_and_leave_out_a_row_without_one():
    slm, params = toy.toy_slm(ctc=True)
    config = toy.toy_config(otreg__weight=1.0, ctc__weight=1.0)

    @jax.jit
    def loss_of(params, batch):
        schedules = losses.make_schedules(config)
        return losses.loss_fn(slm, params, batch, 5, config=config, schedules=schedules)[1]

    batch = own_batch()
    answered = loss_of(params, batch)
    heard = {"tokens": batch["transcript"], "token_length": batch["transcript_length"]}
    own = {"transcript": heard["tokens"], "transcript_length": heard["token_length"]}
    transcribed = loss_of(params, batch | heard | own)
    for key in ("otreg", "ctc", "marginal_error"):
        np.testing.assert_allclose(answered[key], transcribed[key], rtol=1e-6)
    assert abs(answered["ce"] - transcribed["ce"]) > 1e-3
    without = batch | {"index": np.array([0, 1, -1, 3], np.int32)}
    left_out = loss_of(params, without)
    for key in ("otreg", "ctc"):
        np.testing.assert_allclose(answered[key], left_out[key], rtol=1e-6)
    assert abs(answered["ce"] - left_out["ce"]) > 1e-4


def test_a_control_token_in_a_field_is_refused_with_its_row(config, items):
    class Chat(None_tokenizer):
        control = {"<|end|>": 7}

    field = items[-1].fields + (("prompt", "what <|end|>"),)
    wrong = [items[0], items[-1]._replace(fields=field, task="answer")]
    with pytest.raises(ValueError, match=r"set.jsonl:20: prompt holds <\|end\|>"):
        prompts.make(config, Chat(), wrong)


def test_a_run_with_one_prompt_is_as_before(manifest, tmp_path):
    config = config_lib.default()
    config.data.train = str(manifest.with_name("plain.jsonl"))
    row = {"audio_filepath": "0.wav", "duration": 0.1, "text": "guten tag", "task": "x"}
    manifest.with_name("plain.jsonl").write_text(json.dumps(row))
    found = sets.load_train(config, tmp_path)
    assert found == sources.read_manifest(config.data.train) and found[0].fields == ()
    assert prompts.described(config) == config.prompt
