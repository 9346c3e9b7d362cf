"""InfoNCE of pooled speech and text: a rival of OTReg."""

import jax
import jax.numpy as jnp

from otreg_jax import otreg
from otreg_jax.losses.common import unit


def infonce_loss(
    speech_BSD,
    speech_mask_BS,
    text_BTD,
    text_mask_BT,
    temperature: float,
    center: otreg.Centering | None = None,
):
    """InfoNCE (van den Oord et al. 2018), symmetric as in CLIP: the mean speech embedding of an
    utterance should be closest to the mean embedding of its own transcript among the batch's, and
    the other way round. A rival of OTReg that knows no alignment within the utterance.

    center: what is removed from both sides first. Where the texts of a batch have much in common,
      as they have on a real embedding table, the loss is lowest far from the text without it
      (docs/stages.md).

    Returns:
      loss per utterance that has a transcript; no gradient flows into the text.
    """
    if center is not None:
        speech_BSD = otreg.remove_common(speech_BSD, speech_mask_BS, center)
        text_BTD = otreg.remove_common(text_BTD, text_mask_BT, center)

    def pooled(x_BND, mask_BN):
        masked_BND = jnp.where(mask_BN[..., None], x_BND, 0).astype(jnp.float32)
        return unit(jnp.sum(masked_BND, axis=1))

    text_BD = jax.lax.stop_gradient(pooled(text_BTD, text_mask_BT))
    similarity_BB = pooled(speech_BSD, speech_mask_BS) @ text_BD.T / temperature
    valid_B = text_mask_BT.any(axis=1)
    loss = 0.0
    for logits_BB in (similarity_BB, similarity_BB.T):
        log_p_BB = jax.nn.log_softmax(jnp.where(valid_B[None], logits_BB, -1e9), axis=1)
        loss -= 0.5 * jnp.sum(jnp.diagonal(log_p_BB), where=valid_B)
    return loss / jnp.maximum(valid_B.sum(), 1).astype(jnp.float32)
