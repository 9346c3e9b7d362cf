"""What the losses share: logits a few positions at a time, and unit vectors."""

import jax
import jax.numpy as jnp

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


def unit(x: jax.Array) -> jax.Array:
    """x [..., D] divided by its norm; zero stays zero, with gradient 0."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
