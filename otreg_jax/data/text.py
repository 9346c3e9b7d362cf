"""Text in and out: tokenizers behind one small interface, and the one prompt builder.

Training and decoding both take their prompt from `build_prompt`, so they cannot disagree. To see an
example as the model is trained on it, token by token with its loss mask:

    python -m otreg_jax.data.text --tokenizer=DIR --prompt="{speech}\\n" "turn on the light"
"""

import functools
import hashlib
import io
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import sentencepiece
import tokenizers
from etils import epath

from otreg_jax import command
from otreg_jax.data import chat as chat_lib

SPEECH = "{speech}"  # where a prompt template puts the speech embeddings
SAMPLE = 2000  # transcripts that are looked at to see how the tokenizer writes them
MODEL_TYPES = ("unigram", "bpe", "word", "char")  # of a SentencePiece model that is trained
CLASSES = ("all", "used")  # of CTC: every token, or those of the training transcripts
CHAT = "chat:"  # what begins a prompt that goes through the model's own chat template

# A user turn and the start of the answer, for models whose own chat template is not at hand. The
# begin token is not part of it: `build_prompt` adds the tokenizer's own.
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


def from_shell(template: str) -> str:
    """A prompt template as it was typed in a shell, which passes \\n as two characters."""
    return template.replace("\\n", "\n")


def build_prompt(tokenizer: Tokenizer, template: str = "{speech}\n") -> Prompt:
    """The prompt of a template such as "Transcribe: {speech}\\n".

    "chat:Transcribe: {speech}" puts what follows the colon into a user's turn of the model's own
    chat template; the answer then ends with what ends a turn there. Otherwise the begin token is
    put first if the model expects one and the template does not begin with it, and the end token
    ends the answer.

    Raises ValueError when the template does not hold {speech} exactly once, has characters that the
    tokenizer cannot write, or names special tokens it does not have; "chat:", when there is no chat
    template, it cannot be rendered, or the turn holds a control token.
    """
    text, said = template, f"prompt {template!r}"
    if template.count(SPEECH) != 1:
        raise ValueError(f"{said} must contain {SPEECH} exactly once")
    if template.startswith(CHAT):
        text, end = _chat(tokenizer, template.removeprefix(CHAT), said)
        control = set(tokenizer.control.values())
        ends = (i for i in tokenizer.encode_prompt(end) if i in control)
        ids, eos = tokenizer.encode_prompt(text), next(ends, tokenizer.eos_id)
    else:
        special = re.findall(r"<[^<>\s]+>|\[/?[A-Z_]+\]", template)
        if absent := [token for token in special if tokenizer.token_id(token) is None]:
            raise ValueError(
                f"{said}: {', '.join(absent)} is no token of this tokenizer; is the template that "
                'of another model? "chat:..." takes the model\'s own'
            )
        ids, eos = tokenizer.encode_prompt(template), tokenizer.eos_id
        if tokenizer.adds_bos and ids[0] != tokenizer.bos_id:
            ids = [tokenizer.bos_id, *ids]
    at = ids.index(None)
    prefix, suffix = tuple(ids[:at]), tuple(ids[at + 1 :])
    for part, written in zip(text.split(SPEECH), (prefix, suffix), strict=True):
        if tokenizer.unk_id in written:
            raise ValueError(
                f"{said}: the tokenizer cannot write {part!r}; change it, or train the tokenizer "
                "with its characters"
            )
    return Prompt(prefix, suffix, eos)


def _chat(tokenizer: Tokenizer, turn: str, said: str) -> tuple[str, str]:
    """The turn in the model's chat template, up to the answer; and what follows an answer."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{said}: the tokenizer has no chat template (chat_template.jinja, or a key of "
            "tokenizer_config.json); is the model instruction-tuned? A prompt without chat: is a "
            "template of your own"
        )
    if control := [token for token in tokenizer.control if token in turn]:
        raise ValueError(f"{said}: {', '.join(control)}: a control token is no text of a turn")
    text, end = chat_lib.turn(tokenizer.chat_template, tokenizer.special_tokens, turn)
    if text.count(SPEECH) != 1:
        raise ValueError(f"{said}: the chat template gives {SPEECH} {text.count(SPEECH)} times")
    return text, end


def used_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """The ids of the tokens that these texts are made of, rising, each once."""
    return sorted({i for text in texts for i in tokenizer.encode(text)})


def check_transcripts(
    tokenizer: Tokenizer, texts: Sequence[str], max_unknown: float = 1.0
) -> list[str]:
    """Lines on how the tokenizer writes transcripts, from at most SAMPLE of them, evenly spaced.

    Raises ValueError when more than `max_unknown` of the tokens stand for text it cannot write.
    """
    sample = texts[:: max(1, -(-len(texts) // SAMPLE))]
    ids = [tokenizer.encode(text) for text in sample]
    total = sum(map(len, ids))
    if not total:
        return []
    unknown = sum(row.count(tokenizer.unk_id) for row in ids) / total
    lines = [
        f"tokenizer: {sum(map(len, sample)) / total:.2f} characters a token, {unknown:.1%} of the "
        "tokens unknown"
    ]
    if unknown > max_unknown:
        worst = max(zip(ids, sample, strict=True), key=lambda row: row[0].count(tokenizer.unk_id))
        raise ValueError(
            f"the tokenizer cannot write {unknown:.1%} of the transcripts' tokens, for instance "
            f"{worst[1][:60]!r}: is it of another language? Take another, or raise "
            f"tokenizer.max_unknown={max_unknown:g}"
        )
    cased = [text for text in sample if text.lower() != text.upper()]
    if cased and sum(text == text.upper() for text in cased) >= 0.9 * len(cased):
        lower = sum(len(tokenizer.encode(text.lower())) for text in sample)
        if total >= 1.2 * lower:
            lines.append(
                f"tokenizer: upper-case transcripts take {total / lower:.1f} times the tokens of "
                f"lower case ({total:,} instead of {lower:,} in {len(sample):,} of them)"
            )
    return lines


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


def define_flags(define) -> None:
    define.string("tokenizer", None, "tokenizer.json, *.model or a directory with one of them.")
    define.string("prompt", "{speech}\n", "Prompt template.")
    define.integer("speech", 3, "Number of speech positions.", 0)


def main(values, arguments: Sequence[str]) -> None:
    tokenizer = load_tokenizer(values.tokenizer)
    prompt = build_prompt(tokenizer, from_shell(values.prompt))

    def name(i: int | None) -> str:
        return "-" if i is None else f"{i} {tokenizer.tokens([i])[0]!r}"

    print(f"{'':4} {'part':10} {'input':24} {'target':24} loss")
    tokens = tokenizer.encode(" ".join(arguments))
    for i, position in enumerate(layout(prompt, tokens, values.speech)):
        in_loss = int(position.target is not None)
        print(
            f"{i:4} {position.part:10} {name(position.token):24} "
            f"{name(position.target):24} {in_loss}"
        )


cli = functools.partial(
    command.run, main, define_flags, required=["tokenizer"], arguments="TRANSCRIPT"
)

if __name__ == "__main__":
    sys.exit(cli())
