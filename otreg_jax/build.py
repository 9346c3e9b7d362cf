"""From a configuration to modules and weights, and from a run directory to a trained model."""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from otreg_jax import checkpoint, losses, optim, pretrained, rundir, sharding, stages, train_step
from otreg_jax import config as config_lib
from otreg_jax.data import prompts, sets, text, tokenization
from otreg_jax.models import attention, encoders, lora, quantize
from otreg_jax.models import slm as slm_lib
from otreg_jax.models.adapter import AdapterConfig
from otreg_jax.models.encoders import EncoderConfig
from otreg_jax.models.llm import LLMConfig
from otreg_jax.models.slm import SLM
from otreg_jax.models.speech_encoder import SpeechEncoderConfig


class Run(NamedTuple):
    """A trained model: what a run directory holds."""

    config: ConfigDict
    slm: SLM
    params: Any  # all of them, trained and frozen, on `mesh`
    tokenizer: tokenization.Tokenizer
    step: int
    mesh: jax.sharding.Mesh
    longest_seconds: float = math.inf  # of audio that it was trained on, as far as that is known


def load_run(workdir, which: str = checkpoint.NEWEST) -> Run:
    """A checkpoint of a run directory, on all devices; with `optim.ema_decay` its averaged weights.

    The mesh is the run's as far as the devices at hand allow (`sharding.mesh_at_hand`); weights are
    read straight into their shards, those of the checkpoint from nowhere else.

    which: "newest" (that can be read), "best" (the lowest dev loss) or a step.

    Raises:
      FileNotFoundError: the directory holds no run, or no checkpoint yet.
      ValueError: its checkpoints cannot be read, or were made with other frozen weights; there is
        none like `which`.
    """
    files = rundir.of(workdir)
    if not files.config.exists():
        raise FileNotFoundError(
            f"{workdir}: no run here (config.json is missing); train one with "
            f"python -m otreg_jax.train --config=configs/quickstart.py --workdir={workdir}"
        )
    config = config_lib.load(files.config)
    config.attention = "auto"  # the machine may be another one
    tokenizer = tokenization.load_tokenizer(files.root)
    prompt, llm_dir = prompts.shared(tokenizer, config), llm_path(config, workdir)
    slm = modules(config, tokenizer.vocab_size, prompt, llm_dir)
    trained, frozen = abstract_params(slm, config)
    mesh = sharding.mesh_at_hand(config, optim.merge(trained, frozen))
    slm = modules(config, tokenizer.vocab_size, prompt, llm_dir, mesh)
    abstract_state = train_step.abstract_state(trained, optim.make_optimizer(config), mesh)
    frozen = frozen_params(slm, config, llm_dir)
    made_of = checkpoint.provenance(config, tokenizer, frozen)
    state = checkpoint.restore(workdir, abstract_state, made_of, params_only=True, which=which)
    if state is None:
        raise FileNotFoundError(f"{workdir}: no checkpoint yet; let training reach one")
    weights = optim.averaged(state.params, state.opt_state)
    return Run(
        config,
        slm,
        optim.merge(weights, frozen),
        tokenizer,
        int(state.step),
        mesh,
        sets.longest_seconds(workdir),
    )


def split(params, config):
    """(trained parameters in float32, frozen ones in the compute dtype or, their largest, int8).

    Raises:
      ValueError: `freeze` leaves nothing to train, matches nothing, or is at odds with LoRA.
    """
    trained, frozen = optim.split(params, config.freeze)
    _check_freezing(optim.flat_paths(trained), optim.flat_paths(frozen), config)
    trained = jax.tree.map(lambda x: x.astype("float32"), trained)
    is_float = lambda path, x: (
        jnp.issubdtype(x.dtype, jnp.floating) and not quantize.is_part(path, x)
    )
    frozen = {
        path: x.astype(config.compute_dtype) if is_float(path, x) else x
        for path, x in optim.flat_paths(frozen).items()
    }
    frozen = traverse_util.unflatten_dict(frozen, sep="/")
    return trained, quantize.to_int8(frozen) if config.frozen_int8 else frozen


def _check_freezing(trained, frozen, config) -> None:
    """Raises one ValueError that lists what `freeze` does and cannot be meant to; by real paths."""
    problems = []
    if config.freeze and not any(re.search(config.freeze, path) for path in frozen):
        problems.append(f"matches no parameter; there are e.g. {', '.join(list(trained)[:5])}")
    if not trained:
        problems.append("matches every parameter: nothing is left to train")
    pairs = [path for path in frozen if path.endswith(lora.PAIR)]
    if pairs:
        problems.append(
            f"matches low-rank pairs, which then never train: {', '.join(pairs[:4])} "
            f"({len(pairs)} in all); leave them out by (?!.*/lora_[ab]$)"
        )
    kernels = [path.replace("lora_a", "kernel") for path in trained if path.endswith("/lora_a")]
    loose = [path for path in kernels if path in trained]
    if loose:
        problems.append(
            f"does not match kernels that lora.pattern adapts: {', '.join(loose[:4])} "
            f"({len(loose)} in all) would train beside their low-rank pairs"
        )
    if problems:
        raise ValueError("\n".join(f"freeze={config.freeze!r} {problem}" for problem in problems))


def text_target(trained, config) -> dict:
    """{"target": {"llm": ...}}, to be frozen: a copy, in the compute dtype, of trained weights that
    turn a transcript into what OTReg and InfoNCE draw speech to (the embedding table and the layers
    up to `otreg.layer`); {} if there are none.

    Speech would else be drawn to a target that its own loss moves. An LLM from scratch has no start
    worth keeping: its target moves as it learns. `trained` has to be what training starts from, and
    is so again in a run that resumes, since it comes from where the configuration says. Evaluation
    does without: it measures alignment to the LLM as it has become.
    """
    layers = [
        layer
        for stage in stages.stages_of(config)
        if stage.config.otreg.weight or stage.config.infonce.weight
        for layer in (stage.config.otreg.layer, *config_lib.target_layers(stage.config))
    ]
    if not layers or not (config.llm.path or config.llm.pretrain.num_steps):
        return {}
    copies = {}
    for path, x in optim.flat_paths(trained).items():
        if path == "llm/embed/embedding":
            copies[f"target/{path}"] = x
        elif path.startswith("llm/layers/") and not path.endswith(lora.PAIR) and max(layers):
            copies[f"target/{path}"] = x[: max(layers)]
    # Not the arrays themselves: those are donated to the first step.
    copies = jax.tree.map(lambda x: jnp.array(x, config.compute_dtype, copy=True), copies)
    return traverse_util.unflatten_dict(copies, sep="/")


def llm_path(config, workdir) -> str:
    """Where the LLM's weights are: `llm.path`, else WORKDIR/llm if pretrained, else "" (none)."""
    if config.llm.path or not config.llm.pretrain.num_steps:
        return config.llm.path
    return str(rundir.of(workdir).llm)


def build(
    config, tokenizer: tokenization.Tokenizer, llm_dir: str = "", mesh=None, ctc_classes=None
) -> tuple[SLM, dict]:
    """Modules and weights: pretrained where the configuration names a path, else from the seed.

    Args:
      llm_dir: a Hugging Face directory or hub id with the LLM; "" builds one from scratch.
      mesh: pretrained weights are read straight into their shards of it, if given.
      ctc_classes: see `losses.init_ctc`.

    Returns:
      The SLM and {"encoder", "adapter", "llm"} (and "ctc" if that loss is on).
    """
    prompt = prompts.shared(tokenizer, config)
    slm = modules(config, tokenizer.vocab_size, prompt, llm_dir, mesh)
    loaded = _load(slm, config, llm_dir, mesh)
    params = init_params(slm, config, loaded, ctc_classes)
    if config.lora.path:
        c, llm = config.lora, slm.llm.config
        pairs = pretrained.load_lora(c.path, c.revision or None, llm)
        params["llm"] = pretrained.with_pairs(params["llm"], pairs, c.path)
    return slm, params


def _load(slm: SLM, config, llm_dir: str, mesh, parts=config_lib.PARTS, keep_trained=True) -> dict:
    """The weights of those of `parts` that are read from files."""
    loaders = {
        "encoder": pretrained.load_speech_encoder,
        "adapter": functools.partial(pretrained.load_adapter, config=slm.adapter.config),
        "llm": pretrained.load_llm,
    }
    paths = {part: config[part].path for part in loaders} | {"llm": llm_dir}
    return {
        part: load(
            paths[part],
            config[part].revision or None,
            **_placement(config, part, mesh, keep_trained),
        )[1]
        for part, load in loaders.items()
        if paths[part] and part in parts
    }


def frozen_params(slm: SLM, config, llm_dir: str = "") -> dict:
    """The frozen parameters alone, as `split` gives them, in their shards of the SLM's mesh: read
    where the configuration names a path, else drawn from the seed."""
    _, shapes = abstract_params(slm, config)
    frozen = _load(slm, config, llm_dir, slm.mesh, shapes, keep_trained=False)
    found = optim.flat_paths(frozen)
    missing = {path: x for path, x in optim.flat_paths(shapes).items() if path not in found}

    def draw():  # what is not among the results is not computed
        drawn = optim.flat_paths(split(init_params(slm, config), config)[1])
        return traverse_util.unflatten_dict({path: drawn[path] for path in missing}, sep="/")

    if missing:
        tree = traverse_util.unflatten_dict(missing, sep="/")
        placed = slm.mesh and sharding.tree_shardings(tree, slm.mesh)
        frozen = optim.merge(frozen, jax.jit(draw, out_shardings=placed)())
    return frozen


def modules(config, vocab_size: int, prompt: text.Prompt, llm_dir: str = "", mesh=None) -> SLM:
    """The modules, to compute on `mesh`; of pretrained models no more than config.json is read.

    Raises:
      ValueError: parts that do not belong together.
    """
    encoder_config = _encoder_config(config)
    if llm_dir:
        llm_config = pretrained.llm_config(llm_dir, config.llm.revision or None)
        if llm_config.vocab_size < vocab_size:
            raise ValueError(
                f"{llm_dir}: the LLM has {llm_config.vocab_size} tokens, its tokenizer "
                f"{vocab_size}: they do not belong together"
            )
    else:
        llm_config = new_llm_config(config, vocab_size)
    adapter_config = _adapter_config(config, encoder_config, llm_config)
    choose = functools.partial(
        attention.choose_kernel, config.attention, mesh, dtype=config.compute_dtype
    )
    computing = {"dtype": config.compute_dtype, "remat": config.remat}
    encoder_config = dataclasses.replace(
        encoder_config,
        **computing,
        attention=choose(
            head_dim=encoder_config.embed_dim // encoder_config.num_heads,
            biased=encoders.is_biased(encoder_config),
        ),
    )
    llm_config = dataclasses.replace(
        llm_config,
        **computing,
        attention=choose(head_dim=llm_config.head_dim, softcap=llm_config.attn_softcap),
    )
    return slm_lib.make(encoder_config, adapter_config, llm_config, prompt, mesh)


def _encoder_config(config) -> EncoderConfig:
    """That of the encoder of `encoder.path`, or else what `config.encoder` describes."""
    c = config.encoder
    if c.path:
        found = pretrained.speech_encoder_config(c.path, c.revision or None)
        _check_audio(config, found)
    else:
        found = SpeechEncoderConfig(
            num_mels=config.data.num_mels,
            embed_dim=c.embed_dim,
            num_layers=c.num_layers,
            num_heads=c.num_heads,
            mlp_dim=c.mlp_dim,
            max_positions=c.max_positions,
            strides=tuple(c.strides),
        )
    if not isinstance(found, SpeechEncoderConfig):
        return found
    masked = config.data.window_masked
    return dataclasses.replace(found, pool=max(found.pool, c.pool), reads_padding=masked)


def _check_audio(config, encoder_config: EncoderConfig) -> None:
    """Raises one ValueError that lists what settings of the data a pretrained encoder needs to be
    otherwise."""
    values, c = config_lib.flatten(config), config.encoder
    frontend = encoders.frontend(encoder_config)
    if isinstance(encoder_config, SpeechEncoderConfig):
        takes, needed = f"{frontend.width} mel bins", {"data.num_mels": frontend.width}
    else:
        takes, needed = "the waveform", {"data.augment.freq_masks": 0}
        needed |= {"data.window_masked": False, "encoder.pool": 1}
    if window := pretrained.window(c.path, c.revision or None, encoder_config):
        needed |= {"data.window": window.seconds, "data.window_masked": window.masked}
        takes += f" of windows of {window.seconds:g} s" if window.seconds else ""
    wrong = [
        f"{key}={value} (it is {values[key]})"
        for key, value in needed.items()
        if values[key] != value
    ]
    if wrong:
        raise ValueError(f"{c.path} takes {takes}: set {', '.join(wrong)}")


def _adapter_config(config, encoder: EncoderConfig, llm: LLMConfig) -> AdapterConfig:
    """The adapter between the two: that of a speech LLM if `adapter.path` names one."""
    c = config.adapter.to_dict()
    path, revision = c.pop("path"), c.pop("revision")
    if not path:
        dims = {"in_dim": encoder.embed_dim, "out_dim": llm.embed_dim}
        return AdapterConfig(**dims, dtype=config.compute_dtype, **c)
    theirs = pretrained.adapter_config(path, revision or None, encoder, llm)
    ours = {"dropout": c["dropout"], "norm": c["norm"], "dtype": config.compute_dtype}
    return dataclasses.replace(theirs, **ours)


def new_llm_config(config, vocab_size: int) -> LLMConfig:
    """The LLM that `config.llm` describes when it names no path."""
    c = config.llm
    return LLMConfig(
        vocab_size=vocab_size,
        embed_dim=c.embed_dim,
        num_layers=c.num_layers,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        mlp_dim=c.mlp_dim,
        tied_head=c.tie_embeddings,
    )


def init_params(slm: SLM, config, loaded: dict | None = None, ctc_classes=None) -> dict:
    """All parameters: those of `loaded` parts as they are, the others drawn from the seed, low-rank
    pairs and the CTC head (over `ctc_classes`) added."""
    params = dict(loaded or {})
    key = jax.random.key(config.seed)
    inputs = {
        "encoder": encoders.example(slm.encoder.config),
        "llm": (jnp.zeros((1, 4), jnp.int32),),
        "adapter": (jnp.zeros((1, 8, slm.encoder.config.embed_dim)), jnp.array([8])),
    }
    for i, part in enumerate(inputs):
        if part not in params:
            # jit: op by op, initialisation would compile hundreds of small programs.
            init = jax.jit(getattr(slm, part).init)
            params[part] = init(jax.random.fold_in(key, i), *inputs[part])["params"]
    if config.adapter.norm == "table":
        norm_V = jnp.linalg.norm(params["llm"]["embed"]["embedding"].astype(jnp.float32), axis=1)
        params["adapter"]["scale"] = jnp.median(norm_V) * slm.llm.config.embed_scale
    if config.lora.pattern:
        lora_key = jax.random.fold_in(key, 4)
        params = lora.add(
            params, config.lora.pattern, config.lora.rank, lora_key, config.lora.scale
        )
    if stages.is_ever_on(config, "ctc"):
        ctc_key, c = jax.random.fold_in(key, 3), slm.llm.config
        params["ctc"] = losses.init_ctc(
            ctc_key, c.embed_dim, config.ctc.scale, c.vocab_size, ctc_classes
        )
    return params


def abstract_params(slm: SLM, config) -> tuple[dict, dict]:
    """Shapes and dtypes of the parameters, (trained, frozen); nothing is computed."""
    return jax.eval_shape(lambda: split(init_params(slm, config), config))


def parameter_table(trained, frozen) -> str:
    """Every parameter's shape, sharding, dtype, kind and MiB on one device; then the sums.

    Both are trees of arrays or ShapeDtypeStructs with a sharding.
    """
    rows, sums = [], {}
    for tree, kind in ((trained, "trained"), (frozen, "frozen")):
        for path, x in sorted(optim.flat_paths(tree).items()):
            shown = "LoRA" if path.endswith(lora.PAIR) else kind
            shard = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize / 2**20
            spec = ", ".join(
                "+".join(axis) if isinstance(axis, tuple) else axis or "-"
                for axis in getattr(x.sharding, "spec", ())
            )
            shape = "x".join(map(str, x.shape)) or "()"
            rows.append((path, shape, spec or "-", str(x.dtype), shown, f"{shard:.3f}"))
            number, size = sums.get(shown, (0, 0.0))
            sums[shown] = number + x.size, size + shard
    header = ("parameter", "shape", "sharding", "dtype", "kind", "MiB/device")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    line = lambda row: "  ".join(
        [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        + [row[-1].rjust(widths[-1])]
    )
    total = [
        f"{shown}: {number:,} parameters, {size:.3f} MiB a device"
        for shown, (number, size) in sums.items()
    ]
    return "\n".join([*map(line, [header, *rows]), *total])


def plain(slm: SLM) -> SLM:
    """The same model without recomputation and with XLA's attention: what FLOPs are counted on."""
    simple = lambda config: dataclasses.replace(config, remat="none", attention="xla")
    encoder, llm = simple(slm.encoder.config), simple(slm.llm.config)
    return slm_lib.make(encoder, slm.adapter.config, llm, slm.prompt, slm.mesh)


def _placement(config, part: str, mesh, keep_trained: bool = True) -> dict:
    """In which dtype (what is frozen never needs float32) and shards to read a part's weights, and
    what to make of each that is frozen; others are kept as they are, or let go."""
    is_frozen = lambda path: config.freeze and re.search(config.freeze, f"{part}/{path}")

    def read(path, leaf):
        if not is_frozen(path):
            return {path: leaf} if keep_trained else {}
        return quantize.leaf_to_int8(path, leaf) if config.frozen_int8 else {path: leaf}

    return {
        "dtypes": lambda path: config.compute_dtype if is_frozen(path) else "float32",
        "shardings": mesh and (lambda shapes: sharding.tree_shardings({part: shapes}, mesh)[part]),
        "read": read,
    }
