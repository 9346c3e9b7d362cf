"""Sentences of any language, and who speaks them: many voices, at many rates, by the seed."""

import random
import re
from collections.abc import Iterable, Iterator, Mapping

from etils import epath

from otreg_jax.data.synthetic import Speech

# eSpeak NG's variants of a voice, women's and men's. Those of OTHER are never trained on.
TRAIN = (
    "m1 m2 m3 m4 m6 m8 f1 f2 f3 f5 Alicia Andy Annie Gene Lee Michael adam anika antonio benjamin "
    "boris caleb david ed grandma john paul quincy robert steph"
).split()
OTHER = "m5 m7 f4 Andrea Mike aunty belinda edward linda max norbert shelby victor".split()
ACCENTS = {  # of languages that eSpeak NG speaks in several
    "en": ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland"),
    "es": ("es", "es-419"),
    "fr": ("fr-fr", "fr-be"),
    "pt": ("pt", "pt-br"),
}
PITCHES = (25, 75)
CONDITIONS = {  # of the test sets, where a recipe gives none
    "voices": {"voices": "other"},
    "fast": {"rate": 1.3},
    "reverb": {"reverb": 0.4},
    "noise": {"snr": 10.0},
}

Sentence = tuple[str, str]  # its language, as eSpeak NG calls it, and its text


def sets(config: Mapping) -> dict[str, list[Speech]]:
    """The training set, "dev" and one test set a condition, from files of sentences.

    No test sentence is a training sentence. All test sets speak the same sentences, in voices drawn
    alike, so that their scores differ by the condition alone.

    Args:
      config: "sentences" (see `read`), "num_train" (utterances; where that is more than there are
        sentences, they are spoken again by others; 0: each sentence once), "num_test" (sentences of
        each language), "rates" (words a minute, two bounds) and "seed"; "lang", "silence",
        "conditions" and "train_conditions" may be there, as for `data.sets.synthetic_sets`.
    """
    train, test = split(config)
    count = config["num_train"] or len(train)
    train = [train[i % len(train)] for i in range(count)]
    conditions = list(config.get("train_conditions", {"plain": {}}).values())
    spoken = {"train": list(_speak(config, train, conditions, config["seed"] + 1))}
    for name, condition in {"dev": {}, **config.get("conditions", CONDITIONS)}.items():
        spoken[name] = list(_speak(config, test, [condition], config["seed"] + 2))
    return spoken


def split(config: Mapping) -> tuple[list[Sentence], list[Sentence]]:
    """The sentences of the training set, in a random order, and of the test sets."""
    rng = random.Random(config["seed"])
    train, test = [], []
    for lang, found in read(config["sentences"], config.get("lang", "en")).items():
        if len(found) <= config["num_test"]:
            raise ValueError(
                f"synthetic.sentences: {len(found)} sentences of {lang}, of which "
                f"synthetic.num_test={config['num_test']} are for the test sets: none is left"
            )
        rng.shuffle(found)
        test += [(lang, text) for text in found[: config["num_test"]]]
        train += [(lang, text) for text in found[config["num_test"] :]]
    rng.shuffle(train)
    return train, test


def files(sentences: str) -> list[tuple[str | None, str]]:
    """(language or None, path) of every part of "FILE" or "de=FILE,en=FILE"."""
    parts = filter(None, map(str.strip, sentences.split(",")))
    return [re.fullmatch(r"(?:([A-Za-z]{2,3}(?:-\w+)*)=)?(.+)", part).groups() for part in parts]


def read(sentences: str, lang: str = "en") -> dict[str, list[str]]:
    """The distinct sentences of each language, in the order of their files.

    Args:
      sentences: "FILE", or "de=FILE,en=FILE" with eSpeak NG's names of the languages; UTF-8 text,
        one sentence a line.
      lang: of a file that names none.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no text, or a line says nothing; every such line is named.
    """
    found, problems = {}, []
    for named, path in files(sentences):
        path = epath.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"synthetic.sentences: {path}: no such file")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"synthetic.sentences: {path}: not UTF-8 text ({error})") from error
        lines = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
        problems += [
            f"{path}:{number}: nothing to be said in {line[:40]!r}"
            for number, line in lines
            if not any(map(str.isalnum, line))
        ]
        found.setdefault(named or lang, {}).update(dict.fromkeys(line for _, line in lines))
    if problems:
        raise ValueError("synthetic.sentences:\n  " + "\n  ".join(problems))
    return {lang: list(distinct) for lang, distinct in found.items()}


def _speak(config, sentences: Iterable[Sentence], conditions, seed: int) -> Iterator[Speech]:
    """Voice, pitch, rate and silence of the i-th sentence follow from (seed, i): they do not depend
    on how many there are, nor on the condition."""
    silence = config.get("silence", (0.0, 0.0))
    for i, (lang, text) in enumerate(sentences):
        rng = random.Random(f"{seed} {i}")
        condition = {"silence": silence, "rate": 1.0} | dict(conditions[i % len(conditions)])
        who = rng.random()
        variants = OTHER if condition.pop("voices", "train") == "other" else TRAIN
        accent = rng.choice(ACCENTS.get(lang, (lang,)))
        drawn = {
            "voice": f"{accent}+{variants[int(who * len(variants))]}",
            "pitch": rng.randint(*PITCHES),
            "rate": round(rng.uniform(*config["rates"]) * condition["rate"]),
            "silence": tuple(round(rng.uniform(*condition["silence"]), 3) for _ in range(2)),
        }
        yield Speech(text, lang=lang, **(condition | drawn))
