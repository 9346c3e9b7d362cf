"""Safetensors files on gs://, read where they are: a tensor at a time, nothing copied to a disk.

The format: eight bytes with the length of a JSON header, the header ({name: {"dtype", "shape",
"data_offsets"}}), the tensors row by row (https://github.com/huggingface/safetensors).
"""

import contextlib
import json
import struct

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class File(contextlib.AbstractContextManager):
    """An open file with what `load` needs of safetensors' own `safe_open`.

    Raises:
      ValueError: it is no safetensors file, or is cut off.
    """

    def __init__(self, path):
        self.stream = path.open("rb")
        size = path.stat().length
        try:
            (length,) = struct.unpack("<Q", self.stream.read(8))
            self.header = json.loads(self.stream.read(min(length, size)))
            self.header.pop("__metadata__", None)
            self.start = 8 + length
            end = max((t["data_offsets"][1] for t in self.header.values()), default=0)
        except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
            self.stream.close()
            raise ValueError(f"not a safetensors file ({error})") from None
        if self.start + end > size:
            self.stream.close()
            raise ValueError(f"cut off: {size} bytes of {self.start + end}")
        self.name = self.tensor = None  # the one read last: all shards of it come one by one

    def __exit__(self, *_):
        self.stream.close()

    def keys(self) -> list[str]:
        return list(self.header)

    def get_slice(self, name: str) -> "Slice":
        return Slice(self, name)

    def read(self, name: str) -> np.ndarray:
        """A whole tensor."""
        if self.name != name:
            about = self.header[name]
            start, end = about["data_offsets"]
            self.stream.seek(self.start + start)
            data = np.frombuffer(self.stream.read(end - start), DTYPES[about["dtype"]])
            self.name, self.tensor = name, data.reshape(about["shape"])
        return self.tensor


class Slice:
    """A tensor of which parts can be asked for."""

    def __init__(self, file: File, name: str):
        self.file, self.name = file, name

    def get_shape(self) -> list[int]:
        return self.file.header[self.name]["shape"]

    def get_dtype(self) -> str:
        return self.file.header[self.name]["dtype"]

    def __getitem__(self, index) -> np.ndarray:
        return self.file.read(self.name)[index]
