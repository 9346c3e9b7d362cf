"""Writes a trained model in Hugging Face layout.

    python -m otreg_jax.export --workdir=DIR --out=DIR2 [--dtype=bfloat16] [--layout=ultravox]

A model that is built as Ultravox, Voxtral or Qwen2-Audio are becomes one directory in that layout,
which servers open (docs/serving.md): DIR2/config.json, model.safetensors, the tokenizer,
preprocessor_config.json, generation_config.json, and otreg.json, the configuration of the run and
the prompt's tokens. What keeps a model from a layout is said. Any other model, or any with
--layout=parts, becomes

DIR2/llm/                 the LLM, LoRA merged, with its tokenizer, chat template and
                          generation_config.json; `transformers` opens it
DIR2/encoder/             the speech encoder, LoRA merged; transformers opens it by the class of its
                          kind, a WhisperEncoder if its strides are Whisper's
DIR2/adapter.safetensors  the adapter (and the CTC head, if one was trained), by path
DIR2/config.json          the configuration of the run, the adapter's widths and the prompt's tokens

A model of which something was trained, LoRA pairs say, is written in float32, a frozen one in the
run's compute_dtype, int8 kernels as floats of the same values. With --dtype=bfloat16, rounding
takes away a part of what LoRA learned: the command says how much. LoRA's pairs of the LLM are also
written alone, as PEFT reads them, to DIR2/lora/.
DIR2 may be remote (gs://...): the files then pass through a temporary directory (TMPDIR).
To go on from there: --config.model.path=DIR2, or of parts --config.llm.path=DIR2/llm
--config.encoder.path=DIR2/encoder.
"""

import dataclasses
import functools
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from otreg_jax import build, command, optim, pretrained, rundir
from otreg_jax.models import lora, quantize

GENERATION = "generation_config.json"
DTYPES = ("float32", "bfloat16", "float16")
AUTO, PARTS = "auto", "parts"
LAYOUTS = (AUTO, PARTS, *pretrained.LAYOUTS)


def export(run: build.Run, out: str | Path, dtype: str = "", layout: str = AUTO) -> float:
    """Writes `run` to the directory `out`.

    dtype: of encoder and LLM, one of DTYPES; "": for each the one that loses nothing.
    layout: one of LAYOUTS.

    Returns how much of LoRA's change was rounded away, see `lora.rounded_away`. Raises ValueError
    if `out` holds something already, or the model cannot become one of `layout`.
    """
    out = Path(out)
    if rundir.holds_something(out):
        raise ValueError(f"{out} is not empty: choose another --out")
    layout = choose_layout(run, layout)
    plain = {part: quantize.from_int8(run.params[part], "float32") for part in ("llm", "encoder")}
    plain["adapter"] = run.params["adapter"]
    kinds = {
        part: dtype or _widest(run.params[part], run.config.compute_dtype)
        for part in ("llm", "encoder")
    }
    if layout == PARTS:
        _write_parts(run, out, plain, kinds)
    else:
        _write_whole(run, out, plain, jnp.result_type(*kinds.values()), layout)
    if any(path.endswith("lora_a") for path in optim.flat_paths(plain["llm"])):
        pretrained.save_lora(out / "lora", run.slm.llm.config, plain["llm"])
    return lora.rounded_away({part: plain[part] for part in kinds}, dtype or "float32")


def _write_parts(run: build.Run, out: Path, plain: dict, kinds: dict) -> None:
    written = {part: _merged(plain[part], kind) for part, kind in kinds.items()}
    pretrained.save_llm(out / "llm", run.slm.llm, written["llm"], run.tokenizer)
    _write_json(out / "llm" / GENERATION, _generation(run))
    pretrained.save_speech_encoder(out / "encoder", run.slm.encoder, written["encoder"])
    rest = {name: tree for name, tree in run.params.items() if name not in written}
    arrays = {path: np.asarray(leaf) for path, leaf in optim.flat_paths(rest).items()}
    safetensors.numpy.save_file(arrays, out / "adapter.safetensors")
    _write_json(out / "config.json", _description(run))


def _write_whole(run: build.Run, out: Path, plain: dict, dtype, layout: str) -> None:
    params = {part: _merged(tree, dtype) for part, tree in plain.items()}
    token = audio_token(run, layout)
    pretrained.save_layout(out, layout, run.slm[:3], params, token, run.tokenizer)
    _write_json(out / GENERATION, _generation(run))
    _write_json(out / "otreg.json", _description(run))


def choose_layout(run: build.Run, layout: str = AUTO) -> str:
    """The layout that is meant: of AUTO the one that the model has, or PARTS.

    Raises ValueError, with the reasons, if the model cannot become one of `layout`.
    """
    if layout == PARTS:
        return PARTS
    reasons = obstacles(run)
    if layout in reasons and reasons[layout]:
        raise ValueError(f"this model cannot become {layout}: " + "; ".join(reasons[layout]))
    return next((n for n, r in reasons.items() if not r and layout in (AUTO, n)), PARTS)


def obstacles(run: build.Run) -> dict[str, list[str]]:
    """What keeps the model from each layout, nothing where it can become one."""
    slm, data = run.slm, run.config.data
    window = pretrained.Window(data.window, data.window_masked)
    found = {}
    for name in pretrained.LAYOUTS:
        parts = (slm.encoder.config, slm.adapter.config, slm.llm.config)
        found[name] = pretrained.obstacles(name, *parts, window)
        if audio_token(run, name) is None:
            found[name].append("no row of the LLM's table is free for a token of audio")
    return found


def audio_token(run: build.Run, layout: str) -> int | None:
    """The id that stands for speech in prompts: the tokenizer's own token, a row of the table that
    it has no token for or, of Ultravox, which never looks it up, the next one; else the unknown
    token, which no prompt holds."""
    tokenizer, rows = run.tokenizer, run.slm.llm.config.vocab_size
    known = tokenizer.token_id(pretrained.LAYOUTS[layout].token[1])
    if known is not None:
        return known
    if tokenizer.vocab_size < rows or layout == "ultravox":
        return tokenizer.vocab_size
    return tokenizer.unk_id


def _merged(params: dict, dtype) -> dict:
    return jax.tree.map(lambda x: x.astype(dtype), lora.merge(params))


def _description(run: build.Run) -> dict:
    return {
        "run": run.config.to_dict(),
        "step": run.step,
        "adapter": dataclasses.asdict(run.slm.adapter.config),
        "prompt": run.slm.prompt._asdict(),
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _widest(params: dict, compute_dtype: str):
    """The dtype that holds every parameter of a model: float32 if some are trained."""
    unpacked = jax.eval_shape(lambda p: quantize.from_int8(p, compute_dtype), params)
    return jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(unpacked)))


def _generation(run: build.Run) -> dict:
    """generation_config.json: that of the base model, if it has one, and the token that ends an
    answer to this run's prompt."""
    generation = {"bos_token_id": run.tokenizer.bos_id, "eos_token_id": run.tokenizer.eos_id}
    if run.config.llm.path:
        directory = pretrained.resolve(run.config.llm.path, run.config.llm.revision or None)
        if (directory / GENERATION).is_file():
            generation = pretrained.read_json(directory / GENERATION)
    ends = generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends = list(dict.fromkeys([run.slm.prompt.eos, *ends]))
    return generation | {"eos_token_id": ends if len(ends) > 1 else ends[0]}


def define_flags(define) -> None:
    command.define_run(define)
    define.enum("dtype", "", ["", *DTYPES], "Of encoder and LLM.")
    layout = "auto: that of the model's adapter, if there is one."
    define.enum("layout", AUTO, list(LAYOUTS), layout)
    define.string("out", None, "Where to write; new or empty.")


def main(values, _) -> None:
    run = build.load_run(values.workdir, values.checkpoint)
    layout = choose_layout(run, values.layout)
    if rundir.is_remote(values.out):
        if rundir.holds_something(values.out):  # before minutes are spent
            raise ValueError(f"{values.out} is not empty: choose another --out")
        with tempfile.TemporaryDirectory() as folder:
            lost = export(run, folder, values.dtype, layout)
            rundir.copy_tree(folder, values.out)
    else:
        lost = export(run, values.out, values.dtype, layout)
    if layout == PARTS:
        print(f"wrote {values.out}/llm, encoder, adapter.safetensors and config.json")
    else:
        print(f"wrote {values.out} as one {layout} model; see docs/serving.md")
    for name, reasons in obstacles(run).items():
        if reasons and values.layout == AUTO:
            print(f"it cannot become {name}: {'; '.join(reasons)}")
    if run.config.lora.pattern:
        print(f"LoRA merged in float32, then rounded: {lost:.1%} of the norm of its change is lost")


cli = functools.partial(command.run, main, define_flags, required=["workdir", "out"])

if __name__ == "__main__":
    sys.exit(cli())
