"""Random damage to bytes, to JSON values and to what lies in a folder."""

import json
import random
import string

HUGE = "9" * 401
NUMBERS = [0, 1, -1, 0.5, -0.0, 1e308, -1e308, 1e-320, 2**31, 2**63, -(2**63), int(HUGE)]
NUMBERS += [float(name) for name in ("nan", "inf", "-inf")]
TEXTS = ["", " ", "\0", "\ud800", "a\udfff", "é" * 40, "x" * 5000, "../..", "/", "null", "1", "1.5"]
TEXTS += ["NaN", "\u2028", "\ufeff", "🦜"]
OTHERS = [None, True, False, [], {}, [[]], [None], {"a": None}, [1, 2, 3], ["a", 0, 1]]
SCALARS = NUMBERS + TEXTS + OTHERS


def of_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to three small accidents."""
    for _ in range(rng.randint(1, 3)):
        if not data:
            return data
        at = rng.randrange(len(data))
        size = min(rng.choice([1, 1, 2, 4, 16, 200]), len(data) - at)
        part = data[at : at + size]
        accident = rng.randrange(8)
        if accident == 0:
            data = data[:at]
        elif accident == 1:
            data = (
                data[:at]
                + bytes(part[:-1])
                + bytes([part[-1] ^ 1 << rng.randrange(8)])
                + data[at + size :]
            )
        elif accident == 2:
            data = data[:at] + data[at + size :]
        elif accident == 3:
            data = data[:at] + bytes(255 - b for b in part) + data[at + size :]
        elif accident == 4:
            data = data[:at] + bytes(size) + data[at + size :]
        elif accident == 5:
            data = data[:at] + rng.randbytes(size) + data[at:]
        elif accident == 6:
            data = data[:at] + part + data[at:]
        else:
            data = data[:at] + rng.randbytes(size) + data[at + size :]
    return data


def scalar(rng: random.Random):
    if rng.random() < 0.15:
        return "".join(rng.choices(string.printable + "äß今あ\u0301\u200d", k=rng.randint(0, 30)))
    if rng.random() < 0.1:
        return rng.choice([1, -1]) * rng.random() * 10 ** rng.randint(-5, 20)
    return rng.choice(SCALARS)


def of_value(rng: random.Random, value, depth: int = 0):
    """A JSON value with something in it changed, dropped, added or exchanged."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.8):
        value = dict(value)
        key = rng.choice([*value])
        accident = rng.randrange(6)
        if accident == 0:
            del value[key]
        elif accident == 1:
            value[scalar_key(rng)] = value.pop(key)
        elif accident == 2:
            value[scalar_key(rng)] = scalar(rng)
        else:
            value[key] = of_value(rng, value[key], depth + 1)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        value, at = list(value), rng.randrange(len(value))
        accident = rng.randrange(5)
        if accident == 0:
            del value[at]
        elif accident == 1:
            value.insert(at, value[at])
        elif accident == 2:
            rng.shuffle(value)
        else:
            value[at] = of_value(rng, value[at], depth + 1)
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.4:
        factor = rng.choice([0, -1, 2, 10, 1e9, 0.001, 1.5])
        return type(value)(value * factor) if rng.random() < 0.5 else value * factor
    return scalar(rng)


def scalar_key(rng: random.Random) -> str:
    return rng.choice(
        ["", "Text", "language", "locale", "words", "a" * 300, "ключ", "\ud800", "id"]
    )


def as_json(rng: random.Random, value) -> bytes:
    """A line of JSON, now and then as nobody should write it."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7 or "\\ud" in json.dumps(value))
    return text.encode("utf-8", "surrogatepass")
