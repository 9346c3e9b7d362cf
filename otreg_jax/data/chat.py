"""Chat templates: the Jinja that an instruction-tuned model comes with, rendered without trust.

What is rendered is what `transformers`' apply_chat_template renders, but for the date: some
templates name today's, and a prompt must be the same in training, tomorrow and in evaluation.
"""

import datetime
import functools
import json
from collections.abc import Mapping

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

FILE = "chat_template.jinja"
TODAY = datetime.date(2024, 7, 26)  # what Llama 3's templates say where no date is given
_ANSWER = "0answer0"


def template(config: Mapping, file: bytes, where) -> str | None:
    """The template of a model: its `chat_template.jinja` if there is one, else the key of its
    tokenizer_config.json, of several templates the default one. None if there is none."""
    found = file.decode("utf-8", "replace") if file else config.get("chat_template")
    if isinstance(found, list):  # [{"name": ..., "template": ...}, ...]
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{where}: chat_template is neither a string nor a list of named ones")
    return found


def turn(template: str, special_tokens: Mapping[str, str], content: str) -> tuple[str, str]:
    """A conversation of one user's turn: its text up to where the answer begins, and what follows
    an answer. Where a model can think first, it is told not to.

    Raises ValueError when the template is no Jinja, refuses the conversation, or drops the answer.
    """
    asked = [{"role": "user", "content": content}]
    answered = [*asked, {"role": "assistant", "content": _ANSWER}]
    text = _render(template, asked, special_tokens, add_generation_prompt=True)
    whole = _render(template, answered, special_tokens, add_generation_prompt=False)
    _, found, end = whole.rpartition(_ANSWER)
    if not found:
        raise ValueError("chat template: it does not show the assistant's answer")
    return text, end


def _render(template, messages, special_tokens, **options) -> str:
    try:
        return _compile(template).render(
            messages=messages,
            tools=None,
            documents=None,
            enable_thinking=False,
            **special_tokens,
            **options,
        )
    except Exception as error:  # whatever a template of another's making does
        raise ValueError(f"chat template: {type(error).__name__}: {error}") from error


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, a mark for trainers: what it holds."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.cache
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment.from_string(template)
