"""The device mesh (data, fsdp, tensor) and which parameter is split over which of its axes."""

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # the batch dimension is split over both

# The first regex found in a parameter's path decides; optimizer state follows its parameter. Layers
# are stacked along axis 0, which stays whole. Kernels split their wide side over `tensor` (columns
# going in, rows coming out: one all-reduce a sublayer) and the other side over `fsdp`.
RULES = (
    (r"llm/embed/embedding$", P("tensor", "fsdp")),
    (r"llm/head/kernel$", P("fsdp", "tensor")),
    (r"layers/conv_in/kernel$", P(None, None, "fsdp", "tensor")),
    (r"layers/conv_out/kernel$", P(None, None, "tensor", "fsdp")),
    (
        r"layers/(\w+/)?((attn|cross)/[qkv]|mlp\d?/(gate|up)|\w+_in)/kernel$",
        P(None, "fsdp", "tensor"),
    ),
    (r"layers/(\w+/)?((attn|cross)/o|mlp\d?/down|\w+_out)/kernel$", P(None, "tensor", "fsdp")),
    (r"layers/\w+/delta/(qkv|gate)/kernel$", P(None, "fsdp", "tensor")),
    (r"layers/\w+/delta/(beta|decay)/kernel$", P(None, "fsdp", None)),
    (r"layers/\w+/delta/o/kernel$", P(None, "tensor", "fsdp")),
    (r"layers/(depthwise/kernel|\w+/delta/(conv|rate|rate_bias))$", P()),
    (r"layers/.*/lora_a$", P(None, "fsdp", None)),
    (r"layers/.*/lora_b$", P(None, None, "fsdp")),
    # Small beside what they meet.
    (r"encoder/((conv|depthwise|pointwise)\d+/kernel|positions/(embedding|weight_[gv]))$", P()),
    (r"encoder/relative/embedding$|layers/relative_gate/(const|linear/kernel)$", P()),
    (r"layers/(attn/(distance/embedding|\w+_bias)|depthwise_norm/(mean|variance))$", P()),
    (r"layers/attn/relative/kernel$", P(None, "fsdp", "tensor")),
    (r"encoder/projection/kernel$", P(None, "fsdp")),
    (r"adapter/(in|conv)/kernel$", P()),
    (r"adapter/out/kernel$", P(None, "fsdp")),
    (r"adapter/queries$", P()),
    (r"/(bias|scale|scalar|kernel_max)$", P()),
    (r"ctc/", P()),
)


def batch_shards(sizes) -> int:
    """Into how many parts a mesh of these sizes, {axis: devices}, splits the rows of a batch."""
    return math.prod(sizes[axis] for axis in BATCH[0])


def mesh_sizes(config, num_devices: int) -> dict[str, int]:
    """Devices along every axis; one axis of `config.mesh` may be -1: what the others leave.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or the batch does not divide.
    """
    sizes = {axis: config.mesh[axis] for axis in AXES}
    for axis in AXES:
        if sizes[axis] == -1:
            others = math.prod(size for size in sizes.values() if size != -1)
            sizes[axis] = max(num_devices // others, 1)
    named = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"mesh: {named} needs {math.prod(sizes.values())} devices, {num_devices} are there; "
            "set config.mesh (one axis may be -1)"
        )
    rows = batch_shards(sizes)
    if config.batch_size % (rows * config.accumulation):
        times = f" times accumulation={config.accumulation}" if config.accumulation > 1 else ""
        raise ValueError(
            f"mesh: batch_size={config.batch_size} does not divide over {rows} devices{times} "
            f"({named}); use a multiple of {rows * config.accumulation}"
        )
    return sizes


def make_mesh(config, devices=None) -> Mesh:
    """The mesh of all devices that `config.mesh` asks for; several TPU slices, which only the data
    centre's network joins, lie along the data axis.

    Raises:
      ValueError: as `mesh_sizes`, or the slices do not divide the data axis.
    """
    devices = jax.devices() if devices is None else devices
    sizes, slices = mesh_sizes(config, len(devices)), _num_slices(devices)
    if sizes["data"] % slices:
        raise ValueError(
            f"mesh: data={sizes['data']} is not a multiple of the {slices} slices; set mesh.data="
            f"{slices}, so that only gradients cross the slower network between them"
        )
    return _mesh(sizes, devices)


def mesh_at_hand(config, params, devices=None) -> Mesh:
    """The mesh that `config.mesh` asks for as far as it goes with the devices that are there, to
    evaluate on any number of them what was trained on another.

    `tensor` and `fsdp` stay, or become their largest common divisor with the devices of a slice;
    -1 becomes the largest that divides what it splits. The other devices lie along `data`.

    Args:
      params: all parameters, arrays or ShapeDtypeStructs.
    """
    devices = jax.devices() if devices is None else devices
    each = len(devices) // _num_slices(devices)
    common = lambda axis, count: math.gcd(config.mesh[axis], count)
    tensor = 1 if config.mesh.tensor == -1 else common("tensor", each)
    each //= tensor
    if config.mesh.fsdp != -1:
        choices = [common("fsdp", each)]
    else:
        each //= common("data", each)
        choices = [size for size in range(each, 0, -1) if each % size == 0]
    for fsdp in choices:
        data = len(devices) // (fsdp * tensor)
        mesh = _mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, devices)
        try:
            tree_shardings(params, mesh)
            break
        except ValueError:
            if fsdp == choices[-1]:
                raise
    return mesh


def _num_slices(devices) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def _mesh(sizes, devices) -> Mesh:
    slices = _num_slices(devices)
    within = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    # Axes may take a part of a torus axis: 16 devices of an 8x8 slice, say.
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        grid = mesh_utils.create_device_mesh(within, devices, **split)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, **split)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def data_mesh() -> Mesh:
    """All devices along the data axis: for evaluation, where any number of them will do."""
    return jax.make_mesh((jax.device_count(), 1, 1), AXES, (AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, BATCH)


def over_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """x with its rows spread as those of a batch (if they divide), and nothing else split.

    XLA has to be told: it may otherwise keep all rows on every device and split activations along
    their width, because the weights that meet them are split so.
    """
    if mesh is None or x.shape[0] % batch_shards(mesh.shape):
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def to_weights(x: jax.Array, mesh: Mesh | None, axis: str) -> jax.Array:
    """x of single tokens, [B, ..., width], split as the kernels that it meets are: its width over
    `axis`, its rows over `data` alone (where these divide). So it moves, and they stay; with rows
    over `fsdp`, too, all weights would be gathered for every token.
    """
    if mesh is None:
        return x
    split = lambda size, axis: axis if size % mesh.shape[axis] == 0 else None
    spec = P(split(x.shape[0], "data"), *[None] * (x.ndim - 2), split(x.shape[-1], axis))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def cache_sharding(shape, mesh: Mesh) -> NamedSharding:
    """Of keys or values [layers, B, slots, K, head_dim], or what linear layers keep: rows as those
    of a batch, and heads over `tensor`, where these divide."""
    rows = BATCH[0] if shape[1] % batch_shards(mesh.shape) == 0 else None
    heads = "tensor" if shape[3] % mesh.shape["tensor"] == 0 else None
    return NamedSharding(mesh, P(None, rows, None, heads))


def gather_vocabulary(params, mesh: Mesh | None):
    """Params with the LLM's embedding and head, if they are there, gathered from the fsdp axis.

    Their products come a few positions at a time (`losses.common`), and XLA would gather
    them anew for each. For what is frozen: gradients would have to be summed as often.
    """
    if mesh is None:
        return params

    def gather(path, x):
        name = _name(path)
        if not re.search(r"^llm/(embed/embedding|head/kernel)$", name):
            return x
        kept = P(*(axis if axis == "tensor" else None for axis in _spec(name, RULES)))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, kept))

    return jax.tree_util.tree_map_with_path(gather, params)


def tree_shardings(tree, mesh: Mesh, rules=RULES):
    """NamedSharding of every leaf of `tree` (params, or a state holding them), by the first regex
    in `rules` ((regex, PartitionSpec), ...) that matches its path. Scalars are replicated.

    Raises:
      ValueError: leaves that no rule names, or that an axis does not divide; all are listed.
    """
    problems = []

    def of_leaf(path, leaf):
        if leaf.ndim == 0:
            return NamedSharding(mesh, P())
        name = _name(path)
        spec = _spec(name, rules)
        if spec is None:
            problems.append(f"{name} {leaf.shape}: no sharding rule names it")
            return None
        for dim, axes in enumerate(spec):
            size = math.prod(mesh.shape[axis] for axis in _names(axes))
            if dim >= leaf.ndim or leaf.shape[dim] % size:
                problems.append(f"{name} {leaf.shape}: {spec} does not divide dimension {dim}")
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(of_leaf, tree)
    if problems:
        raise ValueError("sharding:\n  " + "\n  ".join(sorted(set(problems))))
    return shardings


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch -> global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
    }


def to_host(tree):
    """Global arrays -> numpy, whole, on every host."""
    return multihost_utils.process_allgather(tree, tiled=True)


def _spec(name: str, rules) -> P | None:
    return next((spec for regex, spec in rules if re.search(regex, name)), None)


def _name(path) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _names(axes) -> tuple[str, ...]:
    if axes is None:
        return ()
    return axes if isinstance(axes, tuple) else (axes,)
