"""A language by any of its names, and what its texts count as: a table checked by hand."""

import pytest

from otreg_jax import languages, metrics
from otreg_jax.normalize import STYLES, check, normalize

NAMES = [
    ("th", True, "th tha th-TH th_TH TH Thai thai ไทย"),
    ("ja", True, "ja jpn ja-JP ja_JP Japanese 日本語 jp"),
    ("zh", True, "zh zho chi cmn zh-CN zh_Hans_CN cmn_hans_cn zho_Hans Chinese Mandarin cn"),
    ("yue", True, "yue yue-HK yue_hant_hk Cantonese"),
    ("my", True, "my mya bur Burmese my-MM"),
    ("km", True, "km khm Khmer km_kh"),
    ("lo", True, "lo lao Lao lo-LA"),
    ("bo", True, "bo bod tib Tibetan"),
    ("dz", True, "dz dzo Dzongkha"),
    ("nan", True, "nan zh-min-nan"),
    ("wuu", True, "wuu"),
    ("ja", False, "ja-Latn"),  # romaji
    ("zh", False, "zh-Latn cmn-Latn"),  # pinyin
    ("en", False, "en eng EN en-US en_GB eng_Latn English english en_US.UTF-8 us"),
    ("de", False, "de deu ger de-AT German Deutsch de_de"),
    ("fr", False, "fr fra fre fr-CA French français"),
    ("es", False, "es spa es-419 Spanish Castilian"),
    ("pt", False, "pt por pt-BR Portuguese"),
    ("nl", False, "nl nld dut Dutch"),
    ("tr", False, "tr tur tr-TR Turkish"),
    ("az", False, "az aze azj az-Latn-AZ Azerbaijani"),
    ("lt", False, "lt lit Lithuanian"),
    ("ar", False, "ar ara arb ar-EG Arabic"),
    ("fa", False, "fa fas per pes Persian Farsi"),
    ("he", False, "he heb iw Hebrew"),
    ("hi", False, "hi hin hi-IN Hindi"),
    ("bn", False, "bn ben bn_in Bengali Bangla"),
    ("ta", False, "ta tam Tamil"),
    ("te", False, "te tel Telugu"),
    ("ml", False, "ml mal Malayalam"),
    ("kn", False, "kn kan Kannada"),
    ("gu", False, "gu guj Gujarati"),
    ("pa", False, "pa pan Punjabi Panjabi"),
    ("mr", False, "mr mar Marathi"),
    ("ko", False, "ko kor ko-KR Korean"),
    ("vi", False, "vi vie vi_vn Vietnamese"),
    ("id", False, "id ind in Indonesian"),
    ("fil", False, "fil tl tgl Filipino"),
    ("sw", False, "sw swa swh Swahili"),
    ("ru", False, "ru rus ru-RU Russian"),
    ("uk", False, "uk ukr Ukrainian"),
    ("pl", False, "pl pol Polish"),
    ("cs", False, "cs ces cze Czech cz"),
    ("el", False, "el ell gre Greek"),
    ("hu", False, "hu hun Hungarian"),
    ("ro", False, "ro ron rum mo Romanian"),
    ("is", False, "is isl ice Icelandic"),
    ("cy", False, "cy cym wel Welsh"),
    ("eu", False, "eu eus baq Basque"),
    ("ka", False, "ka kat geo Georgian"),
    ("nb", False, "nb nob"),
    ("xx", False, "xx XX"),  # nobody's
    ("dialect 7", False, "Dialect 7".replace(" ", "\N{NO-BREAK SPACE}")),
]


@pytest.mark.parametrize("code, unspaced, names", NAMES)
def test_every_usual_name_is_the_same_language(code, unspaced, names):
    for name in names.split(" "):
        expected = (code.replace(" ", "\N{NO-BREAK SPACE}"), unspaced)
        assert languages.find(name) == expected, name
        assert languages.find(f" {name}\t") == expected, name


def test_a_language_without_a_name():
    assert languages.find(None) == languages.find("") == ("", False)
    assert languages.find("\ud800").code == "\ud800"  # no name, but no reason to stop


# language, what was said, what was recognised, wrong units, units of the reference
SAME = [
    ("th", "สวัสดีครับ", "สวัสดีครับ", 0, 7),
    ("tha", "สวัสดีครับ", "สวัสดีคาบ", 1, 7),
    ("jpn", "今日はいい天気", "今日は良い天気", 1, 7),
    ("Chinese", "今天天气好", "今天天汽好", 1, 5),
    ("mya", "နေကောင်းလား", "နေကောင်းလာ", 1, 8),
    ("khm", "សួស្តី", "សូស្តី", 1, 2),
    ("lao", "ສະບາຍດີ", "ສະບາຍດີ", 0, 6),
    ("yue", "你食咗飯未", "你食左飯未", 1, 5),
    ("ja", "ｶﾞｷﾞｸﾞ１２", "ガギグ12", 0, 5),
    ("ja", "（笑）はい。", "(笑)はい", 0, 2),
    ("zh", "ＡＢＣ 公司", "abc公司", 0, 5),
    ("ko", "안녕하세요 여러분", "안녕하세요 여러분!", 0, 2),
    ("tr", "İstanbul", "istanbul", 0, 1),
    ("tr", "Işık ve IŞIK", "ışık ve ışık", 0, 3),
    ("tur", "ısı", "isi", 1, 1),  # another word
    ("az", "İSTİ Isıq", "isti ısıq", 0, 2),
    ("en", "Istanbul İstanbul", "istanbul istanbul", 0, 2),
    ("de", "İstanbul", "Istanbul", 0, 1),
    ("lt", "Ìlgas J\u0307\u0301o", "i\u0307\u0300lgas j\u0301o", 0, 2),
    ("lt", "ėjo", "ejo", 1, 1),  # that dot is a letter's own
    ("en", "I don’t, donʼt, don‘t", "I don't don't don't", 0, 7),
    ("en-GB", "it`s Ann´s", "It's Ann's", 0, 4),
    ("uk", "п’ять п\u02bcять", "п'ять п'ять", 0, 4),
    ("fr", "L’été, aujourd‘hui", "l'été aujourd'hui", 0, 4),
    ("it", "C’è l＇amico", "c'è l'amico", 0, 4),
    ("ar", "مرحـــبا", "مرحبا", 0, 1),
    ("ar", "مُحَمَّد", "م\u064fح\u064eم\u064e\u0651د", 0, 1),  # the order of marks does not count
    ("fa", "می\u200cروم", "میروم", 0, 1),
    ("he", "ג׳ירפה", "ג'ירפה", 0, 2),
    ("hi", "क़लम ज़रा", "क\u093cलम ज\u093cरा", 0, 2),
    ("hi", "किताब", "कताब", 1, 1),  # a vowel sign
    ("mr", "क्\u200dष", "क्ष", 0, 1),
    ("ml", "അവന്\u200d", "അവൻ", 0, 1),
    ("ml", "കൊച്ചി", "ക\u0d46\u0d3eച്ചി", 0, 1),
    ("ml", "കൊച്ചി", "കച്ചി", 1, 1),
    ("ta", "வணக்கம்", "வணக்கம", 1, 1),
    ("te", "నమస్కారం", "నమస్కారం.", 0, 1),
    ("kn", "ನಮಸ್ಕಾರ", "ನಮಸಕಾರ", 1, 1),
    ("bn", "উৎসব", "উত্\u200dসব", 0, 1),
    ("gu", "કેમ છો?", "કેમ છો", 0, 2),
    ("pa", "ਸਤਿ ਸ੍ਰੀ ਅਕਾਲ", "ਸਤਿ ਸ੍ਰੀ ਅਕਾਲ।", 0, 3),
    ("vi", "Tiếng Việt", "tiê\u0301ng viê\u0323t", 0, 2),
    ("el", "ΟΔΟΣ", "οδος", 0, 1),
    ("ru", "Ёлка, ещё", "ёлка еще", 1, 2),  # ё and е are two letters
    ("de", "ÖL für Straße", "öl für Strasse", 1, 3),
    ("nl", "Ĳsselmeer", "IJsselmeer", 0, 1),
    ("pl", "Łódź", "lodz", 1, 1),
    ("hy", "Բարեւ", "բարեւ։", 0, 1),
    ("ka", "გამარჯობა", "ᲒᲐᲛᲐᲠᲯᲝᲑᲐ", 0, 1),
    (None, "Ｆｕｌｌ ｗｉｄｔｈ", "full width", 0, 2),
]


@pytest.mark.parametrize("lang, reference, hypothesis, errors, units", SAME)
def test_what_counts_as_an_error(lang, reference, hypothesis, errors, units):
    words, _ = metrics.normalized_counts([reference], [hypothesis], [lang])
    assert (int(words.errors[0]), int(words.lengths[0])) == (errors, units)


@pytest.mark.parametrize(
    "lang, reference, hypothesis, basic, spoken",
    [
        ("de", "1.250 Euro", "1250 Euro", 2, 0),
        ("de", "1250 Euro", "eintausendzweihundertfünfzig Euro", 1, 0),
        ("de", "Straße", "Strasse", 1, 0),
        ("de", "3,5 Meter", "drei Komma fünf Meter", 3, 0),
        ("fr", "vingt et un", "21", 3, 0),
        ("fr", "1 250", "1250", 2, 0),
        ("en", "1,250 dogs", "1250 dogs", 2, 0),
        ("en", "twenty one", "21", 2, 0),
        ("es", "veintiuno", "21", 1, 0),
        ("ja", "二十一", "21", 3, 0),
        ("ar", "مَرْحَبًا", "مرحبا", 1, 0),
        ("ar", "واحد و عشرون", "٢١", 3, 0),
        ("he", "שָׁלוֹם", "שלום", 1, 0),
        ("xx", "21", "twenty one", 2, 2),  # nobody counts in it
        ("de", "1234567890", "1234567890", 0, 0),
    ],
)
def test_numbers_are_words_only_by_a_named_style(lang, reference, hypothesis, basic, spoken):
    errors = lambda style: metrics.normalized_counts([reference], [hypothesis], [lang], style)[0]
    assert errors("basic").errors.sum() == basic
    assert errors("spoken").errors.sum() == spoken


@pytest.mark.parametrize(
    "lang, text, expected",
    [
        ("en", "It's Karl's Wi-Fi; Stephen's, all right?", "it is carl s wifi steven s alright"),
        ("en", "the B B C has 5 G and I A C, not A I", "the bbc has 5g and iac not a i"),
        ("en", "Mhum, hm, 'cause I'm gonna travel [noise]", "cause i am going to travel"),
        ("en", "ok, kay? 5mm (laughs) twenty-one dollars", "okay okay 5 hmm $21"),
        (
            "de",
            "Er hat 1250 Häuser, „Straße“.",
            "er hat eintausendzweihundertfünfzig häuser straße",
        ),
        ("fr", "10 000 n'est", "dix mille n est"),
        ("pt", "Não há 21!", "não há vinte e um"),
    ],
)
def test_the_leaderboards_rules(lang, text, expected):
    assert normalize(text, lang, "open_asr") == expected


def test_the_leaderboard_takes_compounds_together():
    references = ["white paper on the table", "Kinder Garten", "base ball"]
    hypotheses = ["whitepaper on a table", "kindergarten", "basketball"]
    langs = ["en", "de", "en"]
    words, _ = metrics.normalized_counts(references, hypotheses, langs, "open_asr")
    assert words.errors.tolist() == [1, 0, 2]
    assert words.lengths.tolist() == [5, 1, 2]
    plain, _ = metrics.normalized_counts(references, hypotheses, langs, "basic")
    assert plain.errors.tolist() == [3, 2, 2]


def test_a_style_says_what_it_has_no_rules_for():
    check("whisper", ["th", None])
    check("open_asr", ["en", "de-AT"])
    with pytest.raises(ValueError, match="has rules for en, de, .* the sets are in none given, th"):
        check("open_asr", ["en", "tha", None])
    with pytest.raises(ValueError, match="whispr is not one of whisper, basic, spoken, open_asr"):
        check("whispr", [])


@pytest.mark.parametrize("style", STYLES)
def test_no_text_stops_a_style(style):
    for text in ("", " ", "9" * 5000, "\ud800", "\0", "[", "(", "<|im_end|>", "½ ² ٣ three", "$"):
        for lang in ("en", "de"):
            assert normalize(text, lang, style) == " ".join(normalize(text, lang, style).split())
