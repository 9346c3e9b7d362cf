"""The training loss and its terms."""

from otreg_jax.losses.cross_entropy import cross_entropy
from otreg_jax.losses.ctc import ctc_collapse, ctc_feasible, ctc_loss, ctc_reading, init_ctc
from otreg_jax.losses.infonce import infonce_loss
from otreg_jax.losses.objective import (
    Schedules,
    Totals,
    batch_totals,
    count_tokens,
    loss_fn,
    make_schedules,
    transcript_cross_entropy,
)
from otreg_jax.losses.reading import reading_kl

__all__ = [
    "Schedules",
    "Totals",
    "batch_totals",
    "count_tokens",
    "cross_entropy",
    "ctc_collapse",
    "ctc_feasible",
    "ctc_loss",
    "ctc_reading",
    "infonce_loss",
    "init_ctc",
    "loss_fn",
    "make_schedules",
    "reading_kl",
    "transcript_cross_entropy",
]
