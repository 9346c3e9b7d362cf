"""From a configuration to utterances: manifests, synthetic speech made on the spot, or both."""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from otreg_jax import rundir
from otreg_jax.data import features, index, prompts, remote, sources, spoken, synthetic
from otreg_jax.data.utterances import too_long

Sets = dict[str, list[sources.Utterance]]


def load_train(config, workdir, skipped_path=None) -> Sequence[sources.Utterance]:
    """The training utterances that the model can take, those of manifests in their order, then
    synthetic speech, each once for every task that it is for; what is set aside is appended to the
    JSON-lines file `skipped_path`, if one is given.

    Large manifests are read once: see `index`.

    Raises:
      ValueError, FileNotFoundError: a manifest is missing or wrong (all its problems are listed),
        or no utterance is left.
    """
    paths = [path.strip() for path in config.data.train.split(",") if path.strip()]
    data, synthetic_config = config.data, config.synthetic if is_spoken(config) else {}
    settings = [data.data_root, data.on_bad_audio, data.long_audio, data.max_utterances]
    settings += [max_seconds(config), config.prompt, config.tasks, synthetic_config]
    settings = json.loads(json.dumps(settings, default=lambda x: x.to_dict()))
    home = remote.user_cache() if "://" in data.cache or not data.cache else Path(data.cache)
    found = index.once(home / "index", paths, settings, lambda: _find_train(config, workdir))
    sources.tell(found, skipped_path)
    if not found.utterances:
        lacks_task = found.told[-1][1]
        limit = f"is left to train on (data.max_duration is {data.max_duration:g} s)"
        why = "serves a task" if lacks_task else limit
        raise ValueError(f"{data.train}: no utterance {why}; see skipped.jsonl")
    return found.utterances


def _find_train(config, workdir) -> sources.Found:
    found, told, segments = [], [], ""
    if config.data.train:
        found, told, segments = sources.find_utterances(
            config.data.train,
            config.data,
            max_duration=max_seconds(config),
            require_text=not config.tasks,
            columns=prompts.columns(config),
        )
    if is_spoken(config):
        spoken_ones, refused = not_too_long(load_synthetic(config, workdir)["train"], config)
        told = [*told, ("skipped", sources.may_skip(refused, config.data.on_bad_audio))]
        found = [*found, *spoken_ones]
    items, unfit = prompts.expand(found[: config.data.max_utterances or None], config)
    told = [*told, ("skipped", sources.may_skip(unfit, config.data.on_bad_audio))]
    return sources.Found(items, told, segments)


def load_dev(config, workdir) -> list[sources.Utterance]:
    """The dev set as training evaluates it; what cannot be used is left out and counted.

    Raises:
      ValueError, FileNotFoundError: there is no such manifest, or nothing usable in it.
    """
    if config.data.dev:
        found, problems = _scan(config.data.dev, config, not config.tasks)
    else:
        found, problems = load_synthetic(config, workdir)["dev"], []
    found, refused = not_too_long(found, config)
    found, unfit = prompts.expand(found, config)
    problems += refused + unfit
    sources.record_skipped(problems, None, note=f"data.dev={config.data.dev}: left out")
    if not found:
        raise ValueError(f"data.dev={config.data.dev}: nothing usable in it; eval_every needs it")
    return found


def load_eval(config, workdir, manifests: str = "") -> tuple[Sets, list[sources.Problem]]:
    """The evaluation sets, and the lines of their manifests that cannot be used.

    A set whose utterances are for several tasks becomes one of each, "name/task". An empty
    transcript is allowed: whatever is recognised there is inserted.

    Args:
      manifests: "name=manifest,..."; "" for the sets of the configuration.

    Raises:
      ValueError, FileNotFoundError: a manifest is missing, or nothing usable is in any.
    """
    utterances = {}
    if is_spoken(config) and not manifests:
        utterances = load_synthetic(config, workdir)
        utterances.pop("train")
        if config.data.dev:
            utterances["spoken"] = utterances.pop("dev")
    paths = {"dev": config.data.dev} if config.data.dev else {}
    paths |= named_manifests(config.data.test)
    if manifests:
        paths = named_manifests(manifests)
    if both := sorted(paths.keys() & utterances.keys()):
        raise ValueError(f"data.test: synthetic speech has sets of these names: {', '.join(both)}")
    problems = []
    for name, path in paths.items():
        utterances[name], bad = _scan(path, config, require_text=False)
        problems += bad
    utterances = dict(sorted(utterances.items(), key=lambda item: item[0] != "dev"))
    for name, found in utterances.items():
        found, refused = not_too_long(found, config)
        utterances[name], unfit = prompts.expand(found, config, require_text=False)
        problems += refused + unfit
    utterances = _by_task(utterances)
    if not utterances:
        why = f": {sources.count(problems)}" if problems else ""
        raise ValueError(
            f"{workdir}: nothing to evaluate{why}; set data.dev or data.test when training, or "
            "give --sets=name=manifest.jsonl"
        )
    return utterances, problems


def _scan(path: str, config, require_text: bool):
    columns = prompts.columns(config)
    return sources.scan(path, config.data.data_root, require_text, columns)


def _by_task(utterances: Sets) -> Sets:
    """The sets that are not empty, those of several tasks divided."""
    divided = {}
    for name, found in utterances.items():
        tasks = list(dict.fromkeys(u.task for u in found))
        for task in tasks:
            mine = [u for u in found if u.task == task]
            divided[f"{name}/{task}" if len(tasks) > 1 else name] = mine
    return divided


def not_too_long(
    utterances: list[sources.Utterance], config
) -> tuple[list[sources.Utterance], list[sources.Problem]]:
    """The utterances that the model takes whole, and a problem for each of the others."""
    longest = max_seconds(config)
    refused = [problem for u in utterances if (problem := too_long(u, longest))]
    return [u for u in utterances if not too_long(u, longest)], refused


def max_seconds(config) -> float:
    """The longest audio the model takes: `data.max_duration`, or what the encoder has positions for
    (30 s, if it is a pretrained one)."""
    encoder = config.encoder
    frames = encoder.max_positions * math.prod(encoder.strides)
    return min(config.data.max_duration, 30.0 if encoder.path else frames / features.FRAME_RATE)


def describe(utterances: Sequence[sources.Utterance]) -> dict[str, float]:
    """What later use of a model needs to know of its training data."""
    seconds_N = index.durations(utterances)
    return {
        "utterances": len(seconds_N),
        "hours": round(float(seconds_N.sum()) / 3600, 4),
        "longest_seconds": float(seconds_N.max()),
    }


def longest_seconds(workdir) -> float:
    """The longest audio that a run was trained on; infinite where the run does not say."""
    path = rundir.of(workdir).description
    if not path.exists():  # the run is of an older version
        return math.inf
    remedy = "delete it to do without"
    try:
        return float(rundir.read_json(path, remedy)["longest_seconds"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged, no longest_seconds in it; {remedy}") from error


def is_spoken(config) -> bool:
    """Whether synthetic speech is asked for."""
    return bool(config.synthetic.num_train or config.synthetic.get("sentences"))


def load_synthetic(config, workdir) -> Sets:
    """The sets of `config.synthetic`: "train", "dev" and one for each condition."""
    cache = Path(config.data.cache or rundir.of(workdir).data)
    paths = synthetic.synthesize(synthetic_sets(config.synthetic), cache)
    return {name: sources.read_manifest(path) for name, path in paths.items()}


def named_manifests(text: str) -> dict[str, str]:
    """The string name=manifest,name=manifest as {name: manifest}."""
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    wrong = ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]
    names = Counter(name for name, _, _ in pairs)
    wrong += [f"{name}=" for name, count in names.items() if count > 1]
    if wrong:
        raise ValueError(
            f"data.test: {', '.join(map(repr, wrong))}: write name=manifest, separated by commas, "
            "each name once"
        )
    return {name: path for name, _, path in pairs}


def draw(grammar, rng: random.Random) -> str:
    """A random sentence of {"templates": ("call {person}", ...), "slots": {"person": (...)}}."""
    template = rng.choice(grammar["templates"])
    return re.sub(r"{(\w+)}", lambda slot: rng.choice(grammar["slots"][slot[1]]), template)


def sentences(grammar, count: int, seed: int, exclude=()) -> list[str]:
    """`count` distinct sentences of a grammar, none of them in `exclude`."""
    rng = random.Random(seed)
    found, taken = [], set(exclude)
    for _ in range(1000 * count):
        sentence = draw(grammar, rng)
        if sentence not in taken:
            taken.add(sentence)
            found.append(sentence)
        if len(found) == count:
            return found
    raise ValueError(
        f"synthetic: the grammar is too small for {count} more sentences beside {len(exclude)}: "
        "add templates or words to its slots"
    )


def synthetic_sets(config) -> dict[str, list[synthetic.Speech]]:
    """The training set, the in-domain "dev" set and one test set a condition.

    No test sentence is a training sentence, and test sets of the same templates speak the same
    sentences, so that their scores differ by the condition alone.

    Args:
      config: "templates", "slots", "train_voices", ..., see configs/quickstart.py. A condition may
        name other voices ("voices": "other" for `other_voices`) and templates ("templates": "new"
        for `new_templates`), the rest of it is "rate" (a factor), "reverb", "snr" and "silence"
        (seconds at both ends, drawn between two bounds). `silence` holds for every set without its
        own; `train_conditions` are met in turn by the training utterances. With "sentences", files
        of them take the place of templates: see `spoken.sets`.
    """
    if config.get("sentences"):
        return spoken.sets(config)
    train = sentences(config, config.num_train, config.seed)
    plain = config.get("silence", (0.0, 0.0))
    rng = random.Random(config.seed + 3)

    def speak(texts, voices, conditions):
        items = zip(texts, _cycle(voices, len(texts)), _cycle(conditions, len(texts)), strict=True)
        for text, (voice, pitch), condition in items:
            condition = {"silence": plain, "rate": 1.0} | dict(condition)
            silence = tuple(round(rng.uniform(*condition["silence"]), 3) for _ in range(2))
            rate = round(config.rate * condition["rate"])
            fields = {"rate": rate, "silence": silence, "lang": config.lang, "pitch": pitch}
            yield synthetic.Speech(text, voice=voice, **(condition | fields))

    train_conditions = list(config.get("train_conditions", {"plain": {}}).values())
    sets = {"train": list(speak(train, config.train_voices, train_conditions))}
    for name, condition in {"dev": {}, **config.conditions}.items():
        condition = dict(condition)
        voices = config[condition.pop("voices", "train") + "_voices"]
        grammar = config
        if "templates" in condition:
            templates = config[condition.pop("templates") + "_templates"]
            grammar = {"templates": templates, "slots": config.slots}
        texts = sentences(grammar, config.num_test, config.seed + 1, exclude=train)
        sets[name] = list(speak(texts, voices, [condition]))
    return sets


def text_corpus(config, count: int) -> list[str]:
    """The training sentences and `count` draws of the same grammar, no test sentence among them:
    the text that an LLM may have read. Of files of sentences, those that are trained on."""
    if config.get("sentences"):
        return [text for _, text in spoken.split(config)[0]]
    train = sentences(config, config.num_train, config.seed)
    test = set(sentences(config, config.num_test, config.seed + 1, exclude=train))
    rng = random.Random(config.seed + 2)
    return train + [text for text in (draw(config, rng) for _ in range(count)) if text not in test]


def _cycle(items, count: int):
    return [items[i % len(items)] for i in range(count)]
