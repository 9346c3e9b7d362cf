"""Models to a Hugging Face directory: config.json and safetensors that `transformers` opens."""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
import safetensors.numpy
import tokenizers
from flax import traverse_util

from otreg_jax.data.tokenization import Tokenizer, save_tokenizer
from otreg_jax.models.adapter import Adapter
from otreg_jax.models.llm import LLM
from otreg_jax.pretrained import configs, encoders, layouts, tables
from otreg_jax.pretrained.load import INDEX, SINGLE

MAX_FILE_BYTES = 4 * 2**30


def save_llm(
    directory: str | pathlib.Path, model: LLM, params: dict, tokenizer: Tokenizer | None = None
) -> None:
    """Writes an LLM, in the dtype of its params, as `pretrained.load_llm` and transformers read it.

    Raises ValueError when its family cannot express the config, or when LoRA is not merged.
    """
    config = configs.llm_config_json(model.config)
    if tokenizer is not None:
        config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    _save(pathlib.Path(directory), config, params, tables.llm_table(model.config))
    if tokenizer is not None:
        save_tokenizer(directory, tokenizer)


def save_speech_encoder(directory: str | pathlib.Path, model: nn.Module, params: dict) -> None:
    """Writes a speech encoder as transformers' class for its kind reads it.

    A Whisper encoder of strides that Whisper has not is read by `pretrained.load_speech_encoder`
    alone.
    """
    directory = pathlib.Path(directory)
    config = encoders.speech_encoder_config_json(model.config)
    table = tables.speech_encoder_table(model.config)
    _save(directory, config, params, table)
    if preprocessor := encoders.preprocessor_json(model.config):
        _write_json(directory / "preprocessor_config.json", preprocessor)


def save_layout(
    directory: str | pathlib.Path,
    layout: str,
    modules: tuple[nn.Module, Adapter, LLM],
    params: dict,
    audio_token: int,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a whole speech LLM as one of `layouts.LAYOUTS`, which `layouts.obstacles` must allow,
    in the dtype of its params.

    params: those of "encoder", "adapter" and "llm". audio_token: the id that stands for speech; a
    tokenizer.json that does not know it yet is told.
    """
    directory = pathlib.Path(directory)
    encoder, adapter, llm = modules
    llm_config = llm.config
    if llm_config.tied_head and layout != "ultravox":  # of which the classes of the others know not
        params = params | {"llm": params["llm"] | {"head": _untied(params["llm"])}}
        llm_config = dataclasses.replace(llm_config, tied_head=False)
    text = configs.llm_config_json(llm_config)
    if tokenizer is not None:
        text |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    audio = encoders.speech_encoder_config_json(dataclasses.replace(encoder.config, pool=1))
    config = layouts.config_json(layout, audio, adapter.config, text, audio_token)
    parts = {
        "encoder": tables.speech_encoder_table(encoder.config),
        "adapter": tables.adapter_table(adapter.config),
        "llm": tables.llm_table(llm_config),
    }
    _save(directory, config, params, tables.whole(parts))
    preprocessor = layouts.preprocessor_json(layout, encoder.config)
    _write_json(directory / "preprocessor_config.json", preprocessor)
    if tokenizer is not None:
        save_tokenizer(directory, tokenizer)
        _add_token(directory / "tokenizer.json", audio_token, layouts.LAYOUTS[layout].token[1])


def _add_token(path: pathlib.Path, token: int, content: str) -> None:
    """Puts a control token into a tokenizer.json, if that is there and has no token of this id."""
    if not path.is_file():
        return
    stored = json.loads(path.read_text())
    if token in tokenizers.Tokenizer.from_file(str(path)).get_vocab().values():
        return
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    stored["added_tokens"].append({"id": token, "content": content, **flags, "special": True})
    path.write_text(json.dumps(stored, ensure_ascii=False))


def _untied(params: dict) -> dict:
    return {"kernel": params["embed"]["embedding"].T}


class _Tensor(NamedTuple):
    """One tensor to write: a parameter or several one after another, or one layer of them."""

    name: str
    leaves: tuple[Any, ...]
    layer: int | None
    axes: tuple[int, ...] | None

    @property
    def nbytes(self) -> int:
        layers = 1 if self.layer is None else len(self.leaves[0])
        return sum(leaf.nbytes for leaf in self.leaves) // layers

    def read(self) -> np.ndarray:
        arrays = [np.asarray(x if self.layer is None else x[self.layer]) for x in self.leaves]
        arrays = [x if self.axes is None else x.transpose(self.axes) for x in arrays]
        return np.ascontiguousarray(np.concatenate(arrays) if len(arrays) > 1 else arrays[0])


def _save(
    directory: pathlib.Path, config: dict[str, Any], params: dict, table: tables.Table
) -> None:
    flat = traverse_util.flatten_dict(params, sep="/")
    if unknown := sorted(set(flat) - {row.path for row in table.rows}):
        raise ValueError(
            f"{directory}: these parameters have no Hugging Face name (merge LoRA before saving): "
            + ", ".join(unknown)
        )
    directory.mkdir(parents=True, exist_ok=True)
    by_name: dict[tuple, list[tables.Row]] = {}
    for row in table.rows:
        by_name.setdefault((row.name, row.layers), []).append(row)
    tensors = [tensor for rows in by_name.values() for tensor in _tensors(rows, flat)]
    files: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(t.nbytes for t in files[-1]) + tensor.nbytes > MAX_FILE_BYTES:
            files.append([])
        files[-1].append(tensor)
    weight_map = {}
    for i, held in enumerate(files, start=1):
        file = SINGLE if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
        arrays = {tensor.name: tensor.read() for tensor in held}
        safetensors.numpy.save_file(arrays, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
            "weight_map": weight_map,
        }
        _write_json(directory / INDEX, index)
    dtype = str(next(iter(flat.values())).dtype)
    _write_json(directory / "config.json", config | {"torch_dtype": dtype})


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _tensors(rows: list[tables.Row], flat: dict[str, Any]) -> list[_Tensor]:
    """The tensors that the parameters of one name are saved as: one, or one for each layer."""
    name, axes = rows[0].name, rows[0].axes
    leaves = tuple(flat[row.path] for row in rows)
    if "{layer}" not in name:
        return [_Tensor(name, leaves, None, axes)]
    numbers = rows[0].layers or range(len(leaves[0]))
    return [_Tensor(name.format(layer=n), leaves, i, axes) for i, n in enumerate(numbers)]
