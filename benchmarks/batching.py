"""Whether an utterance that is decoded in a batch gives what it gives alone.

    python -m benchmarks.batching --workdir=runs/quickstart

Decodes utterances of a run's sets in batches of mixed lengths, padded to the longest, and each
alone with little padding; in float32 and bfloat16, greedily and with a beam of 3. Prints how many
differ.
"""

import argparse
import pathlib

import jax
import numpy as np

from otreg_jax import build, decoding, optim
from otreg_jax import config as config_lib
from otreg_jax.data import features, sets, sources

BATCH = 32
FRAMES = 100  # alone, an utterance is padded to a multiple: few shapes to compile


def computing_in(run: build.Run, workdir: pathlib.Path, dtype: str) -> build.Run:
    """The run with activations and frozen weights in a dtype."""
    config = config_lib.ConfigDict(run.config.to_dict())
    config.compute_dtype = dtype
    llm_dir = build.llm_path(config, workdir)
    vocab_size = run.tokenizer.vocab_size
    slm = build.modules(config, vocab_size, run.slm.prompt, llm_dir, run.mesh)
    params = optim.merge(*build.split(run.params, config))
    return run._replace(slm=slm, params=decoding.for_run(slm, params))


def hypotheses(run: build.Run, mels: list[np.ndarray], frames: int, rows: int, settings) -> list:
    """The tokens of each utterance, decoded `rows` at a time, padded to so many frames."""
    found = []
    for i in range(0, len(mels), rows):
        group = mels[i : i + rows]
        mel_BFM = np.zeros((rows, frames, mels[0].shape[1]), np.float32)
        length_B = np.ones(rows, np.int32)
        for b, mel_FM in enumerate(group):
            mel_BFM[b, : len(mel_FM)], length_B[b] = mel_FM, len(mel_FM)
        decoded = jax.device_get(
            decoding.recognize(run.slm, run.params, mel_BFM, length_B, settings)
        )
        found += [decoded.tokens[b, : decoded.length[b]].tolist() for b in range(len(group))]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=200, help="utterances")
    args = parser.parse_args()
    loaded = build.load_run(args.workdir)
    utterances, _ = sets.load_eval(loaded.config, args.workdir)
    everything = [u for found in zip(*utterances.values(), strict=False) for u in found]
    chosen = everything[: args.count]
    num_mels = loaded.config.data.num_mels
    mels = [features.log_mel(sources.load_audio(u), num_mels) for u in chosen]
    seconds = [u.duration for u in chosen]
    print(f"{len(mels)} utterances of {min(seconds):.1f} to {max(seconds):.1f} s")
    for dtype in ("float32", "bfloat16"):
        run = computing_in(loaded, args.workdir, dtype)
        for width in (1, 3):
            settings = decoding.Settings(40, width)
            together = hypotheses(run, mels, max(map(len, mels)), BATCH, settings)
            differ = 0
            for mel_FM, tokens in zip(mels, together, strict=True):
                frames = -(-len(mel_FM) // FRAMES) * FRAMES
                differ += hypotheses(run, [mel_FM], frames, 1, settings) != [tokens]
            print(f"{dtype}, beam {width}: {differ} of {len(mels)} differ", flush=True)


if __name__ == "__main__":
    main()
