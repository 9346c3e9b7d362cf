"""A frozen speech encoder's outputs for the whole training set (`encoder.keep`)."""

import json
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from otreg_jax import checkpoint, rundir, sharding
from otreg_jax.data import encoded
from otreg_jax.models import encoders


def encode_once(config, utterances, tokenizer, slm, frozen, share, folder, skipped_path):
    """`encoded.Kept` of the utterances, on the mesh of `slm`; what `folder` holds is not computed.

    Args:
      frozen: the parameters that hold the whole encoder. share: `cluster.batch_share` of the mesh.
      folder: local, and one that all processes see.

    Raises:
      ValueError: the folder is remote.
    """
    if rundir.is_remote(folder):
        raise ValueError(f"encoder.keep: {folder} is remote, and what is kept is read from a disk")
    apply = jax.jit(lambda params, *mel: slm.encoder.apply({"params": params}, *mel)[0])

    def encode(batch):
        placed = sharding.to_global(batch, slm.mesh)
        outputs = apply(frozen["encoder"], placed["mel"], placed["mel_length"])
        return sharding.to_host((outputs, placed["mel_length"], placed["index"]))

    def wait():
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("encoded")

    described = checkpoint.fingerprints({"encoder": frozen["encoder"]})
    described |= {"computed in": config.compute_dtype}
    return encoded.keep(
        utterances,
        tokenizer,
        config.data,
        Path(folder),
        encode=encode,
        wait=wait,
        positions=lambda frames: encoders.output_length(slm.encoder.config, frames),
        frontend=encoders.frontend(slm.encoder.config),
        fingerprint=json.dumps(described, sort_keys=True),
        batch_size=config.batch_size,
        host_index=share[0],
        host_count=share[1],
        is_writer=jax.process_index() == 0,
        skipped_path=skipped_path,
    )
