"""Checkpoints (Orbax) and run directories. The only file that imports orbax.

DIR/config.json        the resolved configuration
DIR/checkpoints/STEP   trainable parameters, optimizer state, step
Frozen weights are not copied: they come from where the configuration says, or from the seed.
"""

import logging
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from otreg_jax import config as config_lib


def open_checkpoints(workdir, keep: int = 2) -> ocp.training.Checkpointer:
    """The checkpoints of a run directory; leftovers of interrupted saves are removed."""
    policies = ocp.training.preservation_policies
    return ocp.training.Checkpointer(
        (Path(workdir) / "checkpoints").absolute(),
        preservation_policy=policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )


def save(checkpointer, state, step: int, metadata: dict) -> None:
    """Saves asynchronously; returns once the state is copied from the devices, so that the next
    step may donate its buffers."""
    # Overwrite: a step that is there already could not be read, and training came back to it.
    checkpointer.save_async(step, state, force=True, overwrite=True, custom_metadata=metadata)


def restore(checkpointer, abstract_state, params_only: bool = False):
    """The newest readable checkpoint in the shardings of `abstract_state`; None if there is none.

    An unreadable one (truncated, say) is skipped with a warning. With `params_only` the optimizer's
    state is left on disk.

    Raises:
      ValueError: checkpoints exist, and none can be read.
    """
    if params_only:
        nothing = jax.tree.map(lambda _: ocp.PLACEHOLDER, abstract_state.opt_state)
        abstract_state = abstract_state._replace(opt_state=nothing)
    problems = []
    for info in reversed(checkpointer.checkpoints):
        try:
            return checkpointer.load(info.step, abstract_state)
        except Exception as error:  # whatever a broken file makes the reader raise
            reason = (str(error).strip().splitlines() or [repr(error)])[0][:300]
            problems.append(f"step {info.step}: {reason}")
            logging.warning(
                "the checkpoint of step %d cannot be read, trying the one before: %s",
                info.step, reason,
            )  # fmt: skip
    if problems:
        raise ValueError(
            f"{checkpointer.directory}: no checkpoint can be read:\n  " + "\n  ".join(problems)
        )
    return None


def exists(workdir) -> bool:
    """Whether a run directory holds a checkpoint, readable or not."""
    return any(p.name.isdigit() for p in (Path(workdir) / "checkpoints").glob("*"))


def check_workdir(workdir, config) -> None:
    """Refuses a run directory that holds checkpoints of another configuration.

    Raises:
      ValueError: naming every key that differs and may not.
    """
    workdir = Path(workdir)
    path = workdir / "config.json"
    if not (path.exists() and exists(workdir)):
        return
    different = config_lib.differences(config_lib.load(path), config)
    if different:
        raise ValueError(
            f"{workdir} holds checkpoints of another configuration (stored -> now):\n  "
            + "\n  ".join(different)
            + "\nuse another --workdir, or remove this one"
        )
