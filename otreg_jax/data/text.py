"""Text in and out: the one prompt builder, and what a tokenizer makes of transcripts.

Training and decoding both take their prompt from `build_prompt`, so they cannot disagree. To see an
example as the model is trained on it, token by token with its loss mask:

    python -m otreg_jax.data.text --tokenizer=DIR --prompt="{speech}\\n" "turn on the light"
"""

import functools
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

from otreg_jax import command
from otreg_jax.data import chat as chat_lib
from otreg_jax.data.tokenization import SPEECH, Tokenizer, load_tokenizer

SAMPLE = 2000  # transcripts that are looked at to see how the tokenizer writes them
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


def build_prompt(
    tokenizer: Tokenizer, template: str = "{speech}\n", has_values: bool = False
) -> Prompt:
    """The prompt of a template such as "Transcribe: {speech}\\n".

    "chat:Transcribe: {speech}" puts what follows the colon into a user's turn of the model's own
    chat template; the answer then ends with what ends a turn there. Otherwise the begin token is
    put first if the model expects one and the template does not begin with it, and the end token
    ends the answer.

    has_values: the template's fields are filled in (`prompts.fill`); what stands there need not be
    writable, nor is it taken for a special token's name.

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
        absent = [token for token in special if tokenizer.token_id(token) is None]
        if absent and not has_values:
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
        if tokenizer.unk_id in written and not has_values:
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


def sample(items: Sequence) -> Sequence:
    """At most SAMPLE of them, evenly spaced."""
    return items[:: max(1, -(-len(items) // SAMPLE))]


def check_transcripts(
    tokenizer: Tokenizer, texts: Sequence[str], max_unknown: float = 1.0
) -> list[str]:
    """Lines on how the tokenizer writes transcripts, from a `sample` of them.

    Raises ValueError when more than `max_unknown` of the tokens stand for text it cannot write.
    """
    texts = sample(texts)
    ids = [tokenizer.encode(text) for text in texts]
    total = sum(map(len, ids))
    if not total:
        return []
    unknown = sum(row.count(tokenizer.unk_id) for row in ids) / total
    lines = [
        f"tokenizer: {sum(map(len, texts)) / total:.2f} characters a token, {unknown:.1%} of the "
        "tokens unknown"
    ]
    if unknown > max_unknown:
        worst = max(zip(ids, texts, strict=True), key=lambda row: row[0].count(tokenizer.unk_id))
        raise ValueError(
            f"the tokenizer cannot write {unknown:.1%} of the transcripts' tokens, for instance "
            f"{worst[1][:60]!r}: is it of another language? Take another, or raise "
            f"tokenizer.max_unknown={max_unknown:g}"
        )
    cased = [text for text in texts if text.lower() != text.upper()]
    if cased and sum(text == text.upper() for text in cased) >= 0.9 * len(cased):
        lower = sum(len(tokenizer.encode(text.lower())) for text in texts)
        if total >= 1.2 * lower:
            lines.append(
                f"tokenizer: upper-case transcripts take {total / lower:.1f} times the tokens of "
                f"lower case ({total:,} instead of {lower:,} in {len(texts):,} of them)"
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
