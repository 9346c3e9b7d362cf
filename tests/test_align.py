"""Word times: monotone spans against brute force, tokens to words, and the command."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest
import tokenizers
from toy import toy_batch, toy_slm
from toy_run import TEXTS, make_run, write_set

from otreg_jax import align, alignment
from otreg_jax.data import features, sets, sources, tokenization
from otreg_jax.data.text import Prompt
from otreg_jax.models import slm as slm_lib


def test_spans_are_the_best_monotone_division():
    rng = np.random.default_rng(0)
    for _ in range(20):
        num_speech, num_text = rng.integers(4, 8), rng.integers(1, 4)
        shares = rng.dirichlet(np.ones(num_text), num_speech)
        silent = rng.uniform(0.01, 0.99, num_speech)
        opens = rng.uniform(size=num_text) < 0.6

        def likelihood(edges, shares=shares, silent=silent, opens=opens):
            """edges: start, end, start, end, … of the tokens"""
            spans = list(zip(edges[::2], edges[1::2], strict=True))
            gaps = [(a, b) for (_, a), (b, _) in itertools.pairwise(spans)]
            if any(a < b and not open_ for (a, b), open_ in zip(gaps, opens[1:], strict=True)):
                return -np.inf
            if spans[0][0] > 0 and not opens[0]:
                return -np.inf
            total = np.log(silent).sum()
            for t, (a, b) in enumerate(spans):
                said = np.maximum(1 - silent[a:b], alignment.CLOSED) * shares[a:b, t]
                total += np.log(said / silent[a:b]).sum()
            return total

        every = itertools.combinations_with_replacement(range(num_speech + 1), 2 * num_text)
        divisions = [e for e in every if all(e[i] < e[i + 1] for i in range(0, len(e), 2))]
        best = max(divisions, key=likelihood)
        starts, ends = alignment.monotone_spans(shares, silent, opens)
        np.testing.assert_array_equal(np.stack([starts, ends], axis=1).ravel(), best)


def test_more_tokens_than_positions_share_them():
    opens = np.ones(5, bool)
    starts, ends = alignment.monotone_spans(np.full((2, 5), 0.2), np.zeros(2), opens)
    assert starts[0] == 0 and ends[-1] == 2
    assert (starts[1:] == ends[:-1]).all() and (starts < ends).all()


def test_silence_is_heard_in_the_audio():
    rng = np.random.default_rng(0)
    audio = 0.1 * rng.normal(size=16000).astype(np.float32)
    audio[:4000] *= 0.003  # 50 dB below
    audio[8000:8800] = 0
    audio[12000:12100] = 1.0  # a click, beside which speech is not silent
    mels = [features.log_mel(x) for x in (audio, np.zeros(1600, np.float32), audio[4000:5600])]
    length = np.array([len(mel) for mel in mels])
    padded = np.stack([np.pad(mel, [(0, 100 - len(mel)), (0, 0)]) for mel in mels])
    heard, nothing, loud = np.asarray(alignment.silence(padded, length, np.array([20, 2, 2]), 21))
    assert heard[:5].min() >= 0.8 and heard[10] >= 0.4
    assert heard[5:10].max() == 0 and heard[11:].max() == 0
    assert not nothing.any() and not loud.any()  # beside nothing louder, nothing is silent


def test_silence_does_not_move_the_words():
    """Five words of four positions each, with and without silence around and between them."""
    speech, text_TD = np.repeat(np.eye(5), 4, axis=0), np.eye(5)
    mel_FM = np.full((160, 8), 1.0)
    lengths = np.array([20]), np.array([5])
    align_one = lambda speech_SD, mel_FM: [
        np.asarray(x)[0]
        for x in alignment.shares(
            speech_SD[None],
            text_TD[None],
            np.array([len(speech_SD)]),
            lengths[1],
            mel_FM[None],
            np.array([len(mel_FM)]),
        )
    ]
    dense, silent = align_one(speech, mel_FM)
    assert not silent.any()
    places = [0, 0, 0, 8, 20, 20]  # positions of silence, which sound like any word
    padded = np.insert(speech, places, [0.3, 0.2, 0.5, 0.1, 0.4], axis=0)
    quiet = np.insert(mel_FM.reshape(20, 8, 8), places, 0.0, axis=0).reshape(-1, 8)
    shares, silent = align_one(padded, quiet)
    is_silent = np.insert(np.zeros(20, bool), places, True)
    np.testing.assert_array_equal(silent, is_silent)
    np.testing.assert_allclose(shares[~is_silent], dense, atol=1e-3)
    np.testing.assert_allclose(shares[is_silent], 0.2, atol=1e-6)
    starts, ends = alignment.monotone_spans(shares, silent, np.ones(5, bool))
    assert list(zip(starts, ends, strict=True)) == [(3, 7), (7, 11), (12, 16), (16, 20), (20, 24)]


def test_silence_before_between_and_after_words_is_theirs_alone():
    shares = np.repeat(np.eye(3) * 0.7 + 0.1, [4, 3, 5], axis=0)
    silent = np.array([1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1.0])
    spans, begins = [(0, 2), (3, 5), (6, 8)], [0, 2, 5]
    words = alignment.words_of("ab cc dd", spans, begins, shares, silent)
    assert [w[:3] for w in words] == [("ab", 2, 4), ("cc", 4, 6), ("dd", 7, 10)]
    assert words[0].confidence == pytest.approx(0.8)
    # The second and third token are one word: the silence in it is its own.
    whole, cccc = alignment.words_of("ab ccdd", [(0, 2), (3, 7)], [0, 2, 5], shares, silent)
    assert (whole.end, cccc.start, cccc.end) == (4, 4, 10)
    silent[:] = 1  # where all is silent, every word still has a position
    words = alignment.words_of("ab cc dd", spans, begins, shares, silent)
    assert all(w.start < w.end for w in words)


def test_a_prompt_does_not_move_the_words():
    """In hidden states, where speech stands behind the prompt; without attention, through which
    they may well see it."""
    slm, params = toy_slm()
    params["llm"]["layers"]["attn"]["o"]["kernel"] *= 0
    batch = toy_batch()
    batch["mel"] *= 0.1  # as loud all the time: no silence
    plain, prompted = [
        alignment.token_shares(
            slm_lib.make(slm.encoder.config, slm.adapter.config, slm.llm.config, prompt),
            params,
            batch,
            layer=1,
        )
        for prompt in (Prompt((), (), 2), Prompt(tuple(range(5, 20)), (3, 4), 2))
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), plain, prompted)
    shares_BST, _, length_B = plain
    assert np.ptp(shares_BST[0, : length_B[0]], axis=0).min() > 0.01  # they tell positions apart


def tokenizers_of(folder, texts):
    """A SentencePiece model of whole words, one of bytes, and a byte-level tokenizer.json."""
    words = tokenization.train_sentencepiece(texts, folder / "words", 60, model_type="word")
    options = {"model_type": "bpe", "byte_fallback": True}
    pieces = tokenization.train_sentencepiece(texts, folder / "pieces", 290, **options)
    byte_level = tokenizers.ByteLevelBPETokenizer()
    byte_level.train_from_iterator([*texts, "</s>"], vocab_size=270, special_tokens=["</s>"])
    config = json.dumps({"eos_token": "</s>"}).encode()
    return [words, pieces, tokenization.HuggingFaceTokenizer(byte_level.to_str().encode(), config)]


@pytest.mark.parametrize(
    ("line", "lang", "expected"),
    [
        ("turn  on Zürich, 日本 light", "en", ["turn", "on", "Zürich,", "日本", "light"]),
        ("「日本」。 x", "ja", ["「日", "本」。", "x"]),
        ("नमस्ते दुनिया", "hi", ["नमस्ते", "दुनिया"]),
        (" turn on ", "", ["turn", "on"]),
    ],
)
def test_words_are_those_of_the_transcript(tmp_path, line, lang, expected):
    for tokenizer in tokenizers_of(tmp_path, TEXTS):
        begins = tokenizer.begins(line)
        assert len(begins) == len(tokenizer.encode(line))
        shares = np.full((40, len(begins)), 1 / len(begins))
        spans = alignment.units(line, lang)
        words = alignment.words_of(line, spans, begins, shares, np.zeros(40))
        assert [w.text for w in words] == expected
        assert words[0].start == 0 and words[-1].end == 40
        assert all(w.start < w.end for w in words)
        edges = [edge for w in words for edge in (w.start, w.end)]
        np.testing.assert_allclose(edges[1:-1:2], edges[2::2])


def test_tokens_share_the_letters_they_say(tmp_path):
    words, pieces, byte_level = tokenizers_of(tmp_path, TEXTS)
    # One unknown token holds all that lies between known words.
    line = "turn ü 日本 light"
    np.testing.assert_array_equal(
        alignment.token_letters(line, words.begins(line)), [[0, 4], [4, 7], [7, 12]]
    )
    for tokenizer in (pieces, byte_level):
        found = alignment.token_letters(line, tokenizer.begins(line))
        assert {(5, 6), (6, 7)} <= set(map(tuple, found.tolist()))  # three bytes each
        assert (np.diff(found[:, 0]) >= 0).all() and found[0, 0] == 0 and found[-1, 1] == 12


def test_a_sample_holds_all_of_its_speech_and_all_of_its_text(tmp_path):
    tokenizer = tokenization.train_sentencepiece(TEXTS, tmp_path / "t", 60, model_type="word")
    batch = {"mel": np.zeros((2, 40, 4)), "mel_length": np.array([40, 30])}
    batch |= {"tokens": np.ones((2, 5), np.int32), "token_length": np.array([3, 2])}
    compared = np.zeros((2, 10, 6)), np.array([10, 8]), np.zeros((2, 5, 6))
    utterance = sources.Utterance("a", "a.wav", TEXTS[0], 0.3)
    sample = alignment.sample_of(utterance, tokenizer, batch, compared, 1, features.LOG_MEL)
    assert sample.mel_FM.shape == (30, 4) and sample.ids_T.shape == (2,)
    assert sample.speech_SD.shape == (8, 6) and sample.text_TD.shape == (2, 6)


def test_word_edges_are_compared_with_the_manifest():
    times = (("ab", 0.0, 0.35), ("cd", 0.45, 1.2))
    utterance = sources.Utterance("a", "a.wav", "ab cd", 1.0, words=times)
    sample = alignment.Sample(
        utterance,
        np.zeros((100, 4)),
        np.zeros((10, 2)),
        np.zeros((2, 2)),
        np.arange(2),
        np.array([0, 2]),
        np.zeros((2, 2)),
    )
    shares, silent = np.repeat(np.eye(2), [4, 6], axis=0)[None], np.zeros((1, 10))
    figures = alignment.word_time_figures([sample], shares, silent)  # 0 to 0.4, 0.4 to 1
    assert figures["word_time_error_ms"] == pytest.approx(50)
    assert figures["word_times_close"] == pytest.approx(3 / 4)
    untimed = sample._replace(utterance=utterance._replace(words=()))
    assert not alignment.word_time_figures([untimed], shares, silent)


def test_a_set_is_named_once():
    with pytest.raises(ValueError, match="'a='.*each name once") as error:
        sets.named_manifests("a=1,b=3,a=2")
    assert "\n" not in str(error.value)


def test_textgrid_covers_the_utterance():
    words = [alignment.Word("a", 0.5, 1.0, 1.0), alignment.Word('say "b"', 1.0, 1.5, 1.0)]
    grid = align.as_textgrid(words, duration=2.0)
    assert "intervals: size = 4" in grid
    assert 'text = "say ""b"""' in grid
    assert grid.count("xmax = 2\n") == 3  # the file's, the tier's, the last interval's


def test_command_times_every_word_in_order(tmp_path, capsys):
    manifest = write_set(tmp_path / "dev", 9, seed=0)
    make_run(tmp_path / "run", dev=manifest)
    assert align.cli([str(manifest), f"--workdir={tmp_path / 'run'}", "--batch_size=8"]) == 0
    printed = map(json.loads, capsys.readouterr().out.splitlines())
    aligned = {line["id"]: line["words"] for line in printed}
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert set(aligned) == {line["id"] for line in lines}
    for line in lines:
        words = aligned[line["id"]]
        assert [word for word, _, _ in words] == line["text"].split()
        times = [t for _, start, end in words for t in (start, end)]
        assert times == sorted(times)
        # Noise from end to end: no silence.
        assert times[0] == 0 and times[-1] == pytest.approx(line["duration"], abs=0.02)
    grids = tmp_path / "grids"
    command = [str(manifest), f"--workdir={tmp_path / 'run'}", f"--textgrid={grids}"]
    assert align.cli([*command, "--batch_size=8"]) == 0
    assert len(list(grids.glob("utt-*.TextGrid"))) == 9
    assert align.cli(["missing.jsonl", f"--workdir={tmp_path / 'run'}"]) == 1
    assert "no such manifest" in capsys.readouterr().err
