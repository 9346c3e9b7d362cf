"""What a language's name tells scoring: one code for all its names, the unit of errors, the case.

Names are those of BCP 47 and ISO 639 (`de`, `deu`, `ger`, `de-AT`, `zh_Hans_CN`), of languages
("German", "Deutsch") and, where it is no language's code, of a country (`jp`). The registry behind
them is langcodes'.
"""

import functools
import re
from typing import NamedTuple

import langcodes

# Scripts that put no spaces between words, by their ISO 15924 codes.
_UNSPACED = frozenset(
    "Bali Bopo Hani Hans Hant Hira Hrkt Java Jpan Kana Khmr Lana Laoo Mymr Tale Talu Tavt "
    "Thai Tibt".split()
)
_DOTLESS = frozenset({"az", "crh", "gag", "tr"})  # I is the capital of ı, and İ that of i
_NO_COUNTRY = re.compile("aa|q[m-z]|x.|zz")  # private use in ISO 3166


class Language(NamedTuple):
    """A language as scoring sees it.

    code: the shortest ISO 639 code; an unknown name as it was given, in lower case; "" for none.
    unspaced: whether it is written without spaces between words. Then a word is one grapheme
      cluster, the practice of the Whisper paper (appendix C).
    """

    code: str
    unspaced: bool


@functools.cache
def find(name: str | None) -> Language:
    """The language of this name; one that nobody knows is taken to put spaces between words."""
    name = (name or "").strip()
    tag = _tag(name)
    if tag is None:
        return Language(name.lower(), False)
    language = langcodes.Language.get(tag)
    # An explicit script (ja-Latn) counts, or else the one that the language is mostly written in.
    return Language(language.language or "und", language.maximize().script in _UNSPACED)


@functools.cache
def name(code: str) -> str:
    """The English name of a language: "German" for de, deu or de-AT; an unknown one as it is."""
    tag = _tag(code.strip())
    return langcodes.Language.get(tag).language_name() if tag else code


def _tag(name: str) -> str | None:
    """The BCP 47 tag of a language; macrolanguages for their main parts (zh for cmn)."""
    for tag in (name.replace("_", "-"), _by_name(name), _by_country(name)):
        if tag and langcodes.tag_is_valid(tag):
            return langcodes.standardize_tag(tag, macro=True)
    head = re.match(r"\w*?(?=[^a-zA-Z])", name)  # "en_US.UTF-8", "English/American"
    return _tag(head[0]) if head and head[0] else None


def _by_name(name: str) -> str | None:
    try:
        return langcodes.find(name).to_tag()
    except (LookupError, UnicodeError):
        return None


def _by_country(name: str) -> str | None:
    tag = f"und-{name}"
    if len(name) != 2 or _NO_COUNTRY.match(name.lower()) or not langcodes.tag_is_valid(tag):
        return None
    return langcodes.Language.get(tag).maximize().language


def lower(text: str, language: Language) -> str:
    """Lower case as the language has it: "I" is "ı" in Turkish, "i" elsewhere.

    i and j have their dot already: another above them, as Lithuanian dictionaries write it under an
    accent and as "İ".lower() leaves it, is not seen and goes.
    """
    if language.code in _DOTLESS:
        text = text.replace("I\u0307", "İ").replace("İ", "i").replace("I", "ı")
    return re.sub("([ij]\u0328?)\u0307", r"\1", text.lower())
