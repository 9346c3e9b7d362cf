"""Writes a trained model in Hugging Face layout.

    python -m otreg_jax.export --workdir=DIR --out=DIR2 [--dtype=bfloat16]

DIR2/llm/                 the LLM, LoRA merged, with its tokenizer, chat template and
                          generation_config.json; `transformers` opens it
DIR2/encoder/             the speech encoder, LoRA merged; transformers' WhisperEncoder opens it if
                          its strides are Whisper's
DIR2/adapter.safetensors  the adapter (and the CTC head, if one was trained), by path
DIR2/config.json          the configuration of the run, the adapter's widths and the prompt's tokens

A model of which something was trained, LoRA pairs say, is written in float32, a frozen one in the
run's compute_dtype, int8 kernels as floats of the same values. With --dtype=bfloat16, rounding
takes away a part of what LoRA learned: the command says how much.
DIR2 may be remote (gs://...): the files then pass through a temporary directory (TMPDIR).
To go on from there: --config.llm.path=DIR2/llm --config.encoder.path=DIR2/encoder.
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
from flax import traverse_util

from otreg_jax import build, command, pretrained, rundir
from otreg_jax.models import lora, quantize

GENERATION = "generation_config.json"
DTYPES = ("float32", "bfloat16", "float16")


def export(run: build.Run, out: str | Path, dtype: str = "") -> float:
    """Writes `run` to the directory `out`.

    dtype: of encoder and LLM, one of DTYPES; "": for each the one that loses nothing.

    Returns how much of LoRA's change was rounded away, see `lora.rounded_away`. Raises ValueError
    if `out` holds something already.
    """
    out = Path(out)
    if rundir.holds_something(out):
        raise ValueError(f"{out} is not empty: choose another --out")
    plain = {part: quantize.from_int8(run.params[part], "float32") for part in ("llm", "encoder")}
    written = {}
    for part, params in plain.items():
        kind = dtype or _widest(run.params[part], run.config.compute_dtype)
        written[part] = jax.tree.map(lambda x, kind=kind: x.astype(kind), lora.merge(params))
    pretrained.save_llm(out / "llm", run.slm.llm, written["llm"], run.tokenizer)
    (out / "llm" / GENERATION).write_text(json.dumps(_generation(run), indent=2) + "\n")
    pretrained.save_speech_encoder(out / "encoder", run.slm.encoder, written["encoder"])
    rest = {name: tree for name, tree in run.params.items() if name not in written}
    arrays = {
        path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(rest, sep="/").items()
    }
    safetensors.numpy.save_file(arrays, out / "adapter.safetensors")
    description = {
        "run": run.config.to_dict(),
        "step": run.step,
        "adapter": dataclasses.asdict(run.slm.adapter.config),
        "prompt": run.slm.prompt._asdict(),
    }
    (out / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    return lora.rounded_away(plain, dtype or "float32")


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
    define.string("out", None, "Where to write; new or empty.")


def main(values, _) -> None:
    run = build.load_run(values.workdir, values.checkpoint)
    if rundir.is_remote(values.out):
        if rundir.holds_something(values.out):  # before minutes are spent
            raise ValueError(f"{values.out} is not empty: choose another --out")
        with tempfile.TemporaryDirectory() as folder:
            lost = export(run, folder, values.dtype)
            rundir.copy_tree(folder, values.out)
    else:
        lost = export(run, values.out, values.dtype)
    print(f"wrote {values.out}/llm, encoder, adapter.safetensors and config.json")
    if run.config.lora.pattern:
        print(f"LoRA merged in float32, then rounded: {lost:.1%} of the norm of its change is lost")


cli = functools.partial(command.run, main, define_flags, required=["workdir", "out"])

if __name__ == "__main__":
    sys.exit(cli())
