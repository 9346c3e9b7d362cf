"""Writes a trained model in Hugging Face layout.

    python -m otreg_jax.export --workdir=DIR --out=DIR2

DIR2/llm/                 the LLM, LoRA merged, with its tokenizer; `transformers` opens it
DIR2/encoder/             the speech encoder, LoRA merged; transformers' WhisperEncoder opens it if
                          its strides are Whisper's
DIR2/adapter.safetensors  the adapter (and the CTC head, if one was trained), by path
DIR2/config.json          the configuration of the run, the adapter's widths and the prompt's tokens

Kernels that were int8 in training (`frozen_int8`) are written as floats of the same values.
To go on from there: --config.llm.path=DIR2/llm --config.encoder.path=DIR2/encoder.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from flax import traverse_util

from otreg_jax import build, pretrained
from otreg_jax import config as config_lib
from otreg_jax.models import lora, quantize


def export(run: build.Run, out: str | Path) -> None:
    """Writes `run` to the directory `out`; ValueError if `out` holds something already."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another --out")
    params = lora.merge(quantize.from_int8(run.params, run.config.compute_dtype))
    pretrained.save_llm(out / "llm", run.slm.llm, params["llm"], run.tokenizer)
    pretrained.save_speech_encoder(out / "encoder", run.slm.encoder, params["encoder"])
    rest = {name: tree for name, tree in params.items() if name not in ("llm", "encoder")}
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="a run directory of otreg_jax.train")
    parser.add_argument("--checkpoint", default="newest", help="newest, best or a step")
    parser.add_argument("--out", required=True, help="where to write; new or empty")
    args = parser.parse_args(argv)
    config_lib.quiet_and_cached()
    try:
        export(build.load_run(args.workdir, args.checkpoint), args.out)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {args.out}/llm, encoder, adapter.safetensors and config.json")


if __name__ == "__main__":
    main()
