"""What each utterance is asked and what it is to answer: tasks, and templates with fields.

A template is text with fields in braces: "Transcribe the {language} speech. {speech}". A field
stands for a column of the utterance's manifest row; {name|default} says what stands there where the
row has none, and a part in [[ ]] is left out where one of its fields is missing:
"[[Words that may occur: {context}. ]]{speech}". A task has one or more prompts, of which each draw
of an utterance takes one, and an answer, a template too: "<{lang}>[[ {text}]]" begins with a tag.

What is filled in is text: it is never read as a field, nor as a control token of the tokenizer.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from otreg_jax import languages
from otreg_jax.data import index
from otreg_jax.data import text as text_lib
from otreg_jax.data.tokenization import SPEECH, Tokenizer
from otreg_jax.data.utterances import Problem, Utterance

_FIELD = re.compile(r"{(?!speech})(\w+)(\|[^{}]*)?}")
_OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)

TRANSCRIBE = "transcribe"
# What well-known tasks answer where the configuration does not say.
ANSWERS = {
    TRANSCRIBE: "{text}",
    "translate": "{target_text}",
    "identify": "<{lang}>[[ {text}]]",
    "answer": "{answer}",
}
# What other tools call them: NeMo's `taskname`, OWSM's and Whisper's task tokens.
_NAMES = {
    "asr": TRANSCRIBE,
    "transcription": TRANSCRIBE,
    "s2t_translation": "translate",
    "ast": "translate",
    "st": "translate",
    "translation": "translate",
    "lid": "identify",
    "qa": "answer",
    "speechqa": "answer",
}
# Fields that other columns give, and which.
_MADE_OF = {
    "language": ("lang",),
    "source_lang": ("source_lang", "lang"),
    "source_language": ("source_lang", "lang"),
    "target_language": ("target_lang",),
    "target_text": ("target_text", "answer"),
}
_LANGUAGES = {f"{of}{kind}" for of in ("", "source_", "target_") for kind in ("lang", "language")}
_EMPTY = {"context": ""}  # may always be missing


class Task(NamedTuple):
    """prompts: templates with {speech}. answer: a template. weight: share of the draws, relative
    to the other tasks'."""

    prompts: tuple[str, ...]
    answer: str
    weight: float = 1.0


class Prompter(NamedTuple):
    """What makes prompts and answers of utterances.

    distractors: words of other utterances that a draw adds to `context`. words: to draw from.
    """

    tokenizer: Tokenizer
    tasks: Mapping[str, Task]
    distractors: int = 0
    words: Sequence[str] = ()


def tasks_of(config) -> dict[str, Task]:
    """The tasks of a configuration, to transcribe first, if it is one of them: what is asked of
    utterances that do not say. One that names none transcribes after `prompt`."""
    if not config.tasks:
        return {TRANSCRIBE: Task((config.prompt,), ANSWERS[TRANSCRIBE])}
    default = lambda name: ANSWERS.get(name, ANSWERS["answer"])
    return {
        name: Task(
            tuple(task.get("prompts", (config.prompt,))),
            task.get("answer", default(name)),
            float(task.get("weight", 1.0)),
        )
        for name, task in sorted(config.tasks.items(), key=lambda item: item[0] != TRANSCRIBE)
    }


def make(config, tokenizer: Tokenizer, utterances: Sequence[Utterance] = ()) -> Prompter:
    """The prompter of a run, for these utterances; distractors are words in their `context`.

    Raises ValueError when the answers of its prompts would end in different ways, the tokenizer
    cannot write a prompt, or a field that one names holds a control token.
    """
    tasks = tasks_of(config)
    templates = [t for task in tasks.values() for t in task.prompts]
    if len({t.startswith(text_lib.CHAT) for t in templates}) > 1:
        raise ValueError(
            f"prompts: all begin with {text_lib.CHAT}, or none: their answers end differently"
        )
    for template in templates:
        text_lib.build_prompt(tokenizer, _FIELD.sub("", _OPTIONAL.sub(r"\1", template)))
    names, distractors = fields_of(*templates), config.data.distractors

    def look():
        _check_control(tokenizer, names, utterances)
        return {
            "words": sorted({w for u in utterances for w in context_of(u)} if distractors else ())
        }

    words = []
    if names or distractors:
        made_of = [tokenizer.control, names, bool(distractors)]
        words = index.remember(utterances, "words", made_of, look)["words"]
    return Prompter(tokenizer, tasks, distractors, words)


def _check_control(tokenizer: Tokenizer, names: Sequence[str], utterances) -> None:
    """Raises one ValueError that lists the rows where a field of a prompt holds a control token."""
    if not names or not tokenizer.control:
        return
    control = re.compile("|".join(map(re.escape, tokenizer.control)))
    lines = []
    for utterance in utterances:
        values = values_of(utterance)
        held = ((name, control.search(values.get(name, ""))) for name in names)
        lines += [f"{utterance.where}: {name} holds {found[0]}" for name, found in held if found]
    if lines:
        raise ValueError("\n".join(["a control token is no text of a prompt:", *lines]))


def is_fixed(tasks: Mapping[str, Task]) -> bool:
    """Whether all utterances have the same prompt."""
    templates = {template for task in tasks.values() for template in task.prompts}
    return len(templates) == 1 and not fields_of(*templates)


def shared(tokenizer: Tokenizer, config) -> text_lib.Prompt:
    """The prompt of all utterances; where each has its own, one like them."""
    return text_lib.build_prompt(tokenizer, example(config), has_values=True)


def example(config) -> str:
    """The first template, with the names of its fields for their values."""
    template = next(iter(tasks_of(config).values())).prompts[0]
    return fill(template, {name: name for name in fields_of(template)})


def described(config) -> str:
    """What a checkpoint says of how it was asked."""
    return json.dumps(config.tasks.to_dict(), sort_keys=True) if config.tasks else config.prompt


# Fields ----------------------------------------------------------------------------------------


def fields_of(*templates: str) -> tuple[str, ...]:
    """The names of the fields of templates, {speech} left out, each once."""
    return tuple(dict.fromkeys(name for t in templates for name, _ in _FIELD.findall(t)))


def columns(config) -> frozenset[str]:
    """The columns of manifests that the tasks read, beside those that are always read."""
    tasks = tasks_of(config).values()
    names = fields_of(*(template for task in tasks for template in (*task.prompts, task.answer)))
    read = {column for name in names for column in _MADE_OF.get(name, (name,))}
    return frozenset(read | ({"task", "taskname"} if config.tasks else set()))


def missing(template: str, values: Mapping[str, str]) -> list[str]:
    """The fields that a template cannot do without and that are not among `values`."""
    needed = _FIELD.findall(_OPTIONAL.sub("", template))
    return [name for name, default in needed if not default and name not in values | _EMPTY]


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with its fields filled in, {speech} as it stands; what is missing is empty."""
    has_all = lambda part: all(values.get(name) for name in fields_of(part))
    kept = _OPTIONAL.sub(lambda part: part[1] if has_all(part[1]) else "", template)
    return _FIELD.sub(lambda found: values.get(found[1]) or (found[2] or "|")[1:], kept)


def values_of(utterance: Utterance) -> dict[str, str]:
    """What an utterance's row gives for fields: its columns as text, names for codes of languages.
    `text` may be empty: silence."""
    found = {name: shown for name, x in utterance.fields if (shown := _shown(x))}
    found["id"] = utterance.id
    found |= {"lang": utterance.lang} if utterance.lang else {}
    found |= {"speaker": utterance.speaker} if utterance.speaker else {}
    if utterance.text or ("text", "") in utterance.fields:
        found["text"] = utterance.text
    for name, sources in _MADE_OF.items():
        given = next((found[source] for source in sources if source in found), "")
        if given:
            found[name] = given
    for name in sorted(found.keys() & _LANGUAGES):
        find = languages.name if name.endswith("language") else lambda x: languages.find(x).code
        found[name] = find(found[name])
    return found


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def context_of(utterance: Utterance) -> tuple[str, ...]:
    """The words that the utterance's row lists under `context`; none where it is free text."""
    found = dict(utterance.fields).get("context", ())
    return found if isinstance(found, tuple) else ()


# Tasks -----------------------------------------------------------------------------------------


def task_name(name: str) -> str:
    """The name that a task has here."""
    return _NAMES.get(name.lower(), name)


def expand(
    utterances: Sequence[Utterance], config, require_text: bool = True
) -> tuple[list[Utterance], list[Problem]]:
    """Each utterance once for every task it is for: the one that its row names, or else all whose
    fields it has; a second task's id has its name added.

    require_text: whether an empty transcript is none, where a run only transcribes. Where it has
    several tasks, a row says that nothing is said by `"text": ""`.
    """
    items, problems, tasks = [], [], tasks_of(config)
    if not config.tasks and is_fixed(tasks):
        return list(utterances), []
    for utterance in utterances:
        values, named = values_of(utterance), task_name(utterance.task)
        if not require_text and len(tasks) == 1:
            values.setdefault("text", "")
        if held := [name for name, value in values.items() if SPEECH in value and name != "text"]:
            message = f"{held[0]} holds {SPEECH}, which is no text"
            problems.append(Problem("bad_value", utterance.where, message))
            continue
        if named and named not in tasks:
            message = f"task {utterance.task!r}: the run has {', '.join(tasks)}"
            problems.append(Problem("unknown_task", utterance.where, message))
            continue
        lacking = {
            name: missing("".join((*tasks[name].prompts, tasks[name].answer)), values)
            for name in ([named] if named else tasks)
        }
        found = [name for name, lacks in lacking.items() if not lacks]
        if not found:
            each = (f"{name} needs {', '.join(lacks)}" for name, lacks in lacking.items())
            message = f"it serves no task: {'; '.join(each)}"
            problems.append(Problem("missing_field", utterance.where, message))
        for i, name in enumerate(found):
            identity = f"{utterance.id}#{name}" if i else utterance.id
            items.append(utterance._replace(id=identity, task=name))
    return items, problems


def answer(prompter: Prompter | None, utterance: Utterance) -> str:
    """What the model is to say; the transcript without a prompter."""
    return utterance.text if prompter is None else _answer(prompter.tasks, utterance)


def _answer(tasks: Mapping[str, Task], utterance: Utterance) -> str:
    template = _task(tasks, utterance).answer
    if template == ANSWERS[TRANSCRIBE]:
        return utterance.text
    return fill(template, values_of(utterance)).strip()


def _task(tasks: Mapping[str, Task], utterance: Utterance) -> Task:
    return tasks[utterance.task or next(iter(tasks))]


def language_of(utterance: Utterance) -> str:
    """The language of an utterance's answer, as its row gives it."""
    target = dict(utterance.fields).get("target_lang", "")
    return target if utterance.task == "translate" and target else utterance.lang


def texts(config, utterances: Sequence[Utterance]) -> list[str]:
    """What a tokenizer that is trained for a run must write: the answers, and where utterances have
    prompts of their own what stands around the speech, each once."""
    tasks = tasks_of(config)
    found = [_answer(tasks, u) for u in utterances]
    if is_fixed(tasks):
        return found
    filled = {
        fill(template, values_of(u)): None
        for u in utterances
        for template in _task(tasks, u).prompts
    }
    parts = (part for text in filled for part in text.removeprefix(text_lib.CHAT).split(SPEECH))
    return found + [part for part in dict.fromkeys(parts) if part.strip()]


def ask(config, task: str = "", template: str = "", **columns):
    """What a trained model is asked about audio that has no manifest row.

    Args:
      task: of the run's; "": its first.
      template: with {speech}: a prompt in the place of the task's.
      columns: what the row would hold, "" or () for nothing: lang, target_lang, context, prompt.

    Returns:
      The configuration with this one task and one prompt, and the changes to make to each utterance
      (`_replace`).

    Raises:
      ValueError: the run has no such task, was never trained with a field that is given or that the
        template names, or the prompt lacks one.
    """
    tasks = tasks_of(config)
    task = task_name(task) or next(iter(tasks))
    if task not in tasks:
        raise ValueError(f"task {task!r}: the run was trained on {', '.join(tasks)}")
    trained = fields_of(*tasks[task].prompts)
    shown = ", ".join(map(repr, tasks[task].prompts))
    given = {column: value for column, value in columns.items() if value}
    reads = lambda name: _MADE_OF.get(name, (name,))
    problems = [
        f"{column}={value!r}: the run was never trained with it; its prompts to {task}: {shown}"
        for column, value in given.items()
        if not any(column in reads(name) for name in trained)
    ]
    problems += [
        f"prompt {template!r}: the run was never trained with {{{name}}}; its prompts: {shown}"
        for name in fields_of(template)
        if name not in trained
    ]
    if problems:
        raise ValueError("\n".join(problems))
    asked = Utterance("", "", "", 0.0, lang=given.pop("lang", ""), task=task)
    asked = asked._replace(fields=tuple(given.items()))
    values = values_of(asked)
    candidates = (template,) if template else tasks[task].prompts
    lacking = {prompt: missing(prompt, values) for prompt in candidates}
    fit = [prompt for prompt in candidates if not lacking[prompt]]
    if not fit:
        needs = ", ".join(dict.fromkeys(name for names in lacking.values() for name in names))
        raise ValueError(f"to {task}, the run's prompts need {needs}: {shown}")
    used = lambda prompt: sum(name in values for name in fields_of(prompt))
    asked_config = config.copy_and_resolve_references()
    with asked_config.unlocked():
        answer = tasks[task].answer
        asked_config.tasks = {task: {"prompts": (max(fit, key=used),), "answer": answer}}
    return asked_config, {"lang": asked.lang, "task": task, "fields": asked.fields}


# Token ids -------------------------------------------------------------------------------------


def prompt(
    prompter: Prompter, utterance: Utterance, rng: np.random.Generator | None = None, sizes=None
) -> text_lib.Prompt:
    """The prompt of an utterance, as token ids.

    Args:
      rng: draws one of the task's templates, and distractors; None: the first one, without.
      sizes: (prefix, suffix), the most tokens; distractors are dropped until it fits.
    """
    templates, words = _task(prompter.tasks, utterance).prompts, context_of(utterance)
    if rng is None:
        return _made(prompter, utterance, templates[0], words)
    template = templates[rng.integers(len(templates))]
    both = _with_distractors(prompter, words, rng)
    made = _made(prompter, utterance, template, both)
    added = [word for word in both if word not in words]
    while added and sizes and (len(made.prefix) > sizes[0] or len(made.suffix) > sizes[1]):
        both.remove(added.pop())
        made = _made(prompter, utterance, template, both)
    return made


def _made(prompter, utterance, template: str, words: Sequence[str]) -> text_lib.Prompt:
    values = values_of(utterance) | ({"context": ", ".join(words)} if words else {})
    return _prompt(prompter.tokenizer, fill(template, values))


@functools.lru_cache(maxsize=2**16)
def _prompt(tokenizer: Tokenizer, filled: str) -> text_lib.Prompt:
    return text_lib.build_prompt(tokenizer, filled, has_values=True)


def _with_distractors(prompter: Prompter, words: Sequence[str], rng) -> list[str]:
    """The words and some of other utterances, in random order; no word stays no word."""
    if not (words and prompter.distractors):
        return list(words)
    drawn = rng.integers(len(prompter.words), size=prompter.distractors)
    others = dict.fromkeys(prompter.words[i] for i in drawn)
    both = [*words, *(word for word in others if word not in words)]
    return [both[i] for i in rng.permutation(len(both))]


def longest(prompter: Prompter, utterance: Utterance) -> tuple[int, int]:
    """The most tokens of an utterance's prefix and suffix over the templates of its task, with some
    distractors in the place of those to be drawn."""
    words = context_of(utterance)
    each = [words, _with_distractors(prompter, words, np.random.default_rng(0))]
    made = [
        _made(prompter, utterance, template, some)
        for template in _task(prompter.tasks, utterance).prompts
        for some in (each if words and prompter.distractors else each[:1])
    ]
    return max(len(p.prefix) for p in made), max(len(p.suffix) for p in made)
