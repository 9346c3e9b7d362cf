"""What a setting may be: kinds of values, each with its words for a person."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from otreg_jax.data import sets, text


class Allowed(NamedTuple):
    """The values that a setting takes.

    words: what they are, to complete "must be ...".
    accepts: whether a value is one of them.
    outside: values that are not, the nearest ones first: what tests try.
    """

    words: str
    accepts: Callable[[Any], bool]
    outside: tuple


def integer(low: int, high: int = 2**31 - 1, *, multiple_of: int = 1, also: tuple = ()) -> Allowed:
    """Integers from `low` to `high`; and those of `also`."""

    def accepts(value):
        if isinstance(value, bool) or not isinstance(value, int):
            return False
        return value in also or (low <= value <= high and value % multiple_of == 0)

    words = f"an integer, at least {low}" if high == 2**31 - 1 else f"an integer, {low} to {high}"
    words += f" and a multiple of {multiple_of}" if multiple_of > 1 else ""
    words += "".join(f", or {value}" for value in also)
    edges = (low - 1, high + 1, low + 1 if multiple_of > 1 else low - 2)
    outside = tuple(value for value in edges if value not in also)
    return Allowed(words, accepts, (*outside, low + 0.5, math.nan, True, "1", None, (low,)))


def number(
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    also: tuple = (),
) -> Allowed:
    """Finite numbers from `low` to `high`, `above` and `below` excluded; and those of `also`."""

    def accepts(value):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        inside = low <= value <= high and above < value < below
        return value in also or (inside and math.isfinite(value))

    limits = {"at least": low, "above": above, "at most": high, "below": below}
    named = [f"{name} {limit:g}" for name, limit in limits.items() if math.isfinite(limit)]
    words = f"a number {' and '.join(named)}".strip()
    words += "".join(f", or {value:g}" for value in also)
    edges = (math.nextafter(low, -math.inf), math.nextafter(high, math.inf), above, below)
    outside = tuple(value for value in edges if math.isfinite(value))
    return Allowed(words, accepts, (*outside, math.nan, math.inf, -math.inf, True, "1", None, ()))


def one_of(*choices: str) -> Allowed:
    """One of some words."""
    words = "one of " + ", ".join(choice or '""' for choice in choices)
    return Allowed(words, lambda value: value in choices, ("foo", choices[-1] + " ", 1, None))


def some_of(*choices: str) -> Allowed:
    """Words separated by commas, each at most once, or none."""

    def accepts(value):
        names = [name.strip() for name in value.split(",")] if _is_text(value) and value else []
        known = isinstance(value, str) and set(names) <= set(choices)
        return known and len(set(names)) == len(names)

    words = f"some of {', '.join(choices)}, separated by commas"
    return Allowed(
        words, accepts, ("foo", f"{choices[0]},foo", f"{choices[0]},{choices[0]}", 1, None)
    )


def series(each: Allowed, at_least: int = 0, at_most: int | None = None) -> Allowed:
    """Tuples of values that `each` accepts."""

    def accepts(value):
        if not isinstance(value, tuple | list) or len(value) < at_least:
            return False
        return len(value) <= (at_most or math.inf) and all(map(each.accepts, value))

    count = {None: f"{at_least} or more", at_least: at_least}.get(at_most, f"up to {at_most}")
    outside = tuple((value,) * max(at_least, 1) for value in each.outside)
    outside += ((),) if at_least else ()
    return Allowed(f"a tuple of {count}, each {each.words}", accepts, (*outside, 1, "x", None))


def rising(each: Allowed) -> Allowed:
    """Two values that `each` accepts, the second not below the first."""
    two = series(each, 2, 2)
    accepts = lambda value: two.accepts(value) and value[0] <= value[1]
    return two._replace(words=f"two values, the lower first, each {each.words}", accepts=accepts)


def mapping(each: Allowed) -> Allowed:
    """Dictionaries, ConfigDicts too, of values that `each` accepts."""
    is_mapping = lambda value: hasattr(value, "items")
    accepts = lambda value: is_mapping(value) and all(each.accepts(x) for _, x in value.items())
    outside = tuple({"a": value} for value in each.outside)
    return Allowed(f"{{name: {each.words}}}", accepts, (*outside, 1, "x", None))


def record(**fields: Allowed) -> Allowed:
    """Dictionaries, ConfigDicts too, that hold some of these fields and nothing else."""

    def accepts(value):
        if not hasattr(value, "items"):
            return False
        return all(key in fields and fields[key].accepts(x) for key, x in value.items())

    outside = tuple({key: x} for key, field in fields.items() for x in field.outside)
    return Allowed(f"{{{', '.join(fields)}}}", accepts, (*outside, {"foo": 1}, 1, "x", None))


def _is_text(value) -> bool:
    """Whether it is a text, and can be written to a file: no half of a surrogate pair."""
    return isinstance(value, str) and value == value.encode("utf-8", "ignore").decode()


def _is_regex(value) -> bool:
    try:
        return _is_text(value) and bool(re.compile(value))
    except re.error:
        return False


def _are_pairs(value, first: Callable, second: Callable) -> bool:
    is_series = lambda x: isinstance(x, tuple | list)
    if not is_series(value) or not all(is_series(pair) and len(pair) == 2 for pair in value):
        return False
    return all(first(pair[0]) and second(pair[1]) for pair in value)


def _is_named_sets(value) -> bool:
    try:
        return _is_text(value) and isinstance(sets.named_manifests(value), dict)
    except ValueError:
        return False


FLAG = Allowed("True or False", lambda value: isinstance(value, bool), (1, "True", None))
TEXT = Allowed("a text", _is_text, (1, None, ("a",), "\ud800"))
REGEX = Allowed("a regular expression", _is_regex, ("(", "[", 1, None))
PROMPT = Allowed(
    f"a text that holds {text.SPEECH} exactly once",
    lambda value: _is_text(value) and value.count(text.SPEECH) == 1,
    ("", "speech", 2 * text.SPEECH, 1, None),
)
ANSWER = Allowed(
    f"a text without {text.SPEECH}",
    lambda value: _is_text(value) and bool(value) and text.SPEECH not in value,
    ("", text.SPEECH, 1, None),
)
MULTIPLIERS = Allowed(
    "((regular expression, factor of at least 0), ...)",
    lambda value: _are_pairs(value, lambda x: x and _is_regex(x), number(0).accepts),
    ((("a", -1.0),), (("a", math.nan),), (("(", 1.0),), (("", 1.0),), (("a",),), ("a", 1.0), None),
)
VOICES = Allowed(
    "((eSpeak voice, pitch from 0 to 99), ...)",
    lambda value: _are_pairs(value, TEXT.accepts, integer(0, 99).accepts),
    ((("en", 100),), (("en",),), ("en", 50), "en", None),
)
# Texts that name files, which `preflight` looks for; "" names none.
MANIFEST = TEXT._replace(words="a manifest, FOLDER or FOLDER:SPLIT")
MANIFESTS = TEXT._replace(words="manifests, FOLDERs or FOLDER:SPLITs, separated by commas")
NAMED_MANIFESTS = Allowed(
    "name=manifest, separated by commas, no name twice",
    _is_named_sets,
    ("a", "a=1,b", "a=1,a=2", 1, None),
)
SENTENCES = TEXT._replace(words="a text file, or language=file, separated by commas")
MODEL = TEXT._replace(words="a Hugging Face directory or hub id")
TOKENIZER = TEXT._replace(words="tokenizer.json, *.model or a directory with one of them")
FOLDER = TEXT._replace(words="a directory")
WRITERS = some_of("tensorboard", "wandb", "mlflow")  # `writers.OTHERS`
