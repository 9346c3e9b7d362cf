"""A decoder-only LLM: Llama, Mistral, Qwen, Gemma, Phi, OLMo, Granite and SmolLM, told apart by
configuration.

All layers are one block under a scan (`block`), or blocks of several shapes in turn (`mixed`).

Sequences are right-padded and causal, so padding needs no mask; it only has to be finite.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh

from otreg_jax import packing, sharding
from otreg_jax.models import layers, mixed
from otreg_jax.models.block import (
    Block,
    LLMConfig,
    layer_kinds,
    masks,
    rope_tables,
    shape_config,
    shape_names,
)

Cache = dict[str, Any]  # {"k", "v"}: [num_layers, B, slots, K, head_dim], or that of each shape


class LLM(nn.Module):
    """Decoder-only language model. Call it on tokens, or use embed → hidden → logits.

    Params: embed/embedding [V, D], layers/… stacked over the layers (of each shape, see `mixed`),
    norm/scale [D] and, for an untied head, head/kernel [D, V]. `mesh`: what its activations are
    spread over.
    """

    config: LLMConfig
    mesh: Mesh | None = None

    def setup(self):
        c = self.config
        embed_init = nn.initializers.normal(c.embed_dim**-0.5)
        self.token_embed = nn.Embed(
            c.vocab_size, c.embed_dim, embedding_init=embed_init, name="embed"
        )
        if c.num_layers and shape_names(c):
            self.layers = mixed.MixedLayers(c, self.mesh)
        elif c.num_layers:
            # (layer, kind, is_tap) are per layer; (tables, positions, packed) the same for all.
            axes = (0, 0, 0, nn.broadcast, nn.broadcast, nn.broadcast)
            self.layers = layers.scanned(Block, c.num_layers, axes, c.remat)(c, self.mesh)
        self.norm = layers.RMSNorm(c.norm_eps, c.norm_offset, c.dtype)
        if not c.tied_head:
            self.head = layers.Dense(c.vocab_size, dtype=c.dtype)

    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        """int32 tokens [B, L] to float32 next-token logits [B, L, V]."""
        x_BLD, _ = self.hidden(self.embed(tokens_BL))
        return self.logits(x_BLD)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Rows of the embedding table as the first layer receives them (Gemma's scale included)."""
        x_BTD = self.token_embed(tokens_BT).astype(self.config.dtype)
        if x_BTD.ndim == 3:  # not a prompt, which is the same for all rows
            x_BTD = sharding.over_batch(x_BTD, self.mesh)
        return x_BTD * jnp.asarray(self.config.embed_scale, x_BTD.dtype)

    def hidden(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array | None = None,
        cache: Cache | None = None,
        length_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Through the layers, before the final norm; [B, L, D] and the updated cache.

        A position attends to the positions before it in the sequence; `positions` (default 0, 1, …)
        only rotate. With a cache, keys and values are written to its slots `positions`, and where
        the sequence is a single position, it attends to the slots up to its own: prefill (a prompt
        at positions 0, 1, …), then steps of examples at different positions. length_B: valid
        positions of the prefill, all when None; what a linear layer keeps holds no more of it.
        """
        x_BLD, _, cache = self._run(x_BLD, positions_BL, cache, (), length_B)
        return x_BLD, cache

    def hidden_and_taps(
        self, x_BLD: jax.Array, taps: tuple[int, ...], packed: packing.Packed | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """`hidden` without a cache, and the hidden states after the first `tap` ≥ 1 layers, for
        each of `taps`; with `packed`, x and all of them are packed rows [R, W, D].

        The layers stay one scan: running them as two `sublayers` would copy their weights.
        """
        for tap in taps:
            if not 1 <= tap <= self.config.num_layers:
                raise ValueError(f"layer {tap}: the LLM has layers 1 to {self.config.num_layers}")
        positions_RW = None if packed is None else packed.position_RW
        return self._run(x_BLD, positions_RW, None, taps, packed=packed)[:2]

    def _run(self, x_BLD, positions_BL, cache, taps, length_B=None, packed=None):
        c = self.config
        x_BLD = x_BLD.astype(c.dtype)
        if not c.num_layers:
            return x_BLD, (), cache
        L = x_BLD.shape[1] if packed is None else packed.slot_RkL.shape[2]
        positions_BL = jnp.arange(L)[None] if positions_BL is None else positions_BL
        slots = L if cache is None else max(L, _slots(cache))
        scaling = c.rope_scaling
        if scaling and scaling.kind == "longrope" and slots > scaling.original_length:
            raise ValueError(
                f"{slots} positions: this LLM rotates otherwise beyond {scaling.original_length} "
                "(longrope), which is not computed"
            )
        is_step = cache is not None and L == 1

        def tables_of(config: LLMConfig):
            seen = masks(config, positions_BL, _slots(cache)) if is_step else None
            if config.delta:
                valid = None if length_B is None else positions_BL < length_B[:, None]
                return valid, None, seen
            return (*rope_tables(config, positions_BL), seen)

        carry = (x_BLD, tuple(jnp.zeros_like(x_BLD) for _ in taps), cache)
        is_tap = jnp.arange(1, c.num_layers + 1)[:, None] == jnp.array(taps)[None] if taps else None
        if names := shape_names(c):
            args = (
                is_tap,
                {name: tables_of(shape_config(c, name)) for name in set(names)},
                positions_BL,
                packed,
            )
            if self.is_initializing():
                return self.layers(carry, *args)
            return mixed.run(c, self.mesh, self.variables["params"]["layers"], carry, *args)
        tables, kinds = tables_of(c), layer_kinds(c)
        if self._is_for_steps():
            block = Block(c, self.mesh, parent=None)
            for layer, params in enumerate(self.variables["params"]["layers"]):
                args = carry, layer, kinds[layer], None, tables, positions_BL, packed
                carry, _ = block.apply({"params": params}, *args)
            return carry
        index = jnp.arange(c.num_layers)
        args = jnp.asarray(kinds), is_tap, tables, positions_BL, packed
        return self.layers(carry, index, *args)[0]

    def _is_for_steps(self) -> bool:
        params = self.variables.get("params", {})
        return isinstance(params.get("layers"), tuple)

    def logits(self, x_D: jax.Array) -> jax.Array:
        """Final norm, head and soft cap on hidden states [..., D]; float32 [..., V]."""
        c = self.config
        x_D = self.norm(x_D)
        if c.tied_head:
            kernel_VD = self.token_embed.embedding.astype(c.dtype)
            if self._is_for_steps():
                logits_V = layers.matmul_few_rows(x_D, kernel_VD, jnp.float32)
            else:
                logits_V = jnp.matmul(x_D, kernel_VD.T, preferred_element_type=jnp.float32)
        else:
            logits_V = self.head(x_D).astype(jnp.float32)
        if c.logit_divisor != 1:
            logits_V /= c.logit_divisor
        if c.logit_softcap is not None:
            logits_V = c.logit_softcap * jnp.tanh(logits_V / c.logit_softcap)
        return logits_V


def init_cache(config: LLMConfig, batch: int, length: int, dtype: Any = None) -> Cache:
    """An empty cache of `length` slots (slot = position) in `dtype`, or in the compute dtype."""
    names = shape_names(config)
    if not names:
        return _empty(config, config.num_layers, batch, length, dtype)
    return {
        name: _empty(shape_config(config, name), names.count(name), batch, length, dtype)
        for name in set(names)
    }


def _empty(config: LLMConfig, count: int, batch: int, length: int, dtype: Any) -> Cache:
    dtype = dtype or config.dtype
    if h := config.delta:
        channels = 2 * h.num_key_heads * h.key_dim + h.num_value_heads * h.value_dim
        state = (count, batch, h.key_dim, h.num_value_heads, h.value_dim)
        conv = (count, batch, h.conv_width - 1, channels)
        return {"conv": jnp.zeros(conv, dtype), "state": jnp.zeros(state, jnp.float32)}
    shape = (count, batch, length, config.num_kv_heads, config.head_dim)
    return {name: jnp.zeros(shape, dtype) for name in ("k", "v")}


def _slots(cache: Cache) -> int:
    """The positions there is room for; without attention there is no limit, and no need of one."""
    kept = [cache, *cache.values()] if "k" not in cache else [cache]
    return next((one["k"].shape[2] for one in kept if "k" in one), 1)


def for_steps(config: LLMConfig, params: dict) -> dict:
    """Params as one-token steps on a CPU read them fastest; `hidden` and `logits` take them too.

    The layers become a tuple, since a scan copies each layer's slice of stacked weights at every
    step; kernels are transposed for `layers.matmul_few_rows`, to "kernel_t".
    """

    def transposed(tree):
        flat = traverse_util.flatten_dict(tree)
        for path in [path for path in flat if path[-1] == "kernel"]:
            flat[*path[:-1], "kernel_t"] = flat.pop(path).T
        return traverse_util.unflatten_dict(flat)

    if shape_names(config):
        layer = functools.partial(mixed.layer_of, config, params["layers"])
    else:
        layer = lambda i: jax.tree.map(lambda leaf: leaf[i], params["layers"])
    stack = tuple(transposed(layer(i)) for i in range(config.num_layers))
    params = {**params, "layers": stack}
    if "head" in params:
        params["head"] = transposed(params["head"])
    return params


def sublayers(model: LLM, params: dict, start: int, stop: int) -> tuple[LLM, dict]:
    """Layers start … stop-1 as a model of their own, with embedding, norm and head kept."""
    local = model.config.local_layers
    config = dataclasses.replace(
        model.config,
        num_layers=stop - start,
        local_layers=None if local is None else local[start:stop],
    )
    return LLM(config, model.mesh), {
        **params,
        "layers": between(model.config, params["layers"], start, stop),
    }


def between(config: LLMConfig, stacked: dict, start: int, stop: int) -> dict:
    """Of an LLM's params/layers those of layers start … stop-1."""
    if shape_names(config):
        return mixed.between(config, stacked, start, stop)
    return jax.tree.map(lambda leaf: leaf[start:stop], stacked)
