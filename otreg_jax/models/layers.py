"""Building blocks shared by the speech encoder, the adapters and the LLM.

Weights keep the dtype they are given in; every layer computes in its own `dtype`, so that float32
weights which train and bfloat16 weights which are frozen go through the same code. Norms and
softmax are computed in float32 whatever the `dtype`.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from otreg_jax import packing, sharding
from otreg_jax.models.attention import attention, length_mask

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def zero_padding(x_BSD: jax.Array, length_B: jax.Array) -> jax.Array:
    """x with exact zeros at positions ≥ length, also where x holds NaN there."""
    return jnp.where(length_mask(length_B, x_BSD.shape[1])[..., None], x_BSD, 0)


def matmul_few_rows(x: jax.Array, kernel_t: jax.Array, dtype=None) -> jax.Array:
    """x [..., in] @ kernel_t [out, in].T, for a CPU and no more than some dozens of rows.

    There XLA multiplies a tall matrix by a narrow one in half the time that it takes for the same
    product transposed, which it prefers where nothing keeps it from it.
    """
    keep = jax.lax.optimization_barrier
    columns = keep(x.reshape(-1, x.shape[-1]).T)
    product = jnp.matmul(kernel_t, columns, preferred_element_type=dtype)
    return keep(product).T.reshape(*x.shape[:-1], -1)


class Dense(nn.Module):
    """x @ kernel (+ bias), plus (x @ lora_a) @ lora_b when its params hold a low-rank pair; the
    kernel is float, or int8 with a `kernel_max`.

    The pair is never created here: `lora.add` puts it beside the kernels it is asked to adapt, and
    `lora.merge` folds it away (LoRA, arXiv 2106.09685).
    """

    features: int
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        if self.has_variable("params", "kernel_t"):  # see llm.for_steps
            kernel_t = self.get_variable("params", "kernel_t")
            y = matmul_few_rows(x, kernel_t.astype(self.dtype))
        else:
            kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
            y = x @ kernel.astype(self.dtype)
        if self.has_variable("params", "kernel_max"):  # see quantize
            scale = self.get_variable("params", "kernel_max") / 127
            y = (y.astype(jnp.float32) * jnp.broadcast_to(scale, y.shape)).astype(self.dtype)
        if self.has_variable("params", "lora_a"):
            lora_a = self.get_variable("params", "lora_a").astype(self.dtype)
            lora_b = self.get_variable("params", "lora_b").astype(self.dtype)
            y += (x @ lora_a) @ lora_b
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y += jnp.broadcast_to(bias.astype(self.dtype), y.shape)
        return y


def rms(x: jax.Array, eps: float) -> jax.Array:
    """x over its root mean square along the last axis, float32 (arXiv 1910.07467)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) times (offset + scale); Gemma's offset is 1."""

    eps: float
    offset: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", init, (x.shape[-1],)).astype(jnp.float32)
        x = rms(x, self.eps)
        return (x * jnp.broadcast_to(self.offset + scale, x.shape)).astype(self.dtype)


def layer_norm(name: str, x: jax.Array, dtype: str) -> jax.Array:
    """LayerNorm over the last axis, by a submodule called `name` with a scale and a bias."""
    norm = nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)
    with jax.numpy_dtype_promotion("standard"):  # flax mixes dtypes: it computes in float32
        return norm(x)


class EncoderAttention(nn.Module):
    """Multi-head attention of x over `memory` (x itself when None); Whisper has no bias on k.

    length_B: valid positions of the memory. bias_BHLS: as in `attention`. packed: how the rows of x
    are packed, None: they are not.
    """

    num_heads: int
    dtype: str = "float32"
    attention: str = "xla"
    mesh: Mesh | None = None
    key_bias: bool = False

    @nn.compact
    def __call__(
        self,
        x_BLE: jax.Array,
        length_B: jax.Array,
        memory_BSE: jax.Array | None = None,
        bias_BHLS: jax.Array | None = None,
        packed: packing.Packed | None = None,
    ) -> jax.Array:
        memory_BSE = x_BLE if memory_BSE is None else memory_BSE
        width = x_BLE.shape[-1]

        def heads(name: str, x: jax.Array, use_bias: bool) -> jax.Array:
            y = Dense(width, use_bias, dtype=self.dtype, name=name)(x)
            return y.reshape(*y.shape[:2], self.num_heads, -1)

        q = heads("q", x_BLE, True)
        k = heads("k", memory_BSE, self.key_bias)
        v = heads("v", memory_BSE, True)
        scale = q.shape[-1] ** -0.5
        attend = functools.partial(
            attention,
            scale=scale,
            length_B=length_B,
            bias_BHLS=bias_BHLS,
            kernel=self.attention,
            mesh=self.mesh,
        )
        y = packing.apart(attend, packed)(q, k, v)
        return Dense(width, True, dtype=self.dtype, name="o")(y.reshape(x_BLE.shape))


class EncoderMLP(nn.Module):
    """Dense, activation, Dense, back to the width of x."""

    mlp_dim: int
    activation: str = "gelu"
    dtype: str = "float32"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = Dense(self.mlp_dim, self.use_bias, dtype=self.dtype, name="up")(x)
        y = ACTIVATIONS[self.activation](y)
        return Dense(x.shape[-1], self.use_bias, dtype=self.dtype, name="down")(y)


class EncoderBlock(nn.Module):
    """Pre-norm Transformer encoder block (Whisper's, arXiv 2212.04356). packed: as in
    `EncoderAttention`."""

    num_heads: int
    mlp_dim: int
    activation: str = "gelu"
    dtype: str = "float32"
    attention: str = "xla"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, x_BSE: jax.Array, length_B: jax.Array, packed: packing.Packed | None = None
    ) -> tuple[jax.Array, None]:
        norm = functools.partial(layer_norm, dtype=self.dtype)
        attend = EncoderAttention(
            self.num_heads, self.dtype, self.attention, self.mesh, name="attn"
        )
        mlp = EncoderMLP(self.mlp_dim, self.activation, self.dtype, name="mlp")
        spread = functools.partial(sharding.over_batch, mesh=self.mesh)
        x_BSE = spread(x_BSE + attend(norm("attn_norm", x_BSE), length_B, packed=packed))
        return spread(x_BSE + mlp(norm("mlp_norm", x_BSE))), None


# What the backward pass finds kept of each block beside its input; the rest is computed again.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # Products with weights, most of the work; attention and what is elementwise are not kept.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scanned(block: type[nn.Module], length: int, in_axes: tuple, remat: str) -> type[nn.Module]:
    """The block repeated `length` times under one scan: params stacked along a leading axis.

    remat: "none", or a policy of `REMAT`: less memory, more time.
    """
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=REMAT[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
    )
