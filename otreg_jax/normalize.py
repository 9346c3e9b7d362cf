"""Text as it is scored: what counts as the same word, by a style that results name.

Every style takes a transcript and its language. `whisper` is the default. A change of what a style
gives raises its version: figures of two versions are not to be compared.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import NamedTuple

import num2words
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from otreg_jax import languages, open_asr
from otreg_jax.languages import Language

# All that keyboards and editors put where an apostrophe is meant.
_APOSTROPHES = dict.fromkeys(map(ord, "’‘‛ʼʻʹ′＇`´՚ꞌ"), "'")
# Letters that older texts write with a zero-width joiner, and no normal form makes equal:
# Malayalam's chillus and Bengali's khanda ta.
_JOINED = {
    f"{letter}{virama}\u200d": joined
    for letters, virama, whole in (("ണനരലളക", "\u0d4d", "ൺൻർൽൾൿ"), ("ত", "\u09cd", "ৎ"))
    for letter, joined in zip(letters, whole, strict=True)
}
_TATWEEL = "\u0640"  # stretches an Arabic word, and says nothing
# Vowel points that Arabic and Hebrew may write or leave out.
_POINTS = re.compile("[\u064b-\u0652\u0670\u0591-\u05bd\u05bf\u05c1\u05c2\u05c7]")
# Languages that write 1.250,5 where others write 1,250.5 (CLDR).
_DECIMAL_COMMA = frozenset(
    "af az be bg bs ca cs da de el es et eu fi fo fr gl hr hu hy id is it ka kk ky lt lv mk nb nl "
    "nn no pl pt ro ru sk sl sq sr sv tr uk uz vi".split()
)


class Style(NamedTuple):
    """A way to normalise.

    apply: (text, language) -> text, words apart by single spaces.
    meaning: one line.
    version: of the rules here; those of the packages beneath are pinned.
    codes: of the languages that it has rules for; None for all.
    """

    apply: Callable[[str, Language], str]
    meaning: str
    version: int
    codes: tuple[str, ...] | None = None


def normalize(text: str, lang: str | None = None, style: str = "whisper") -> str:
    """Text in the form that errors are counted on.

    Args:
      text: a transcript; any string.
      lang: any name of its language (see `languages.find`); None if it is unknown.
      style: one of `STYLES`.

    Returns:
      Words apart by single spaces, in normal form C. In a language written without spaces a word is
      one grapheme cluster, except in the style "open_asr".
    """
    normal = STYLES[style].apply(text, languages.find(lang))
    return " ".join(unicodedata.normalize("NFC", normal).split())


def check(style: str, langs: Iterable[str | None]) -> None:
    """Raises ValueError if there is no such style, or it has no rules for one of the languages."""
    if style not in STYLES:
        raise ValueError(f"--normalizer={style} is not one of {', '.join(STYLES)}")
    codes = STYLES[style].codes
    others = {languages.find(lang).code or "none given" for lang in langs} - set(codes or ())
    if codes and others:
        raise ValueError(
            f"--normalizer={style} has rules for {', '.join(codes)} alone, and the sets are in "
            f"{', '.join(sorted(others))}: choose another style, or mend `lang` in their manifests"
        )


def _clean(text: str, language: Language) -> str:
    """The same letters in the same form, whoever typed them; lower case."""
    text = text.translate(_APOSTROPHES)
    for sequence, letter in _JOINED.items():
        text = text.replace(sequence, letter)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf" and c != _TATWEEL)
    return languages.lower(unicodedata.normalize("NFKC", text), language)


def _basic(text: str, language: Language) -> str:
    return _without_symbols(language.unspaced)(_clean(text, language))


def _whisper(text: str, language: Language) -> str:
    if language.code != "en":
        return _basic(text, language)
    try:
        return _english()(_clean(text, language))
    except (AssertionError, ValueError):  # a number of thousands of digits, which Python refuses
        return _basic(text, language)


def _spoken(text: str, language: Language) -> str:
    text = _POINTS.sub("", _clean(text, language)).replace("ß", "ss")
    return _basic(_spell_numbers(text, language.code), language)


def _spell_numbers(text: str, code: str) -> str:
    """Digits as cardinal numbers in words, where num2words knows the language."""
    group, decimal = (r"[. ']", ",") if code in _DECIMAL_COMMA else ("[,']", r"\.")
    number = re.compile(
        rf"(?<!\d)(?:\d{{1,3}}(?:{group}\d{{3}})+(?!\d)|\d+)(?:{decimal}\d+)?(?!\d)"
    )

    def spell(found: re.Match) -> str:
        digits = re.sub(group, "", found[0]).replace(",", ".")
        if len(digits.partition(".")[0]) > 9:  # not said as one number
            return digits
        try:
            value = float(digits) if "." in digits else int(digits)
            return f" {num2words.num2words(value, lang=code)} "
        except (NotImplementedError, OverflowError):  # not in this language
            return digits

    # num2words does not come back from large numbers in Amharic.
    return number.sub(spell, text) if code not in ("", "am") else text


@functools.cache
def _without_symbols(unspaced: bool) -> BasicTextNormalizer:
    # Without preserve_marks it cuts Hindi and Thai words at every vowel sign.
    return BasicTextNormalizer(preserve_marks=True, split_letters=unspaced)


@functools.cache
def _english() -> EnglishTextNormalizer:
    return EnglishTextNormalizer()


STYLES = {
    "whisper": Style(
        _whisper, "Whisper's English normaliser for English, `basic` for all others", 2
    ),
    "basic": Style(
        _basic, "lower case, no punctuation, no remarks in brackets; nothing is rewritten", 1
    ),
    "spoken": Style(
        _spoken,
        "`basic`, and what sounds alike is the same: digits are spelled out as cardinal numbers, ß "
        "is ss, Arabic and Hebrew vowel points go",
        1,
    ),
    "open_asr": Style(
        lambda text, language: open_asr.normalize(text, language.code),
        "the rules of the Open ASR Leaderboard, English and multilingual",
        1,
        open_asr.LANGUAGES,
    ),
}
