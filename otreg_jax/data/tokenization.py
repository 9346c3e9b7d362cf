"""Tokenizers behind one small interface: SentencePiece models and Hugging Face's tokenizer.json."""

import hashlib
import io
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

import sentencepiece
import tokenizers
from etils import epath

from otreg_jax.data import chat as chat_lib

SPEECH = "{speech}"  # where a prompt template puts the speech embeddings
MODEL_TYPES = ("unigram", "bpe", "word", "char")  # of a SentencePiece model that is trained


class Tokenizer(Protocol):
    """What the project asks of a tokenizer. `files` is all there is to save: name → contents."""

    vocab_size: int
    eos_id: int
    bos_id: int | None
    unk_id: int | None  # what stands for text that it cannot write
    adds_bos: bool  # whether the model expects `bos_id` before any text
    chat_template: str | None  # Jinja, as the model was taught to converse
    special_tokens: dict[str, str]  # {"eos_token": "</s>", ...}: what a chat template may name
    control: dict[str, int]  # tokens that no text may hold, and their ids
    fingerprint: str
    files: dict[str, bytes]

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone: no begin or end token, and no control token."""

    def encode_prompt(self, text: str) -> list[int | None]:
        """Token ids of a prompt: control tokens are made out, {speech} is None."""

    def begins(self, text: str) -> list[int]:
        """Where in the text each token of `encode` begins; bytes of a letter where it stands."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special tokens and ids outside the vocabulary are left out."""

    def token_id(self, token: str) -> int | None:
        """The id of one token given as it is written in the vocabulary."""

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The ids as they are written in the vocabulary."""


class SentencePieceTokenizer:
    """A SentencePiece model; raises ValueError when it has no end token."""

    def __init__(self, model: bytes, where: str = "SentencePiece model"):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{where}: not a SentencePiece model ({error})") from error
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        self.bos_id = None if self._processor.bos_id() < 0 else self._processor.bos_id()
        if self.eos_id < 0:
            raise ValueError(f"{where}: has no end token; train it with eos_id ≥ 0")
        self.unk_id = self._processor.unk_id()
        self.adds_bos = self.bos_id is not None
        self.chat_template, self.special_tokens, self.control = None, {}, {}
        self.files = {"tokenizer.model": model}
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_prompt(self, text: str) -> list[int | None]:
        first, *rest = text.split(SPEECH)
        return self.encode(first) + [i for part in rest for i in [None, *self.encode(part)]]

    def begins(self, text: str) -> list[int]:
        return [a for a, _ in self._processor.encode(text, return_type="offset_mapping")["offsets"]]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def token_id(self, token: str) -> int | None:
        i = self._processor.piece_to_id(token)
        return i if self._processor.id_to_piece(i) == token else None

    def tokens(self, ids: Iterable[int]) -> list[str]:
        return [self._processor.id_to_piece(int(i)) for i in ids]


class HuggingFaceTokenizer:
    """A `tokenizer.json`, with the special tokens and the chat template of the files beside it.

    Text is read as text: control tokens that stand in it, such as "<|im_end|>", are characters like
    all others. Only `encode_prompt` makes them out.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        config_json: bytes,
        where: str = "tokenizer.json",
        chat_template: bytes = b"",
    ):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the Rust library raises a bare Exception
            raise ValueError(f"{where}: not a tokenizer.json ({error})") from error
        # A saved tokenizer may pad or cut; here lengths belong to the data pipeline.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # as the text they are, not as control tokens
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.control = {token.content: i for i, token in added.items() if token.special}
        self._control_ids = frozenset(self.control.values())
        self._tokenizer.add_special_tokens([SPEECH])  # no text has it, but prompts do
        self.files = {"tokenizer.json": tokenizer_json, "tokenizer_config.json": config_json}
        if chat_template:
            self.files[chat_lib.FILE] = chat_template
        self.fingerprint = hashlib.sha256(b"".join(self.files.values())).hexdigest()
        config_path = epath.Path(where).with_name("tokenizer_config.json")
        config = _object(config_json, config_path)
        self.special_tokens = _special_tokens(config)
        self.chat_template = chat_lib.template(config, chat_template, config_path)
        if "eos_token" not in self.special_tokens:
            raise ValueError(f"{config_path}: names no eos_token")
        self.eos_id = self._special("eos_token", where)
        self.bos_id = self._special("bos_token", where)
        unknown = getattr(self._tokenizer.model, "unk_token", None) or "<unk>"
        self.unk_id = self.token_id(unknown)
        adds_bos = config.get("add_bos_token")
        if adds_bos is None:
            adds_bos = self.bos_id in self._tokenizer.encode("", add_special_tokens=True).ids
        self.adds_bos = bool(adds_bos) and self.bos_id is not None

    def _special(self, key: str, where: str) -> int | None:
        token = self.special_tokens.get(key)
        if token is not None and self.token_id(token) is None:
            raise ValueError(f"{where}: {key} {token!r} is not in its vocabulary")
        return None if token is None else self.token_id(token)

    def encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if met := self._control_ids.intersection(ids):  # not so in any BPE we know
            written = [token for token, i in self.control.items() if i in met and token in text]
            if written:
                raise ValueError(
                    f"the tokenizer writes {', '.join(written)} as a control token even in text: "
                    f"leave it out of {text[:80]!r}"
                )
        return ids

    def encode_prompt(self, text: str) -> list[int | None]:
        self._tokenizer.encode_special_tokens = False
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        self._tokenizer.encode_special_tokens = True
        return [None if i == self.token_id(SPEECH) else i for i in ids]

    def begins(self, text: str) -> list[int]:
        return [a for a, _ in self._tokenizer.encode(text, add_special_tokens=False).offsets]

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        return [self._tokenizer.id_to_token(int(i)) for i in ids]


def _object(contents: bytes, where) -> dict:
    try:
        config = json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{where}: not an object of keys and values")
    return config


def _special_tokens(config: dict) -> dict[str, str]:
    """{"eos_token": "</s>", ...}, as tokenizer_config.json names them."""
    values = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in values.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """A `tokenizer.json`, a SentencePiece `*.model`, or a directory holding one of them.

    Raises FileNotFoundError when there is none, ValueError when it cannot be read.
    """
    path = epath.Path(path)
    if path.is_dir():
        candidates = [path / "tokenizer.json", *sorted(path.glob("*.model"))]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: holds neither tokenizer.json nor a *.model file")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer file")
    if path.suffix != ".json":
        return SentencePieceTokenizer(path.read_bytes(), str(path))
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        raise FileNotFoundError(f"{config}: missing; it names the begin and end tokens of {path}")
    template = path.with_name(chat_lib.FILE)
    template = template.read_bytes() if template.is_file() else b""
    return HuggingFaceTokenizer(path.read_bytes(), config.read_bytes(), str(path), template)


def save_tokenizer(directory: str | pathlib.Path, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer's files, byte for byte as they were loaded."""
    for name, contents in tokenizer.files.items():
        (epath.Path(directory) / name).write_bytes(contents)


def train_sentencepiece(
    texts: Iterable[str],
    path_prefix: str | pathlib.Path,
    vocab_size: int,
    *,
    model_type: str = "unigram",
    byte_fallback: bool = False,
    symbols: Sequence[str] = ("\n",),
) -> SentencePieceTokenizer:
    """Trains a SentencePiece model (1808.06226), writes `path_prefix`.model and returns it.

    vocab_size: an upper bound; a small text yields fewer pieces. model_type: of MODEL_TYPES.
    byte_fallback: 256 byte pieces, so that any text can be written. symbols: always one token each;
    by default the line end that closes a prompt. The text is taken as it is, not normalised.

    Raises ValueError when `vocab_size` is too small for the text's characters (unigram, bpe).
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type=model_type,
            byte_fallback=byte_fallback,
            character_coverage=1.0,
            normalization_rule_name="identity",
            user_defined_symbols=list(symbols),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        needed = re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error))
        reason = f"the text needs {needed[1]}: its characters, and 4" if needed else str(error)
        raise ValueError(f"tokenizer.vocab_size={vocab_size}: {reason}") from None
    epath.Path(f"{path_prefix}.model").write_bytes(model.getvalue())
    return SentencePieceTokenizer(model.getvalue())
