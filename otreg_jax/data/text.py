"""Text in and out: tokenizers behind one small interface, and the one prompt builder.

Training and decoding both take their prompt from `build_prompt`, so they cannot disagree. To see an
example as the model is trained on it, token by token with its loss mask:

    python -m otreg_jax.data.text --tokenizer=DIR --prompt="{speech}\\n" "turn on the light"
"""

import argparse
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import sentencepiece
import tokenizers
from etils import epath

SPEECH = "{speech}"  # where a prompt template puts the speech embeddings

# A user turn and the start of the answer, for instruction-tuned models. The begin token is not part
# of it: `build_prompt` adds the tokenizer's own.
CHATS = {
    "chatml": "<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n",  # Qwen
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n{turn}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "[INST] {turn}[/INST]",
    "gemma": "<start_of_turn>user\n{turn}<end_of_turn>\n<start_of_turn>model\n",
}


class Tokenizer(Protocol):
    """What the project asks of a tokenizer. `files` is all there is to save: name → contents."""

    vocab_size: int
    eos_id: int
    bos_id: int | None
    fingerprint: str
    files: dict[str, bytes]

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone: no begin or end token."""

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
        self.files = {"tokenizer.model": model}
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def token_id(self, token: str) -> int | None:
        i = self._processor.piece_to_id(token)
        return i if self._processor.id_to_piece(i) == token else None

    def tokens(self, ids: Iterable[int]) -> list[str]:
        return [self._processor.id_to_piece(int(i)) for i in ids]


class HuggingFaceTokenizer:
    """A `tokenizer.json`, with the begin and end tokens its `tokenizer_config.json` names."""

    def __init__(self, tokenizer_json: bytes, config_json: bytes, where: str = "tokenizer.json"):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the Rust library raises a bare Exception
            raise ValueError(f"{where}: not a tokenizer.json ({error})") from error
        # A saved tokenizer may pad or cut; here lengths belong to the data pipeline.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        config = json.loads(config_json)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.files = {"tokenizer.json": tokenizer_json, "tokenizer_config.json": config_json}
        self.fingerprint = hashlib.sha256(tokenizer_json + config_json).hexdigest()
        self.eos_id = self._special(config, "eos_token", where)
        self.bos_id = self._special(config, "bos_token", where)
        if config.get("add_bos_token") is False:
            self.bos_id = None
        if self.eos_id is None:
            raise ValueError(f"{where}: tokenizer_config.json beside it names no eos_token")

    def _special(self, config: dict, key: str, where: str) -> int | None:
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return None
        if self.token_id(token) is None:
            raise ValueError(f"{where}: {key} {token!r} is not in its vocabulary")
        return self.token_id(token)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        return [self._tokenizer.id_to_token(int(i)) for i in ids]


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
    return HuggingFaceTokenizer(path.read_bytes(), config.read_bytes(), str(path))


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

    vocab_size: an upper bound; a small text yields fewer pieces. model_type: unigram, bpe or word.
    byte_fallback: 256 byte pieces, so that any text can be written. symbols: always one token each;
    by default the line end that closes a prompt. The text is taken as it is, not normalised.
    """
    model = io.BytesIO()
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
    epath.Path(f"{path_prefix}.model").write_bytes(model.getvalue())
    return SentencePieceTokenizer(model.getvalue())


class Prompt(NamedTuple):
    """Token ids around an example: prefix, speech, suffix, transcript, eos."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    eos: int


def chat(family: str, turn: str) -> str:
    """The prompt template that puts `turn` (with {speech} in it) into a family's chat layout."""
    if family not in CHATS:
        raise ValueError(f"no chat layout {family!r}; there are {', '.join(CHATS)}")
    return CHATS[family].replace("{turn}", turn)


def build_prompt(tokenizer: Tokenizer, template: str = "{speech}\n") -> Prompt:
    """The prompt of a template such as "Transcribe: {speech}\\n".

    The begin token is put first when the tokenizer has one. Raises ValueError when the template
    does not hold {speech} exactly once, names a special token the tokenizer does not have, or has
    characters it cannot write.
    """
    parts = template.split(SPEECH)
    if len(parts) != 2:
        raise ValueError(f"prompt template {template!r} must contain {SPEECH} exactly once")
    special = re.findall(r"<[^<>\s]+>", template)
    if absent := [token for token in special if tokenizer.token_id(token) is None]:
        raise ValueError(
            f"prompt template {template!r}: {', '.join(absent)} is no token of this tokenizer; is "
            "the template that of another model?"
        )
    prefix, suffix = (tuple(tokenizer.encode(part)) for part in parts)
    unknown = tokenizer.token_id("<unk>")
    for part, ids in zip(parts, (prefix, suffix), strict=True):
        if unknown is not None and unknown in ids:
            raise ValueError(
                f"prompt template {template!r}: the tokenizer cannot write {part!r}; change the "
                "template or train the tokenizer with its characters"
            )
    bos = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    return Prompt(bos + prefix, suffix, tokenizer.eos_id)


class Position(NamedTuple):
    """One position of a training example: what goes in, and what the loss asks to come out.

    token, target: token ids; token None for a speech embedding, target None outside the loss.
    """

    part: str
    token: int | None
    target: int | None


def layout(prompt: Prompt, tokens: Sequence[int], num_speech: int) -> list[Position]:
    """A training example position by position, as `models.slm` packs it and the loss reads it."""
    parts = [("prompt", i) for i in prompt.prefix]
    parts += [("speech", None)] * num_speech
    parts += [("prompt", i) for i in prompt.suffix]
    first = len(parts) - 1  # the position before the transcript predicts its first token
    parts += [("transcript", i) for i in tokens]
    targets = [None] * first + [*tokens, prompt.eos]
    return [Position(part, i, t) for (part, i), t in zip(parts, targets, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a training example token by token with its loss mask."""
    parser = argparse.ArgumentParser(prog="python -m otreg_jax.data.text", description=main.__doc__)
    parser.add_argument("text", help="the transcript")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json, *.model or a directory")
    parser.add_argument("--prompt", default="{speech}\n", help="prompt template")
    parser.add_argument("--speech", type=int, default=3, help="number of speech positions")
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.tokenizer)
    # A shell passes \n as two characters.
    prompt = build_prompt(tokenizer, args.prompt.replace("\\n", "\n"))

    def name(i: int | None) -> str:
        return "-" if i is None else f"{i} {tokenizer.tokens([i])[0]!r}"

    print(f"{'':4} {'part':10} {'input':24} {'target':24} loss")
    for i, position in enumerate(layout(prompt, tokenizer.encode(args.text), args.speech)):
        in_loss = int(position.target is not None)
        print(
            f"{i:4} {position.part:10} {name(position.token):24} "
            f"{name(position.target):24} {in_loss}"
        )


if __name__ == "__main__":
    main()
