"""Tokenizers, prompts and the printed training example."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import toy

from otreg_jax.data import text, tokenization
from otreg_jax.models import slm

TEXTS = [f"turn the {c} lamp {s}" for c in ("red", "green", "blue") for s in ("on", "off")]
SPECIALS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def piece_tokenizer(tmp_path_factory):
    return tokenization.train_sentencepiece(TEXTS, tmp_path_factory.mktemp("sp") / "tokenizer", 60)


@pytest.fixture
def hf_directory(tmp_path):
    """A byte-level BPE tokenizer as Qwen's: no begin token, ChatML's special tokens."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.enable_padding(length=50)  # as some published files have; it must not matter
    bpe.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_sentencepiece_round_trips_and_reloads(piece_tokenizer, tmp_path):
    for line in TEXTS:
        ids = piece_tokenizer.encode(line)
        assert piece_tokenizer.eos_id not in ids and piece_tokenizer.bos_id not in ids
        assert piece_tokenizer.decode([*ids, piece_tokenizer.eos_id]) == line
    assert piece_tokenizer.decode([10**6, -1]) == ""
    tokenization.save_tokenizer(tmp_path, piece_tokenizer)
    again = tokenization.load_tokenizer(tmp_path)
    assert again.fingerprint == piece_tokenizer.fingerprint
    assert again.encode(TEXTS[0]) == piece_tokenizer.encode(TEXTS[0])


def test_byte_fallback_writes_any_text(tmp_path):
    tokenizer = tokenization.train_sentencepiece(TEXTS, tmp_path / "t", 400, byte_fallback=True)
    assert tokenizer.decode(tokenizer.encode("größer ЩЖ 你好")) == "größer ЩЖ 你好"


def test_huggingface_tokenizer_round_trips_and_reloads(hf_directory, tmp_path):
    tokenizer = tokenization.load_tokenizer(hf_directory)
    ids = tokenizer.encode("turn ß on")
    assert tokenizer.decode([*ids, tokenizer.eos_id, 10**6]) == "turn ß on"
    assert tokenizer.tokens([tokenizer.eos_id]) == ["<|im_end|>"] and tokenizer.bos_id is None
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenization.save_tokenizer(copy, tokenizer)
    assert tokenization.load_tokenizer(copy / "tokenizer.json").fingerprint == tokenizer.fingerprint


def test_prompts(piece_tokenizer, hf_directory):
    prompt = text.build_prompt(piece_tokenizer)
    assert prompt.prefix == (piece_tokenizer.bos_id,)
    assert piece_tokenizer.tokens(prompt.suffix) == ["▁", "\n"]
    tokenizer = tokenization.load_tokenizer(hf_directory)
    prompt = text.build_prompt(tokenizer, text.chat("chatml", "Transcribe: {speech}"))
    start, end = map(tokenizer.token_id, SPECIALS)
    assert prompt.prefix[0] == start and prompt.suffix[0] == end == prompt.eos
    assert tokenizer.decode(prompt.prefix) == "user\nTranscribe: "
    assert start in prompt.suffix and tokenizer.decode(prompt.suffix) == "\nassistant\n"


@pytest.mark.parametrize(
    "template, message",
    [
        ("Transcribe:", "must contain {speech} exactly once"),
        ("{speech} and {speech}", "must contain {speech} exactly once"),
        ("QX {speech}", "cannot write 'QX '"),
        (text.chat("chatml", "{speech}"), r"<\|im_start\|>, .* is no token of this tokenizer"),
    ],
)
def test_prompts_that_cannot_be_written_are_refused(piece_tokenizer, template, message):
    with pytest.raises(ValueError, match=message):
        text.build_prompt(piece_tokenizer, template)


def test_how_transcripts_are_written_is_reported_and_refused(piece_tokenizer, hf_directory):
    (line,) = text.check_transcripts(piece_tokenizer, TEXTS)
    assert "characters a token, 0.0% of the tokens unknown" in line
    other = ["你好吗", "turn on"]
    share = [i for t in other for i in piece_tokenizer.encode(t)].count(piece_tokenizer.unk_id)
    share /= sum(len(piece_tokenizer.encode(t)) for t in other)
    assert f"{share:.1%} of the tokens unknown" in text.check_transcripts(piece_tokenizer, other)[0]
    with pytest.raises(ValueError, match=f"cannot write {share:.1%} .*'你好吗'.*max_unknown"):
        text.check_transcripts(piece_tokenizer, other, max_unknown=0.05)
    # Upper case is written letter by letter by a tokenizer that learned lower case.
    cased = tokenization.load_tokenizer(hf_directory)
    upper = [line.upper() for line in TEXTS * 1000]
    counts = [sum(len(cased.encode(t)) for t in texts[::3]) for texts in (upper, TEXTS * 1000)]
    warning = text.check_transcripts(cased, upper)[-1]
    assert f"{counts[0]:,} instead of {counts[1]:,} in 2,000 of them" in warning
    assert f"{counts[0] / counts[1]:.1f} times the tokens" in warning
    for fine in (TEXTS, ["你好"] * 3, [], ["", ""]):
        assert len(text.check_transcripts(cased, fine)) <= 1


def test_unusable_tokenizer_files_are_named(tmp_path, hf_directory):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor a \*.model"):
        (tmp_path / "empty").mkdir()
        tokenization.load_tokenizer(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such tokenizer file"):
        tokenization.load_tokenizer(tmp_path / "absent.model")
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="bad.model: not a SentencePiece model"):
        tokenization.load_tokenizer(tmp_path / "bad.model")
    config = hf_directory / "tokenizer_config.json"
    config.write_text('{"eos_token": "</s>"}')
    with pytest.raises(ValueError, match="eos_token '</s>' is not in its vocabulary"):
        tokenization.load_tokenizer(hf_directory)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer_config.json: missing"):
        tokenization.load_tokenizer(hf_directory)
    (hf_directory / "tokenizer.json").write_text("{")
    config.write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        tokenization.load_tokenizer(hf_directory)
    with pytest.raises(ValueError, match="no chat layout 'vicuna'"):
        text.chat("vicuna", "{speech}")


def test_a_vocabulary_too_small_for_the_characters_says_how_large_it_must_be(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.vocab_size=9: the text needs 1[0-9]") as error:
        tokenization.train_sentencepiece(["abc def ghi"], tmp_path / "t", 9)
    needed = int(re.search(r"needs (\d+)", str(error.value))[1])
    tokenization.train_sentencepiece(["abc def ghi"], tmp_path / "t", needed)


def test_prints_the_loss_mask(piece_tokenizer, tmp_path, capsys):
    tokenization.save_tokenizer(tmp_path, piece_tokenizer)
    text.cli([f"--tokenizer={tmp_path}", "--prompt={speech}\\n", "--speech=2", "lamp on"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    ids = piece_tokenizer.encode("lamp on")
    assert len(rows) == 1 + 2 + 2 + len(ids)
    assert [row[-1] for row in rows] == ["0"] * 4 + ["1"] * (len(ids) + 1)
    assert rows[-1][-2] == "'</s>'"
    # What goes in at one loss position is what the one before was asked for.
    assert [row[2] for row in rows[5:]] == [row[-3] for row in rows[4:-1]]


def test_the_printed_layout_is_what_the_model_packs():
    model, params = toy.toy_slm()
    tokens = [7, 9, 8]
    positions = text.layout(model.prompt, tokens, num_speech=2)
    speech_BSD = jnp.full((1, 4, 16), 5.0)  # two of four positions are valid

    @jax.jit
    def pack(params, tokens_BT):
        text_BTD = slm.embed(model, params, tokens_BT)
        return slm.assemble(model, params, speech_BSD, jnp.array([2]), text_BTD)

    x_BLD, start_B = jax.tree.map(np.asarray, pack(params, np.array([tokens])))
    table = np.asarray(params["llm"]["embed"]["embedding"])
    for i, position in enumerate(positions):
        row = 5.0 if position.token is None else table[position.token]
        np.testing.assert_array_equal(x_BLD[0, i], np.broadcast_to(row, (16,)))
    asked = [i for i, position in enumerate(positions) if position.target is not None]
    assert asked == list(range(start_B[0], start_B[0] + len(tokens) + 1))
    assert [positions[i].target for i in asked] == [*tokens, model.prompt.eos]
