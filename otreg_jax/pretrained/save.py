"""Models to a Hugging Face directory: config.json and safetensors that `transformers` opens."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from flax import traverse_util

from otreg_jax.data.tokenization import Tokenizer, save_tokenizer
from otreg_jax.models.llm import LLM
from otreg_jax.models.speech_encoder import SpeechEncoder
from otreg_jax.pretrained import configs, tables
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


def save_speech_encoder(directory: str | pathlib.Path, model: SpeechEncoder, params: dict) -> None:
    """Writes a speech encoder as transformers' WhisperEncoder reads it.

    With strides other than Whisper's only `pretrained.load_speech_encoder` reads it.
    """
    config = configs.speech_encoder_config_json(model.config)
    table = tables.speech_encoder_table(model.config)
    _save(pathlib.Path(directory), config, params, table)


class _Tensor(NamedTuple):
    """One tensor to write: a parameter, or one layer of it."""

    name: str
    leaf: Any
    layer: int | None
    axes: tuple[int, ...] | None

    @property
    def nbytes(self) -> int:
        return self.leaf.nbytes if self.layer is None else self.leaf.nbytes // len(self.leaf)

    def read(self) -> np.ndarray:
        array = np.asarray(self.leaf if self.layer is None else self.leaf[self.layer])
        return np.ascontiguousarray(array if self.axes is None else array.transpose(self.axes))


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
    tensors = [tensor for row in table.rows for tensor in _tensors(row, flat[row.path])]
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
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    dtype = str(next(iter(flat.values())).dtype)
    config_json = json.dumps(config | {"torch_dtype": dtype}, indent=2)
    (directory / "config.json").write_text(config_json + "\n")


def _tensors(row: tables.Row, leaf: Any) -> list[_Tensor]:
    """The tensors one parameter is saved as: one, or one for each layer."""
    if "{layer}" not in row.name:
        return [_Tensor(row.name, leaf, None, row.axes)]
    return [_Tensor(row.name.format(layer=i), leaf, i, row.axes) for i in range(len(leaf))]
