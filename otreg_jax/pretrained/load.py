"""Weights from a Hugging Face directory or hub id: config.json and safetensors to model and params.

A directory may be on gs://; its tensors are then read from there.

Strict: every tensor must be known, wanted once, of the right shape and finite. Light: tensors are
read one at a time, by slices, into the sharding and dtype they are to have, so the host never holds
much more than one of them.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import reprlib
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from absl import logging
from etils import epath
from flax import traverse_util

from otreg_jax.models import encoders as encoder_lib
from otreg_jax.models.adapter import Adapter, AdapterConfig
from otreg_jax.models.encoders import EncoderConfig
from otreg_jax.models.llm import LLM, LLMConfig
from otreg_jax.pretrained import checks, configs, encoders, layouts, remote, tables

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")  # never pickles, never code

Dtypes = Callable[[str], str]
Shardings = Callable[[dict], dict]
Read = Callable[[str, jax.Array], dict[str, jax.Array]]


def load_llm(
    source: str | pathlib.Path,
    revision: str | None = None,
    dtype: str = "float32",
    dtypes: Dtypes | None = None,
    shardings: Shardings | None = None,
    read: Read | None = None,
) -> tuple[LLM, dict]:
    """The LLM of a Hugging Face directory (config.json + safetensors) or hub id.

    Args:
      source: a directory, or a hub id such as "Qwen/Qwen2.5-1.5B-Instruct" with its `revision`, the
        commit to pin. Only JSON, safetensors and tokenizer files are fetched; no code is run.
      dtype: of the params and of the computation.
      dtypes: from a param's path ("layers/attn/q/kernel") to its own dtype.
      shardings: from the tree of the params' shapes to a tree of the shardings they are loaded
        into; all on the default device when None.
      read: called with the path and the array of each parameter once it is read; what takes its
        place, by path (`quantize.leaf_to_int8`, say), before the next one needs memory.

    Returns:
      The module and its params, a nested dict.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: an architecture or value that is not supported, or weights that do not fit it;
        every problem is listed.
    """
    directory = resolve(source, revision)
    config = llm_config(directory)
    model = LLM(dataclasses.replace(config, dtype=dtype))
    shapes = _shapes(model, dtypes or (lambda _: dtype), jnp.zeros((1, 1), jnp.int32))
    return model, read_params(directory, tables.llm_table(config), shapes, shardings, read)


def load_speech_encoder(
    source: str | pathlib.Path,
    revision: str | None = None,
    dtype: str = "float32",
    dtypes: Dtypes | None = None,
    shardings: Shardings | None = None,
    read: Read | None = None,
) -> tuple[nn.Module, dict]:
    """A speech encoder, alone or inside a larger model (`encoders.DEFAULTS`, `layouts.LAYOUTS`);
    arguments, result and errors as for `load_llm`."""
    directory = resolve(source, revision)
    config = speech_encoder_config(directory)
    model = encoder_lib.make(dataclasses.replace(config, dtype=dtype))
    shapes = _shapes(model, dtypes or (lambda _: dtype), *encoder_lib.example(config))
    table = tables.speech_encoder_table(config)
    return model, read_params(directory, table, shapes, shardings, read)


def load_adapter(
    source: str | pathlib.Path,
    revision: str | None,
    config: AdapterConfig,
    dtypes: Dtypes | None = None,
    shardings: Shardings | None = None,
    read: Read | None = None,
) -> tuple[Adapter, dict]:
    """The adapter of a speech LLM, whose `config` is that of `adapter_config`; arguments, result
    and errors as for `load_llm`."""
    model = Adapter(config)
    inputs = jnp.zeros((1, config.stack, config.in_dim)), jnp.array([config.stack])
    shapes = _shapes(model, dtypes or (lambda _: config.dtype), *inputs)
    directory = resolve(source, revision)
    return model, read_params(directory, tables.adapter_table(config), shapes, shardings, read)


def llm_config(source: str | pathlib.Path, revision: str | None = None) -> LLMConfig:
    """What config.json says about the LLM of a directory or hub id; errors as for `load_llm`."""
    return configs.llm_config(*_config_json(resolve(source, revision, ["*.json"])))


def speech_encoder_config(source: str | pathlib.Path, revision: str | None = None) -> EncoderConfig:
    """What config.json, and preprocessor_config.json if there is one, say about the speech encoder
    of a directory or hub id."""
    directory = resolve(source, revision, ["*.json"])
    path = directory / "preprocessor_config.json"
    preprocessor = read_json(path) if path.is_file() else {}
    return encoders.speech_encoder_config(*_config_json(directory), preprocessor)


def adapter_config(
    source: str | pathlib.Path,
    revision: str | None,
    encoder: EncoderConfig,
    llm: LLMConfig,
) -> AdapterConfig:
    """What config.json of a speech LLM says about the adapter between its encoder and its LLM."""
    raw, where = _config_json(resolve(source, revision, ["*.json"]))
    raw = checks.parsed(raw, where)
    return layouts.adapter_config(raw, encoder.embed_dim, llm.embed_dim, encoder.mlp_dim, where)


def window(
    source: str | pathlib.Path, revision: str | None, encoder: EncoderConfig
) -> layouts.Window | None:
    """What a speech LLM pads audio to; None if `source` holds something else."""
    raw, where = _config_json(resolve(source, revision, ["*.json"]))
    layout = layouts.name(checks.parsed(raw, where))
    return layouts.full_window(layout, encoder) if layout else None


def resolve(
    source: str | pathlib.Path, revision: str | None = None, patterns: Sequence[str] = FILES
) -> pathlib.Path:
    """The directory of `source`: itself, local or on gs://, or a hub id's snapshot at a pinned
    revision, of which files that match `patterns` are fetched."""
    if "://" in str(source):
        return epath.Path(source)
    directory = pathlib.Path(source)
    if directory.is_dir():
        return directory
    if problem := source_problem(source, revision):
        kind = ValueError if HUB_ID.fullmatch(str(source)) else FileNotFoundError
        raise kind(f"{source}: {problem}")
    import huggingface_hub  # only here: nothing else needs the network

    return pathlib.Path(
        huggingface_hub.snapshot_download(
            str(source), revision=revision, allow_patterns=list(patterns)
        )
    )


def source_problem(source: str | pathlib.Path, revision: str | None) -> str:
    """Why `source` is neither a directory nor a hub id with its revision, "" if it is; the hub is
    not asked."""
    if "://" in str(source) or pathlib.Path(source).is_dir():
        return ""
    if not HUB_ID.fullmatch(str(source)):
        return "no such directory, and not a hub id (owner/name)"
    if revision is None:
        return "no such directory; to fetch it from the hub give the commit to pin as its revision"
    return ""


def _config_json(directory: pathlib.Path) -> tuple[dict[str, Any], str]:
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; is this a Hugging Face model directory?")
    return read_json(path), str(path)


def read_json(path: pathlib.Path) -> Any:
    """The contents of a JSON file; ValueError names it if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # numbers of 5,000 digits, no UTF-8, ...
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def _shapes(model, dtypes: Dtypes, *inputs) -> dict:
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    flat = traverse_util.flatten_dict(shapes, sep="/")
    flat = {path: jax.ShapeDtypeStruct(x.shape, dtypes(path)) for path, x in flat.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


class _Tensor(NamedTuple):
    """A tensor in an open file: where it is, and what reads slices of it."""

    name: str
    file: pathlib.Path
    slices: Any
    shape: tuple[int, ...]
    dtype: str


def read_params(
    directory: pathlib.Path,
    table: tables.Table,
    shapes: dict,
    shardings: Shardings | None = None,
    read: Read | None = None,
) -> dict:
    """Params of the given shapes and dtypes from the safetensors files of a directory; `read` as
    for `load_llm`.

    Raises ValueError listing every unreadable file and every missing, unexpected, duplicate,
    mis-shaped or non-finite tensor.
    """
    targets = traverse_util.flatten_dict(shapes, sep="/")
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = dict.fromkeys(targets, here)
    else:
        placed = traverse_util.flatten_dict(shardings(shapes), sep="/")
    with contextlib.ExitStack() as stack:
        tensors = _open_all(directory, stack)
        sources = _match(directory, tensors, table, targets)
        rows = {row.path: row for row in table.rows}
        flat, finite = {}, {}
        for path, target in targets.items():
            leaf = _read_leaf(target, sources[path], rows[path], placed[path], finite)
            flat |= read(path, leaf) if read else {path: leaf}
    _raise(directory, [f"not finite: {name}" for name, ok in finite.items() if not ok])
    return traverse_util.unflatten_dict(flat, sep="/")


def _files(directory: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    """The safetensors files and, where an index says so, the tensors each should hold."""
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise FileNotFoundError(
                f"{directory}: holds neither {SINGLE} nor {INDEX}; other formats (pickles such as "
                "pytorch_model.bin, GGUF) are not read: convert them to safetensors"
            )
        return {directory / SINGLE: None}
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map: not an index of safetensors")
    outside = sorted({str(f) for f in weight_map.values() if not _is_plain_name(f)})
    problems = [f"{INDEX} points to {reprlib.repr(file)}, no file beside it" for file in outside]
    _raise(directory, problems)
    files: dict[pathlib.Path, set[str] | None] = {}
    for name, file in weight_map.items():
        files.setdefault(directory / file, set()).add(name)
    return files


def _is_plain_name(file: Any) -> bool:
    return isinstance(file, str) and bool(re.fullmatch(r"[^/\\\0]+\.safetensors", file))


def _open_all(directory: pathlib.Path, stack: contextlib.ExitStack) -> list[_Tensor]:
    tensors, problems = [], []
    for file, expected in sorted(_files(directory).items()):
        if not file.is_file():
            problems.append(f"{file.name}: named in {INDEX} but missing")
            continue
        try:
            if "://" in str(file):
                opened = stack.enter_context(remote.File(file))
            else:
                opened = stack.enter_context(safetensors.safe_open(file, "np"))
        except ValueError as error:
            problems.append(f"{file.name}: {error}")
            continue
        except safetensors.SafetensorError as error:
            problems.append(f"{file.name}: {error}{_cut_tensors(file)}")
            continue
        for name in opened.keys():
            slices = opened.get_slice(name)
            shape = tuple(slices.get_shape())
            tensors.append(_Tensor(name, file, slices, shape, slices.get_dtype()))
        if expected is not None:
            for name in sorted(expected - set(opened.keys())):
                problems.append(f"{file.name}: lacks {name}, which {INDEX} says it holds")
    _raise(directory, problems)
    return tensors


def _cut_tensors(file: pathlib.Path) -> str:
    """Which tensors of a truncated file are not whole, for the error message."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        try:
            (header_size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(header_size, size)))
            header.pop("__metadata__", None)
            ends = {n: 8 + header_size + t["data_offsets"][1] for n, t in header.items()}
        except (struct.error, ValueError, TypeError, KeyError, AttributeError):
            return "; its header cannot be read"
    cut = sorted(name for name, end in ends.items() if end > size)
    return f"; cut off: {', '.join(cut)}" if cut else ""


def _match(
    directory: pathlib.Path, tensors: list[_Tensor], table: tables.Table, targets: dict
) -> dict[str, dict[int | None, _Tensor]]:
    """For every path its tensors by layer number (None for a parameter outside the layers)."""
    patterns = [(tables.name_pattern(table, row), row) for row in table.rows]
    sources: dict[str, dict[int | None, _Tensor]] = {path: {} for path in targets}
    problems = []
    if heads := sorted(t.name for t in tensors if re.fullmatch(table.named, t.name)):
        logging.warning("%s: not needed and passed over: %s", directory, ", ".join(heads))
    for tensor in tensors:
        if any(re.fullmatch(pattern, tensor.name) for pattern in table.ignored):
            continue
        label = f"{tensor.name} {list(tensor.shape)} in {tensor.file.name}"
        found = [(pattern.fullmatch(tensor.name), row) for pattern, row in patterns]
        found = [(_layer(match), row) for match, row in found if match]
        found = [(n, row) for n, row in found if row.layers is None or n in row.layers]
        if not found:
            problems.append(f"unexpected: {label}")
        for layer, row in found:
            layer = layer if row.layers is None else row.layers.index(layer)
            problem = _misfit(label, tensor, row, layer, sources[row.path], targets[row.path])
            problems += [problem] if problem else []
            sources[row.path].setdefault(layer, tensor)
    for row in table.rows:
        stacked = "{layer}" in row.name
        layers = range(targets[row.path].shape[0]) if stacked else (None,)
        for layer in layers:
            if layer not in sources[row.path]:
                number = row.layers[layer] if row.layers else layer
                problems.append(f"missing: {row.name.format(layer=number)}")
    _raise(directory, list(dict.fromkeys(problems)))  # a tensor may hold several parameters
    return sources


def _layer(match: re.Match) -> int | None:
    """The number of the layer in a tensor's name, None if it is of none."""
    layer = match.groupdict().get("layer")
    return None if layer is None else int(layer)


def _misfit(
    label: str,
    tensor: _Tensor,
    row: tables.Row,
    layer: int | None,
    sources: dict[int | None, _Tensor],
    target: jax.ShapeDtypeStruct,
) -> str:
    """What is wrong with a tensor for a parameter, "" if nothing."""
    shape = target.shape
    if layer is not None:
        if layer >= shape[0]:
            return f"unexpected: {label}: the model has {shape[0]} layers"
        shape = shape[1:]
    wanted = shape if row.axes is None else tuple(shape[axis] for axis in row.axes)
    if row.part:
        wanted = (row.part.total, *wanted[1:])
    if layer in sources:
        first = sources[layer]
        return f"duplicate: {label}, also {first.name} in {first.file.name}"
    if tensor.shape != wanted:
        return f"mis-shaped: {label}: the model has {list(wanted)}"
    if not re.fullmatch(r"B?F\d+", tensor.dtype):
        return f"not floating point: {label} is {tensor.dtype}"
    return ""


def _read_leaf(
    target: jax.ShapeDtypeStruct,
    sources: dict[int | None, _Tensor],
    row: tables.Row,
    sharding: jax.sharding.Sharding,
    finite: dict[str, bool],
) -> jax.Array:
    """One parameter in its sharding; a stacked one is filled in place, layer by layer."""
    if None in sources:
        leaf = _read_tensor(sources[None], target.shape, target.dtype, row, sharding)
        finite[sources[None].name] = bool(jnp.isfinite(leaf).all())
        return leaf
    layer_sharding = sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
        layer_sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
    leaf = jnp.zeros(target.shape, target.dtype, device=sharding)
    for layer, tensor in sources.items():
        one = _read_tensor(tensor, target.shape[1:], target.dtype, row, layer_sharding)
        leaf, ok = _set_layer(leaf, one, layer)
        finite[tensor.name] = bool(ok)  # waits, so that host buffers do not pile up
    return leaf


def _set_layer_impl(leaf: jax.Array, one: jax.Array, layer: jax.Array):
    return jax.lax.dynamic_update_index_in_dim(leaf, one, layer, 0), jnp.isfinite(one).all()


_set_layer = jax.jit(_set_layer_impl, donate_argnums=0)


def _read_tensor(
    tensor: _Tensor,
    shape: tuple[int, ...],
    dtype: Any,
    row: tables.Row,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    axes = tuple(range(len(shape))) if row.axes is None else row.axes
    start = row.part.start if row.part else 0

    def read(index: tuple[slice, ...]) -> np.ndarray:
        # Axis i here is axis axes[i] of the file; each `axes` is its own inverse.
        ours = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))
        theirs = [ours[axis] for axis in axes]
        if theirs:
            theirs[0] = slice(start + theirs[0].start, start + theirs[0].stop)
        theirs = tuple(theirs)
        return np.ascontiguousarray(tensor.slices[theirs].transpose(axes).astype(dtype))

    return jax.make_array_from_callback(shape, sharding, read)


def _raise(directory: pathlib.Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{directory}: the weights cannot be used:\n  " + "\n  ".join(problems))
