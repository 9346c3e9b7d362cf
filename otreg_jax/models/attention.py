"""Attention over whole sequences and over a cache, and the choice of what computes it."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from otreg_jax import sharding

# What computes attention over whole sequences: cudnn is flash attention on GPUs, splash on TPUs,
# rows is that of "xla" on CPUs, an example at a time.
KERNELS = ("auto", "xla", "cudnn", "splash", "rows")
PARTS = 4  # of a sequence, in "rows": an example of up to one, two, three parts computes no more
SHORTEST = 96  # positions below which "rows" gains nothing (two CPU cores)


def choose_kernel(
    name: str,
    mesh: Mesh | None,
    *,
    dtype: str,
    head_dim: int,
    softcap: float | None = None,
    biased: bool = False,
) -> str:
    """The kernel that `name`, one of `KERNELS`, means on the devices of `mesh` (None: the default
    one): "auto" is the flash attention of the platform where it computes what is asked, else "xla".
    biased: something is added to the scores.

    Raises:
      ValueError: the kernel does not run there, or cannot compute this.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    is_nvidia = device.device_kind.startswith("NVIDIA")
    capability = float(device.compute_capability) if is_nvidia else 0
    widest = 256 if capability >= 9 else 128
    unbiased = "adds nothing to attention scores, as this encoder (of relative positions) does"
    limits = {
        "cudnn": [
            (capability >= 8, f"needs an NVIDIA GPU since Ampere, the device is {device}"),
            (dtype == "bfloat16", f"computes in bfloat16 only, compute_dtype is {dtype}"),
            (not softcap, "does not cap attention scores, as this model (Gemma 2) does"),
            (not biased, unbiased),
            (
                head_dim % 8 == 0 and head_dim <= widest,
                f"needs heads of a multiple of 8 up to {widest} dimensions, these have {head_dim}",
            ),
        ],
        "splash": [
            (device.platform == "tpu", f"needs a TPU, the device is {device}"),
            (not biased, unbiased),
        ],
        "rows": [
            (device.platform == "cpu", f"is for CPUs, the device is {device}"),
            (not biased, unbiased),
        ],
        "xla": [],
    }
    if name == "auto":
        name = next(name for name, needs in limits.items() if all(good for good, _ in needs))
    if name not in limits:
        raise ValueError(f"attention={name!r}: choose from {', '.join(KERNELS)}")
    problems = [problem for good, problem in limits[name] if not good]
    if problems:
        raise ValueError(f"attention={name!r} {'; '.join(problems)}. attention='auto' always works")
    return name


def length_mask(length_B: jax.Array, size: int) -> jax.Array:
    """bool [B, size], true at positions below each length."""
    return jnp.arange(size)[None] < length_B[:, None]


def attention(
    q_BLHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    mask_BLS: jax.Array | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    window: int | None = None,
    length_B: jax.Array | None = None,
    softcap: float | None = None,
    bias_BHLS: jax.Array | None = None,
    kernel: str = "xla",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Grouped-query attention; float32 softmax; [B, L, H, d] in the dtype of q.

    Args:
      mask_BLS: true where position l may attend to slot s; "xla" only, and then all there is.
      is_causal: position l attends to l and what is before it.
      window: with is_causal, to the last so many only, its own included.
      length_B: int32, slots from there on are padding; what padding attends to is undefined. With
        is_causal nothing else sees them: only "rows" looks at it then.
      softcap: scores become softcap · tanh(scores / softcap) before the mask (Gemma 2, 2408.00118).
      bias_BHLS: added to the scaled scores; "xla" only, without softcap.
      kernel: one of `KERNELS` but "auto"; see `choose_kernel`.
      mesh: what batch and heads are split over; XLA cannot split a Pallas kernel by itself.
    """
    options = dict(scale=scale, is_causal=is_causal, window=window, softcap=softcap)
    if kernel == "rows" and k_BSKd.shape[1] >= SHORTEST:
        attend = functools.partial(_row_attention, tuple(options.items()))
        return _per_shard(attend, mesh, q_BLHd, k_BSKd, v_BSKd, length_B)
    if is_causal:
        length_B = None
    if kernel == "splash":
        attend = functools.partial(_splash_attention, **options)
        return _per_shard(attend, mesh, q_BLHd, k_BSKd, v_BSKd, length_B)
    if kernel == "cudnn":
        return _cudnn_attention(q_BLHd, k_BSKd, v_BSKd, length_B, is_causal, window, scale)
    if softcap is None:
        with jax.numpy_dtype_promotion("standard"):  # it mixes dtypes: softmax is in float32
            return jax.nn.dot_product_attention(
                q_BLHd,
                k_BSKd,
                v_BSKd,
                bias=bias_BHLS,
                mask=None if mask_BLS is None else mask_BLS[:, None],
                scale=scale,
                is_causal=is_causal,
                key_value_seq_lengths=length_B,
                local_window_size=None if window is None else (window - 1, 0),
                implementation="xla",
            )
    B, L, H, d = q_BLHd.shape
    S, K = k_BSKd.shape[1:3]
    if mask_BLS is None:
        behind_LS = jnp.arange(L)[:, None] - jnp.arange(S)[None]
        mask_BLS = jnp.ones((1, L, S), bool)
        if is_causal:
            mask_BLS &= ((behind_LS >= 0) & (behind_LS < (window or S)))[None]
        if length_B is not None:
            mask_BLS &= length_mask(length_B, S)[:, None]
    q_BLKGd = q_BLHd.reshape(B, L, K, H // K, d)
    scores = jnp.einsum("BLKGd,BSKd->BKGLS", q_BLKGd, k_BSKd, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores * scale / softcap)
    scores = jnp.where(mask_BLS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKd.dtype)
    return jnp.einsum("BKGLS,BSKd->BLKGd", weights, v_BSKd).reshape(B, L, H, d)


def _cudnn_attention(q_BLHd, k_BSKd, v_BSKd, length_B, is_causal, window, scale):
    """By cuDNN, in sequences padded to even lengths: it has no gradient for odd ones."""
    L, S = q_BLHd.shape[1], k_BSKd.shape[1]
    if length_B is None and not is_causal and S % 2:
        length_B = jnp.full(len(k_BSKd), S, jnp.int32)
    if length_B is not None:
        length_B = jnp.maximum(length_B, 1)  # a softmax over nothing is not defined
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
    return jax.nn.dot_product_attention(
        even(q_BLHd),
        even(k_BSKd),
        even(v_BSKd),
        scale=scale,
        is_causal=is_causal,
        key_value_seq_lengths=length_B,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )[:, :L]


def _splash_attention(q_BLHd, k_BLKd, v_BLKd, length_B, *, scale, is_causal, window, softcap):
    """Self-attention by JAX's splash attention, in sequences padded to whole blocks."""
    L, H = q_BLHd.shape[1:3]
    size = -(-L // 128) * 128
    block = max(b for b in (128, 256, 384, 512) if size % b == 0)
    if window is not None:
        mask = splash.LocalMask((size, size), (window - 1, 0), offset=0)
    else:
        mask = (splash.CausalMask if is_causal else splash.FullMask)((size, size))
    segments = None
    if length_B is not None or not is_causal:  # valid positions see valid ones, padding padding
        length_B = jnp.full(len(q_BLHd), L) if length_B is None else length_B
        valid = length_mask(length_B, size).astype(jnp.int32)
        segments = splash.SegmentIds(valid, valid)
    attend = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * H),
        block_sizes=splash.BlockSizes(*[block] * 8),
        attn_logits_soft_cap=softcap,
    )
    padded = lambda x: jnp.pad(x, ((0, 0), (0, size - L), (0, 0), (0, 0))).swapaxes(1, 2)
    out_BHLd = jax.vmap(attend)(padded(q_BLHd * scale), padded(k_BLKd), padded(v_BLKd), segments)
    return out_BHLd.swapaxes(1, 2)[:, :L]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_attention(options, q_BLHd, k_BSKd, v_BSKd, length_B):
    """Attention of one example after another, each cut after the last of PARTS that it reaches
    into: the scores of one fit the cache, those of a batch do not. The backward pass makes them
    again, so none are kept. options: the items of those of `attention`."""
    return _by_row(functools.partial(_attend, options), length_B, q_BLHd, k_BSKd, v_BSKd)


def _row_attention_fwd(options, *inputs):
    return _row_attention(options, *inputs), inputs


def _row_attention_bwd(options, inputs, gradient_BLHd):
    def back(length, gradient, q, k, v):
        return jax.vjp(functools.partial(_attend, options, length), q, k, v)[1](gradient)

    *qkv, length_B = inputs
    return *_by_row(back, length_B, gradient_BLHd, *qkv), None


_row_attention.defvjp(_row_attention_fwd, _row_attention_bwd)


def _attend(options, length, q_LHd, k_SKd, v_SKd):
    length_B = None if length is None else length[None]
    return attention(q_LHd[None], k_SKd[None], v_SKd[None], length_B=length_B, **dict(options))[0]


def _by_row(fn, length_B, *xs_BLHd):
    """fn(length, *xs) of each example, cut to parts of the sequences; zeros where it is cut."""
    L = xs_BLHd[0].shape[1]
    if length_B is None or any(x.shape[1] != L for x in xs_BLHd):
        return jax.lax.map(lambda inputs: fn(*inputs), (length_B, *xs_BLHd))

    def of_part(size, length, *xs):
        found = fn(length, *(x[:size] for x in xs))
        return jax.tree.map(lambda x: jnp.pad(x, ((0, L - size), (0, 0), (0, 0))), found)

    sizes = [-(-L * part // PARTS) for part in range(1, PARTS + 1)]
    cut = [functools.partial(of_part, size) for size in sizes]

    def one(inputs):
        length, *xs = inputs
        reached = jnp.searchsorted(jnp.array(sizes), length)  # the first that is no shorter
        return jax.lax.switch(reached, cut, length, *xs)

    return jax.lax.map(one, (length_B, *xs_BLHd))


def _per_shard(attend, mesh, q_BLHd, k_BSKd, v_BSKd, length_B):
    """`attend` by every device on its rows and heads; on all of them where they do not divide."""
    if mesh is None or mesh.size == 1:
        return attend(q_BLHd, k_BSKd, v_BSKd, length_B)
    rows = sharding.BATCH[0] if len(q_BLHd) % sharding.batch_shards(mesh.shape) == 0 else None
    heads = "tensor" if k_BSKd.shape[2] % mesh.shape["tensor"] == 0 else None
    split = P(rows, None, heads)
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(split, split, split, P(rows)),
        out_specs=split,
        check_vma=False,
    )(q_BLHd, k_BSKd, v_BSKd, length_B)
