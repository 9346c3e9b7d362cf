"""What the losses share: logits a few positions at a time, and unit vectors."""

import jax
import jax.numpy as jnp

from otreg_jax import otreg

# Logits of an utterance that exist at a time. With a large vocabulary all of them, in float32 and
# with their gradients, would be the largest arrays of the step.
LOGITS_AT_A_TIME = 2**21


def positions_at_a_time(num_classes: int) -> int:
    """Positions of an utterance whose logits may exist at a time."""
    return max(LOGITS_AT_A_TIME // num_classes, 1)


def pieces(x_BT, size: int):
    """[B, T, ...] -> [pieces, B, size, ...], zeros added at the end."""
    x_BT = jnp.pad(x_BT, [(0, 0), (0, -x_BT.shape[1] % size)] + [(0, 0)] * (x_BT.ndim - 2))
    return jnp.moveaxis(x_BT.reshape(len(x_BT), -1, size, *x_BT.shape[2:]), 1, 0)


def inverse_norm(x: jax.Array) -> jax.Array:
    """1 / |x| of vectors [..., D], float32 [...]; of a zero vector 0, with gradient 0."""
    return otreg.inverse_root(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))


def unit(x: jax.Array) -> jax.Array:
    """Vectors [..., D] divided by their norms, float32."""
    return x.astype(jnp.float32) * inverse_norm(x)[..., None]


def sums_in_pieces(sums, arrays, num_classes: int):
    """sums(*arrays), a tree of scalar sums over positions, of arrays [B, T, ...]; where the logits
    that it makes are many, a few positions at a time, once more in the backward pass. What is added
    at the end of the arrays is zero: a mask among them leaves it out."""
    size = positions_at_a_time(num_classes)
    if arrays[0].shape[1] <= size:
        return sums(*arrays)

    def add(carry, piece):
        return jax.tree.map(jnp.add, carry, jax.checkpoint(sums)(*piece)), None

    cut = [pieces(x, size) for x in arrays]
    shapes = jax.eval_shape(sums, *(x[0] for x in cut))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zero, cut)[0]
