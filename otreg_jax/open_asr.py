"""The rules of the Open ASR Leaderboard, for figures that stand beside its own.

What they are: huggingface/open_asr_leaderboard, `normalizer/`, as of August 2026 (d1e99b2). English
is Whisper's English normaliser with fewer contractions, more hesitations, and tables of compounds,
first names and acronyms. The other languages lose case, punctuation and digits, which are spelled
out. Words are aligned such that "white paper" and "whitepaper" are the same. Hindi, which the
leaderboard scores against lattices of spellings, is not here.
"""

import difflib
import functools
import itertools
import re

import num2words
from whisper_normalizer.basic import remove_symbols, remove_symbols_and_diacritics
from whisper_normalizer.english import EnglishTextNormalizer

LANGUAGES = ("en", "de", "es", "fr", "it", "nl", "pt")

_HESITATIONS = re.compile(
    r"\b(hmm|mm|mhm|mmm|uh|um|ah|aha|ahh|ahm|eh|ehehe|em|hm|huh|hum|mhum|uhm|umm|uhuh)\b"
)
# Contractions that Whisper's normaliser resolves and the leaderboard leaves.
_KEPT = (r"\bkinda\b", r"\bsorta\b", r"\bdunno\b", r"\bcause\b")
_IS = r"\b(it|he|she|what|that|who|here|there|how|when|where|why|this)'s\b"

# A text and what stands for it; "-" for an entry of Whisper's table that the leaderboard lacks.
_COMPOUNDS = """
    et cetera: etc / al right: alright / all right: alright / how ever: however / wi fi: wifi
    hi fi: hifi / lo fi: lofi / sci fi: scifi / e mail: email / e book: ebook
    e commerce: ecommerce / x ray: xray / t shirt: tshirt / a m: am / p m: pm / o k: okay
"""
_SPELLINGS = """
    ok: okay / kay: okay / etcetera: etc / mm: hmm / archaeology: archeology
    archaeological: archeological / archeological: - / cancellation: cancelation
    cancellations: cancelations / cancelation: - / cancelations: - / flyer: flier
    pummelled: pummeled / pummelling: pummeling / snowploughs: snowplows
    travelogue: travelog / travelogues: travelogs / travelog: - / travelogs: -
"""
# Spellings of a name that count as the same: the first stands for all of its line.
_NAMES = """
    aaron aron / alfonso alphonso / alison allison alyson / allen alan allan / anne ann
    anthony antony / arthur artur / brett bret / brian bryan / bridget bridgette
    caitlin katelyn kaitlyn kaitlin / carl karl / carol carrol carole carroll
    catherine katherine kathryn catharine / cathy kathy / charlie charly charley / chris kris
    christina kristina / christopher kristopher cristopher / colin collin / deborah devorah
    dennis denis / dominic dominick / douglas douglass / dylan dillon / eric erik erick
    fatima fatimah / frederick frederik fredrick / gail gayle / gary garry / greg gregg
    henry henri / ivonne yvonne / jackie jacky / jamie jaime / jason jayson / jeff geoff
    jeffrey geoffrey jeffery / joanne joann joane / john jon / jonathan johnathan jonathon
    joseph josef / karen caren caryn karin / kelly kellye kelli kelley / kevin kevan
    kristin kristen / laurie lori / lawrence laurence / lee leigh / leslie lesley
    lily lilly / linda lynda / lindsay linsey lindsey / louis lewis / lucas lukas / lynn lynne
    mark marc / martin martyn / matthew mathew / mcarthur macarthur
    mccarthy macarthy maccarthy / mccartney macartney / mcdonald macdonald / mcgowan macgowan
    mcintosh macintosh / mcintyre macintyre / mckay mackay / mckenzie mackenzie
    mclean maclean / mcleod macleod / mcmillan macmillan / mcnamara macnamara / megan meghan
    michael micheal / michelle michele / miriam myriam
    mohammed mohamad mohamed mohammad muhammad muhamad muhammed mouhamed mouhamad mahomet
    molly mollie / natalie nathalie / neil neal / nicholas nicolas / nicole nikole
    patrick patrik / peter pieter / philip phillip / rachel rachael / rajiv rajeev
    rebecca rebekah / rob robb / robin robyn / roger rodger / ronda rhonda / russell russel
    sally sallie / sarah sara / sean shaun shawn / shane shayne / sherry sheri cheri sherrie
    simon symon / stacy stacey stacie / steven stephen / stuart stewart / susanne suzanne
    teresa theresa / terry terri / thomas tomas / toby tobey / tony toni / tracy tracey tracie
    veronica veronika / victor viktor / victoria viktoria / walter walther
    yousef yusuf yusef / zach zak / zachary zackary zachery
"""


def normalize(text: str, code: str) -> str:
    """Text as the leaderboard scores it. code: one of `LANGUAGES`."""
    text = re.sub(r"[<\[][^>\]]*[>\]]", "", text.lower())
    text = re.sub(r"\(([^)]+?)\)", "", text)
    return _english(text) if code == "en" else _other(text, code)


def _other(text: str, code: str) -> str:
    # Whisper's cleaning leaves letters, digits and what is neither: the last go as well.
    text = re.sub(r"[^\w\s]", "", remove_symbols(text).lower())
    text = re.sub(r"(\d)\s+(\d{3})\b", r"\1\2", " ".join(text.split()))

    def spell(digits: re.Match) -> str:
        try:
            return num2words.num2words(int(digits[0]), lang=code)
        except (NotImplementedError, OverflowError, ValueError):
            return digits[0]

    return re.sub(r"\d+", spell, text)


def _english(text: str) -> str:
    whisper, contractions, compounds, spellings, names = _english_tables()
    text = re.sub(r"\s+'", "'", _HESITATIONS.sub("", text))
    for pattern, replacement in contractions.items():
        text = re.sub(pattern, replacement, text)
    text = re.sub(r"(\d),(\d)", r"\1\2", text)
    text = re.sub(r"\.([^0-9]|$)", r" \1", text)
    text = remove_symbols_and_diacritics(text, keep=".%$¢€£")
    for parts, whole in compounds.items():
        text = re.sub(r"\b" + parts.replace(" ", r"\s+") + r"\b", whole, text)
    try:
        text = whisper.standardize_numbers(text)
    except (AssertionError, ValueError):
        pass  # a number of thousands of digits, which Python refuses
    words = [spellings.get(word, word) for word in text.split()]
    text = _join_acronyms([names.get(word, word) for word in words])
    text = re.sub(r"[.$¢€£]([^0-9])", r" \1", text)
    text = re.sub(r"([^0-9])%", r"\1 ", text)
    return " ".join(text.split())


@functools.cache
def _english_tables():
    whisper = EnglishTextNormalizer()
    contractions = {
        _IS if pattern == r"'s\b" else pattern: r"\1 is" if pattern == r"'s\b" else replacement
        for pattern, replacement in whisper.replacers.items()
        if pattern not in _KEPT
    }
    pairs = lambda table: (entry.split(": ") for entry in _entries(table))
    spellings = whisper.standardize_spellings.mapping | dict(pairs(_SPELLINGS))
    spellings = {british: american for british, american in spellings.items() if american != "-"}
    names = {}
    for entry in _entries(_NAMES):
        first, *others = entry.split()
        names |= dict.fromkeys(others, first)
    return whisper, contractions, dict(pairs(_COMPOUNDS)), spellings, names


def _entries(table: str) -> list[str]:
    return re.split(r"\s*[/\n]\s*", table.strip())


def _join_acronyms(words: list[str]) -> str:
    """Single characters, two or more, are one word; three or more with an "a" or "i" among them."""
    parts = []
    for single, run in itertools.groupby(words, lambda word: len(word) == 1 and word.isalnum()):
        run = list(run)
        together = single and len(run) >= (3 if {"a", "i"} & set(run) else 2)
        parts += ["".join(run)] if together else run
    return " ".join(parts)


def join_compounds(reference: str, hypothesis: str) -> tuple[str, str]:
    """Joins words on both sides where the two differ in spaces alone (not done for English)."""
    sides = reference.split(), hypothesis.split()
    joined = [], []
    matcher = difflib.SequenceMatcher(None, *sides)
    for operation, a, b, c, d in matcher.get_opcodes():
        parts = sides[0][a:b], sides[1][c:d]
        same = operation != "equal" and "".join(parts[0]) == "".join(parts[1])
        for side, part in zip(joined, parts, strict=True):
            side += ["".join(part)] if same else part
    return " ".join(joined[0]), " ".join(joined[1])
