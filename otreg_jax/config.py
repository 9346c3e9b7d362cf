"""The configuration: every key with its default and meaning, its checks, and the flag parsing.

A recipe (configs/*.py) starts from `default()` and changes keys; the command line changes them
again (`--config.otreg.weight=1`). A run directory keeps the resolved result in config.json.
"""

import difflib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict

from otreg_jax import otreg
from otreg_jax.models import layers

# Keys that may differ when a run is resumed: they change neither the model nor what it is fed.
RESUMABLE = (
    "num_steps", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every",
    "eval_every", "stall_seconds", "profile", "mesh", "attention", "data.num_workers",
    "data.cache", "data.dev", "data.test", "max_bad_steps", "otreg.backend",
)  # fmt: skip


def default() -> ConfigDict:
    """The default configuration; on the command line tuples look like `--config.key="(1, 2)"`."""
    return ConfigDict(
        {
            "seed": 0,
            "num_steps": 1000,
            "batch_size": 16,  # utterances a step, over all devices and hosts
            "accumulation": 1,  # micro-batches a step, one after the other: less memory
            "log_every": 10,  # steps between lines of metrics.jsonl
            "checkpoint_every": 500,
            "keep_checkpoints": 2,  # the newest; and the one with the lowest dev loss, if there is
            "keep_every": 0,  # checkpoints of multiples of so many steps stay for good; 0: none
            "eval_every": 0,  # steps between cross-entropies on the dev set; 0: none
            "stall_seconds": 900,  # a run in which nothing happens for so long ends; 0: never
            "profile": "",  # START:STOP, steps to trace into WORKDIR/profile
            "max_bad_steps": 10,  # non-finite steps in a row before training stops
            "compute_dtype": "float32",  # of activations and frozen weights: float32 | bfloat16
            "frozen_int8": False,  # frozen kernels of the layers in int8: half of bfloat16's memory
            "attention": "auto",  # auto | xla | cudnn (GPU) | splash (TPU)
            # Compute activations again in the backward pass, for less memory: none | dots (all but
            # products with weights) | full (all but the input of each layer).
            "remat": "none",
            "freeze": "^encoder/positions/",  # regex of parameter paths that are not trained
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # devices per axis; -1: all that are left
            "data": {
                "train": "",  # manifests (JSONL), comma-separated
                "dev": "",  # manifest; in-domain evaluation
                "test": "",  # further evaluation sets: "name=manifest,name=manifest"
                "cache": "",  # where synthetic speech is kept; "": WORKDIR/data
                "max_utterances": 0,  # use only the first so many training utterances; 0: all
                "num_mels": 80,
                "max_duration": 30.0,  # seconds; longer audio is refused, never cut
                "num_buckets": 2,  # batch shapes (frames, tokens), derived from the data
                "num_workers": 0,  # loader processes; 0: threads of this process
                "on_bad_audio": "raise",  # raise | skip (counted, listed in WORKDIR/skipped.jsonl)
                "long_audio": "reject",  # reject | chunk (between words that the manifest times)
                "max_tokens": 0,  # longer transcripts are unusable; 0: no limit
                "data_root": "",  # where relative audio paths start; "": the manifest's folder
                "mixture": "",  # groups sampled by temperature: "" | lang | corpus (manifest)
                "temperature": 1.0,  # share of a group ~ size^(1 / temperature); 1: as the data are
                "features": "host",  # log-mel on the host | inside the jitted step ("step")
                "augment": {
                    "speeds": (1.0,),  # one is drawn for each utterance: (0.9, 1.0, 1.1)
                    "noise": "",  # manifest of noise recordings
                    "noise_prob": 0.5,
                    "noise_snr": (0.0, 20.0),  # dB, drawn uniformly
                    "rir": "",  # manifest of room impulse responses
                    "rir_prob": 0.5,
                    "time_masks": 0,  # SpecAugment, inside the step
                    "time_width": 50,  # frames at most, and a fifth of the utterance
                    "freq_masks": 0,
                    "freq_width": 20,  # mel bins at most
                },
            },
            # Speech made on the spot by eSpeak NG, instead of manifests: configs/quickstart.py.
            "synthetic": {"num_train": 0},
            "tokenizer": {
                "path": "",  # tokenizer.json, *.model or a directory; "": llm.path, else trained
                "vocab_size": 256,  # of a tokenizer trained on the training transcripts
                "model_type": "unigram",  # SentencePiece: unigram | bpe | word | char
                "max_unknown": 0.05,  # largest share of <unk> among the transcripts' tokens
            },
            # What surrounds the speech; the transcript follows. "chat:Transcribe: {speech}": a turn
            # of the model's own chat template.
            "prompt": "{speech}\n",
            "encoder": {
                "path": "",  # Hugging Face directory or hub id of a Whisper model; "": from scratch
                "revision": "",
                "embed_dim": 96,
                "num_layers": 2,
                "num_heads": 4,
                "mlp_dim": 384,
                "max_positions": 1500,
                "strides": (1, 2),  # of the convolutions over 100 mel frames a second
            },
            "adapter": {
                "kind": "mlp",  # mlp | conv | transformer | conformer | qformer
                "stack": 1,  # encoder positions to one speech embedding
                "hidden_dim": 192,
                "num_layers": 2,  # transformer, conformer, qformer
                "num_heads": 8,
                "num_queries": 1,  # qformer: embeddings a window
                "dropout": 0.0,  # of its last hidden layer
            },
            "llm": {
                "path": "",  # Hugging Face directory or hub id; "": from scratch
                "revision": "",
                "embed_dim": 96,
                "num_layers": 2,
                "num_heads": 4,
                "num_kv_heads": 4,
                "head_dim": 24,
                "mlp_dim": 288,
                "tie_embeddings": True,
                # Before the speech, teach a from-scratch LLM the transcripts' language and to copy
                # embeddings into text; kept in WORKDIR/llm, or read from llm.path if that exists.
                "pretrain": {
                    "num_steps": 0,
                    "batch_size": 32,
                    "learning_rate": 3e-3,
                    "num_sentences": 4000,  # drawn from the synthetic grammar, if there is one
                    "copy_fraction": 0.75,  # of the examples; the rest is plain text
                    "max_repeat": 6,  # copying: each token stands 1..max_repeat times
                    "noise": 0.5,  # copying: noise, relative to the norm of the embeddings
                },
            },
            "lora": {
                "pattern": "",  # regex of whole paths: "llm/layers/attn/[qv]/kernel"; "": none
                "rank": 8,
                "scale": 1.0,  # of the update; what other libraries call alpha / rank
            },
            "otreg": {
                "weight": 0.0,  # lambda at its full value; 0: cross-entropy alone
                "start_step": 0,  # stage 1 (SFT, lambda = 0) lasts until here
                "ramp_steps": 0,  # lambda rises linearly over these steps
                "layer": 0,  # 0: input embeddings; k: hidden states after k LLM layers
                "text_set": "unique",  # unique | sequence
                "text_mass": "uniform",  # uniform | count
                "center": "none",  # none | mean | pcs
                "cost": "cosine",  # cosine | sqeuclidean
                "position_weight": 0.0,  # gamma, from start_step on
                "position_weight_final": -1.0,  # gamma at the last step (linear); -1: constant
                "epsilon": 0.05,
                "num_iters": 50,
                "speech_tau": 1.0,  # rho: below 1 speech positions may give up mass
                "plan": "ot",  # ot | position (the control: no similarity in the plan)
                "backend": "auto",  # what solves for it: auto | xla | pallas (TPU, GPU) | ott
            },
            "ctc": {
                "weight": 0.0,  # CTC over the LLM's vocabulary on the adapter's outputs; 0: none
                "scale": 10.0,  # initial (learned) scale of its cosine logits
            },
            "infonce": {
                "weight": 0.0,  # contrastive loss of pooled speech and text, a rival; 0: none
                "temperature": 0.1,
            },
            "optim": {
                "learning_rate": 1e-3,
                "warmup_steps": 50,
                "final_fraction": 0.1,  # of the learning rate, at the end of the cosine
                "restart_step": 0,  # warm-up and cosine begin anew here (stage 2); 0: never
                "weight_decay": 0.0,  # on matrices only
                "b1": 0.9,
                "b2": 0.98,
                "clip_norm": 1.0,
                "ema_decay": 0.0,  # evaluate an average of the weights (0.999, say); 0: the last
                "multipliers": (),  # ((regex, factor), ...) of the learning rate, first match wins
            },
            "decode": {"max_tokens": 0},  # 0: from the longest evaluation transcript
        }
    )


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """{"data.train": value, ...}"""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def suggest(name: str, known) -> str:
    """' (did you mean 'x'?)' if a known name is close, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check(config: ConfigDict) -> None:
    """Raises one ValueError that lists everything wrong with the configuration's values."""
    c = config
    problems = []

    def require(good, message):
        if not good:
            problems.append(message)

    for key in (
        "num_steps", "batch_size", "accumulation", "log_every", "checkpoint_every",
        "keep_checkpoints",
    ):  # fmt: skip
        require(c[key] >= 1, f"{key}={c[key]} must be at least 1")
    require(
        c.compute_dtype in ("float32", "bfloat16"),
        f"compute_dtype={c.compute_dtype!r} is not float32 or bfloat16",
    )
    require(
        c.remat in ("none", *layers.REMAT),
        f"remat={c.remat!r} is not one of none, {', '.join(layers.REMAT)}",
    )
    require(
        c.data.train or c.synthetic.num_train,
        "no training data: set data.train to a manifest (see README, 'Your own data')",
    )
    require(
        not c.otreg.start_step or c.otreg.start_step < c.num_steps,
        f"otreg.start_step={c.otreg.start_step} is not below num_steps={c.num_steps}: "
        "stage 2 would never start",
    )
    for term in ("otreg", "ctc", "infonce"):
        require(c[term].weight >= 0, f"{term}.weight={c[term].weight} must not be negative")
    require(
        c.infonce.temperature > 0, f"infonce.temperature={c.infonce.temperature} must be above 0"
    )
    require(0 <= c.optim.ema_decay < 1, f"optim.ema_decay={c.optim.ema_decay} must be in [0, 1)")
    require(
        0 <= c.optim.restart_step < c.num_steps,
        f"optim.restart_step={c.optim.restart_step} is not below num_steps={c.num_steps}",
    )
    require(
        not c.infonce.weight or c.accumulation == 1,
        "infonce.weight: the contrastive loss needs the whole batch at once, so accumulation=1",
    )
    require(
        c.llm.path or 0 <= c.otreg.layer < c.llm.num_layers,
        f"otreg.layer={c.otreg.layer} must be in 0..{c.llm.num_layers - 1} (llm.num_layers - 1)",
    )
    require(
        c.otreg.plan != "position" or c.otreg.position_weight_final != 0,
        "otreg.plan='position' with position_weight_final=0: its plan would become uniform",
    )
    require(
        "{speech}" in c.prompt and c.prompt.count("{speech}") == 1,
        f"prompt={c.prompt!r} must hold {{speech}} exactly once",
    )
    try:
        otreg.check_options(
            token_ids_BT=(), position_weight=c.otreg.position_weight, **otreg_options(c)
        )
    except ValueError as error:
        problems.append(str(error))
    require(
        not c.eval_every or c.data.dev or c.synthetic.num_train,
        f"eval_every={c.eval_every} needs a dev set: set data.dev",
    )
    require(
        c.eval_every >= 0 and not (c.eval_every and c.checkpoint_every % c.eval_every),
        f"checkpoint_every={c.checkpoint_every} must be a multiple of eval_every={c.eval_every}, "
        "so that each checkpoint has a dev loss",
    )
    require(
        c.keep_every >= 0 and c.keep_every % c.checkpoint_every == 0,
        f"keep_every={c.keep_every} must be a multiple of checkpoint_every={c.checkpoint_every}, "
        "or 0",
    )
    require(c.stall_seconds >= 0, f"stall_seconds={c.stall_seconds} must not be negative")
    try:
        profile_window(c)
    except ValueError as error:
        problems.append(str(error))
    axes = dict(c.mesh)
    require(
        list(axes.values()).count(-1) <= 1 and all(n == -1 or n >= 1 for n in axes.values()),
        f"mesh={axes}: every axis is a number of devices, at most one is -1",
    )
    if problems:
        raise ValueError("config: " + "\n        ".join(problems))


def otreg_options(config: ConfigDict) -> dict:
    """The arguments of `otreg.regularizer` that the configuration fixes."""
    names = (
        "text_set", "text_mass", "center", "cost", "epsilon", "num_iters", "speech_tau", "plan",
        "backend",
    )  # fmt: skip
    return {name: config.otreg[name] for name in names}


def profile_window(config: ConfigDict) -> tuple[int, int]:
    """The first step of `profile` and the one after its last; (-1, -1) if there is none.

    Raises:
      ValueError: it is not START:STOP with START < STOP <= num_steps.
    """
    if not config.profile:
        return -1, -1
    start, _, stop = config.profile.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop) <= config.num_steps):
        raise ValueError(
            f"profile={config.profile!r} is not START:STOP, two steps up to "
            f"num_steps={config.num_steps}"
        )
    return int(start), int(stop)


def save(config: ConfigDict, path) -> None:
    """Writes the resolved configuration as JSON."""
    epath.Path(path).write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def load(path) -> ConfigDict:
    """Reads a configuration written by `save` over today's defaults. Raises ValueError on keys that
    this version does not know."""
    stored = json.loads(epath.Path(path).read_text())
    config = default()
    known = flatten(config)

    def tuples(value):  # JSON has no tuples, configurations have no lists
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    flat = {key: tuples(value) for key, value in flatten(ConfigDict(stored)).items()}
    unknown = [key for key in flat if key not in known and not key.startswith("synthetic.")]
    if unknown:
        raise ValueError(f"{path}: keys unknown to this version of otreg_jax: {', '.join(unknown)}")
    with config.unlocked():
        config.synthetic = stored.get("synthetic", {})
    config.update_from_flattened_dict(
        {key: value for key, value in flat.items() if not key.startswith("synthetic.")}
    )
    return config


def differences(stored: ConfigDict, config: ConfigDict) -> list[str]:
    """Lines 'key: stored -> now' for every key that must not change when a run is resumed."""
    canonical = lambda value: json.loads(json.dumps(value))
    before, now = flatten(stored), flatten(config)
    return [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if not any(key == name or key.startswith(name + ".") for name in RESUMABLE)
        and canonical(before.get(key)) != canonical(now.get(key))
    ]


def quiet_and_cached() -> None:
    """Log warnings only, and keep compiled programs between processes."""
    logging.set_verbosity(logging.WARNING)
    if not jax.config.jax_compilation_cache_dir:
        cache = os.path.expanduser("~/.cache/otreg_jax")
        jax.config.update("jax_compilation_cache_dir", cache)


def run(main) -> None:
    """absl's app.run, as every command of this package wants it: warnings only, compiled programs
    kept between processes, and one clear line instead of a stack trace where the user can act.

    Errors raised on purpose by this package (their `raise` stands in its own files or in a recipe)
    are such; anything else is a bug and keeps its trace.
    """

    def parse(argv):
        if "config" in flags.FLAGS:
            _check_recipe(argv)
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            sys.exit(f"error: {error}\ntry: python -m otreg_jax.{Path(argv[0]).stem} --help")

    def guarded(argv):
        if len(argv) > 1:
            sys.exit(
                f"error: unexpected arguments {argv[1:]}; flags look like --config.num_steps=10"
            )
        quiet_and_cached()
        try:
            return main(argv)
        except (ValueError, OSError, FloatingPointError, ImportError) as error:
            raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
            if os.path.dirname(os.path.abspath(__file__)) not in os.path.abspath(raised_in):
                raise
            sys.exit(f"error: {error}")

    app.run(guarded, flags_parser=parse)


def _check_recipe(argv) -> None:
    """Exits with one line if the --config file cannot be used or has not the keys that are set."""
    names = [a.lstrip("-").split("=")[0] for a in argv[1:] if a.startswith("-")]
    value = next((a.partition("=")[2] for a in argv if a.lstrip("-").startswith("config=")), "")
    path, _, arm = value.partition(":")
    if not path:
        return  # absl says that it is required
    if not Path(path).is_file():
        recipes = ", ".join(str(p) for p in sorted(Path("configs").glob("*.py"))) or "none here"
        sys.exit(f"error: --config={path}: no such file; configs/: {recipes}")
    try:
        recipe = runpy.run_path(path)["get_config"](*([arm] if arm else []))
    except (ValueError, KeyError) as error:
        sys.exit(f"error: {error}")
    known = flatten(recipe)
    keys = [name.removeprefix("config.") for name in names if name.startswith("config.")]
    groups = {key.rpartition(".")[0] for key in known}
    unknown = [key for key in keys if key not in known and key not in groups]
    for key in unknown:
        print(f"error: --config.{key}: unknown key{suggest(key, known)}", file=sys.stderr)
    if unknown:
        sys.exit(2)
