"""Layers of several shapes in one LLM, in the order of its layers.

Params are {shape: those of a block, stacked over the layers of that shape}, a cache likewise; the
names of the shapes are `block.shape_names`. Compiled once are the layers up to where the order
begins again (five sliding ones and a full one in Gemma 4); a scan runs over the repetitions.
"""

import collections
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from otreg_jax.models import layers
from otreg_jax.models.block import Block, LLMConfig, layer_kinds, shape_config, shape_names


class MixedLayers(nn.Module):
    """Makes the params; `run` computes with them."""

    config: LLMConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, carry, is_tap, tables, positions_BL, packed):
        axes = (0, 0, 0, nn.broadcast, nn.broadcast, nn.broadcast)
        for shape, count in collections.Counter(shape_names(self.config)).items():
            config, (x_BLD, tapped, _) = shape_config(self.config, shape), carry
            index = jnp.arange(count)
            block = layers.scanned(Block, count, axes, "none")(config, self.mesh, name=shape)
            shared = None if is_tap is None else is_tap[:count]
            kinds = jnp.asarray(layer_kinds(config)[:count])
            args = kinds, shared, tables[shape], positions_BL, packed
            block((x_BLD, tapped, None), index, *args)
        return carry


def run(config: LLMConfig, mesh: Mesh | None, params, carry, is_tap, tables, positions_BL, packed):
    """The carry of `Block`, (x, tapped, cache), after all layers.

    params: as above, or a tuple of the layers' (`llm.for_steps`). is_tap: [num_layers, taps] or
    None. tables: what `Block` takes by that name, of each shape. packed: as it takes it.
    """
    names = shape_names(config)
    blocks = {shape: Block(shape_config(config, shape), mesh, parent=None) for shape in set(names)}
    kinds = {shape: layer_kinds(block.config)[0] for shape, block in blocks.items()}

    def apply(shape: str, params, index, is_tap, carry):
        x_BLD, tapped, cache = carry
        args = index, kinds[shape], is_tap, tables[shape], positions_BL, packed
        own = None if cache is None else cache[shape]
        (x_BLD, tapped, own), _ = blocks[shape].apply(
            {"params": params}, (x_BLD, tapped, own), *args
        )
        return x_BLD, tapped, None if cache is None else cache | {shape: own}

    if config.remat != "none":
        policy = layers.REMAT[config.remat]
        apply = jax.checkpoint(apply, prevent_cse=False, policy=policy, static_argnums=0)
    if isinstance(params, tuple):
        for i, (shape, one) in enumerate(zip(names, params, strict=True)):
            carry = apply(shape, one, names[:i].count(shape), None, carry)
        return carry
    pattern = names[: _period(names)]
    repeats = len(names) // len(pattern)
    split = lambda tree: jax.tree.map(lambda x: x.reshape(repeats, -1, *x.shape[1:]), tree)

    def step(carry, xs):
        repeat, params, is_tap = xs
        for i, shape in enumerate(pattern):
            rank = pattern[:i].count(shape)
            one = jax.tree.map(lambda x, rank=rank: x[rank], params[shape])
            tap = None if is_tap is None else is_tap[i]
            carry = apply(shape, one, repeat * pattern.count(shape) + rank, tap, carry)
        return carry, None

    params = {shape: split(params[shape]) for shape in set(names)}
    return jax.lax.scan(step, carry, (jnp.arange(repeats), params, split(is_tap)))[0]


def _period(names: tuple[str, ...]) -> int:
    """After how many layers the order of the shapes begins again, for a whole number of times."""
    n = len(names)
    return next(p for p in range(1, n + 1) if n % p == 0 and names == names[:p] * (n // p))


def layer_of(config: LLMConfig, params: dict, layer: int) -> Any:
    """The params of one layer."""
    names = shape_names(config)
    index = names[:layer].count(names[layer])
    return jax.tree.map(lambda leaf: leaf[index], params[names[layer]])


def between(config: LLMConfig, params: dict, start: int, stop: int) -> dict:
    """The params of layers start … stop-1, as stacked as before."""
    names, parts = shape_names(config), {}
    for shape, stacked in params.items():
        first, last = names[:start].count(shape), names[:stop].count(shape)
        parts[shape] = jax.tree.map(lambda leaf, a=first, b=last: leaf[a:b], stacked)
    return parts
