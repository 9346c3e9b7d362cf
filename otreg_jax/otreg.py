"""Optimal Transport Regularization (OTReg): the method, in one file to be read in one sitting.

For one utterance with speech embeddings x_s (adapter outputs, s < S) and transcript embeddings y_t
(t < T), OTReg (arXiv 2508.08131) finds the entropic optimal transport plan between the two sets and
charges its cost:

    cost        C_st = 1 - cos(x_s, y_t) + gamma * (s/(S-1) - t/(T-1))^2                     (1)
    plan        P    = argmin_P <P, C> - epsilon * H(P)   with marginals a (speech), b (text)   (2)
    loss             = < stop_gradient(P), 1 - cos(x_s, y_t) >                                (3)

(2) is solved by Sinkhorn's algorithm (Cuturi 2013) with a fixed number of iterations, so that every
step of a sharded training run executes the same program. At convergence (3) has the gradient of the
regularized optimal value of (2) (envelope theorem), hence nothing is differentiated through (2).

    >>> out = regularizer(speech, text, speech_mask, text_mask, epsilon=0.1, num_iters=50)
    >>> loss = cross_entropy + weight * out.loss

Shape suffixes: B batch, S speech positions, T transcript positions, D embedding width.
This file needs jax alone; the other solvers are files of their own, `sinkhorn/` beside it.
The paper publishes neither epsilon, gamma, the marginals nor the layer: all are arguments here.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

NUM_DIRECTIONS = 3  # principal directions of the text vectors that center="pcs" projects out
MIN_MASS = 0.01  # of the largest; less would make the scalings of Sinkhorn large for nothing


class OTReg(NamedTuple):
    """What `regularizer` returns: loss (), plan [B, S, T] and metrics {name: ()}, all float32."""

    loss: jax.Array
    plan: jax.Array
    metrics: dict[str, jax.Array]


class Centering(NamedTuple):
    """A mean vector [D] and orthonormal directions [N, D] to remove from speech and text alike."""

    mean_D: jax.Array
    directions_ND: jax.Array


def regularizer(
    speech_BSD: jax.Array,
    text_BTD: jax.Array,
    speech_mask_BS: jax.Array,
    text_mask_BT: jax.Array,
    *,
    token_ids_BT: jax.Array | None = None,
    text_set: str = "sequence",
    text_mass: str = "uniform",
    center: str | Centering = "none",
    cost: str = "cosine",
    speech_mass_BS: jax.Array | None = None,
    position_weight: float | jax.Array = 0.0,
    prior_BST: jax.Array | None = None,
    refine: Callable[..., jax.Array] | None = None,
    epsilon: float | jax.Array = 0.05,
    num_iters: int = 50,
    speech_tau: float = 1.0,
    plan: str = "ot",
    backend: str = "auto",
    batch_sharding: jax.sharding.NamedSharding | None = None,
    num_examples: jax.Array | None = None,
) -> OTReg:
    """OTReg loss of a batch: equations (1) to (3) of the module, averaged over the examples.

    Args:
      speech_BSD: speech embeddings, any float dtype. Gradients flow into these only.
      text_BTD: transcript embeddings, any float dtype; no gradient flows into them.
      speech_mask_BS: bool, True at valid positions. Padding may hold anything, NaN included.
      text_mask_BT: bool, likewise. An example without valid speech or text has loss 0, plan 0, and
        does not count in the mean.
      token_ids_BT: int, the transcript's token ids; needed by `text_set="unique"`.
      text_set: "sequence" (every token) or "unique" (the first occurrence of every token id).
      text_mass: "uniform", or "count": unique tokens weigh as often as they occur.
      center: "none"; "mean": subtract the mean text vector of the batch from both sides; "pcs":
        also project out the text's top principal directions; or a `Centering` computed elsewhere.
      cost: "cosine" (1 - cos) or "sqeuclidean" (|x - y|^2; scale `epsilon` with the embeddings).
      speech_mass_BS: how much a speech position has to give, relative to the others of its
        example; below MIN_MASS of the largest, nothing. By default all give the same.
      position_weight: gamma of (1); enters the plan only. May be traced (a schedule).
      prior_BST: a further cost that enters the plan only, such as those of `priors`.
      refine: the costs of a second and final plan, a function of the first plan's costs, that
        plan, speech_BSD and text_BTD (centred, 0 at padding), see `fused`. Not for "position".
      epsilon: absolute entropic regularization, in units of the cost. May be traced.
      num_iters: Sinkhorn iterations, always all of them. Watch `marginal_error`.
      speech_tau: rho in (0, 1]: 1 keeps the speech marginal; below 1 speech positions (silence,
        noise) may give up mass at a Kullback-Leibler price of epsilon * rho / (1 - rho).
      plan: "ot", or "position": the plan of the position term alone. It never looks at the
        embeddings: the control that shows what the similarity term adds.
      backend, batch_sharding: the solver, see `transport_plan`.
      num_examples: the number to divide the sum over examples by; by default those of this batch
        that have speech and text. Pass the global number when a batch comes in pieces.

    Returns:
      OTReg(loss, plan, metrics); metrics are means over the same examples: `transport_cost` (the
      loss), `marginal_error` (L1), `entropy` (of the plan, nats), `nearest_cosine` (mean over
      speech positions of the cosine to the nearest transcript vector; rises in useless runs too:
      it is no evidence of alignment).

    Raises:
      ValueError: an option is unknown, out of range, or lacks its input.
    """
    choices = dict(
        text_set=text_set, text_mass=text_mass, center=center, cost=cost, plan=plan, backend=backend
    )
    is_even = _is_number(position_weight) and position_weight <= 0 and prior_BST is None
    check_options(choices, epsilon, num_iters, speech_tau, token_ids_BT, is_even)
    if speech_mass_BS is None:
        speech_mass_BS = jnp.ones(speech_mask_BS.shape)
    speech_mask_BS = gives_mass(speech_mass_BS, speech_mask_BS)
    nonempty_B = speech_mask_BS.any(axis=1) & text_mask_BT.any(axis=1)
    speech_mask_BS = speech_mask_BS & nonempty_B[:, None]
    text_mask_BT = text_mask_BT & nonempty_B[:, None]

    # Padding leaves before any norm or product: 0 * NaN is NaN, in the backward pass as well.
    speech_BSD = jnp.where(speech_mask_BS[..., None], speech_BSD, 0)
    text_BTD = jax.lax.stop_gradient(jnp.where(text_mask_BT[..., None], text_BTD, 0))
    if isinstance(center, str):
        center = text_centering(text_BTD, text_mask_BT, center)
    if center is not None:
        speech_BSD = remove_common(speech_BSD, speech_mask_BS, center)
        text_BTD = remove_common(text_BTD, text_mask_BT, center)

    # Positions are those in the whole transcript, also when only unique tokens take part.
    position_BST = position_cost(speech_mask_BS, text_mask_BT)
    weight_BT = text_mask_BT.astype(jnp.float32)
    if text_set == "unique":
        first_BT, count_BT = first_occurrences(token_ids_BT, text_mask_BT)
        weight_BT = jnp.where(first_BT, count_BT if text_mass == "count" else 1.0, 0.0)
    a_BS = _normalize(jnp.where(speech_mask_BS, jax.lax.stop_gradient(speech_mass_BS), 0.0))
    b_BT = _normalize(weight_BT)

    cosine_BST, feature_cost_BST = pairwise_cost(speech_BSD, text_BTD, cost)
    plan_cost_BST = position_weight * position_BST
    if plan == "ot":
        plan_cost_BST = plan_cost_BST + feature_cost_BST
    if prior_BST is not None:
        plan_cost_BST = plan_cost_BST + prior_BST
    solve = functools.partial(
        transport_plan,
        a_BS=a_BS,
        b_BT=b_BT,
        epsilon=epsilon,
        num_iters=num_iters,
        speech_tau=speech_tau,
        backend=backend,
        batch_sharding=batch_sharding,
    )
    plan_BST = solve(plan_cost_BST)
    if refine is not None:
        plan_BST = solve(refine(plan_cost_BST, plan_BST, speech_BSD, text_BTD))

    if num_examples is None:
        num_examples = nonempty_B.sum()
    count = jnp.maximum(num_examples, 1).astype(jnp.float32)
    mean = lambda x_B: jnp.sum(x_B) / count
    loss = mean(jnp.sum(plan_BST * feature_cost_BST, axis=(1, 2)))
    metrics = jax.lax.stop_gradient(
        {
            "transport_cost": loss,
            "marginal_error": mean(_marginal_error(plan_BST, a_BS, b_BT, speech_tau)),
            "entropy": mean(-jax.scipy.special.xlogy(plan_BST, plan_BST).sum(axis=(1, 2))),
            "nearest_cosine": mean(_nearest_cosine(cosine_BST, speech_mask_BS, b_BT > 0)),
        }
    )
    return OTReg(loss, plan_BST, metrics)


def pairwise_cost(
    speech_BSD: jax.Array, text_BTD: jax.Array, cost: str = "cosine"
) -> tuple[jax.Array, jax.Array]:
    """Cosine [B, S, T] and feature cost [B, S, T] (float32) of every speech-text pair.

    The raw product is scaled by inverse norms afterwards: normalised copies of the embeddings would
    be the largest temporaries of the loss. Zero vectors have cosine 0 and gradient 0.
    """
    speech_sq_BS = jnp.sum(jnp.square(speech_BSD.astype(jnp.float32)), axis=-1)
    text_sq_BT = jnp.sum(jnp.square(text_BTD.astype(jnp.float32)), axis=-1)
    # HIGHEST: accelerators would otherwise run float32 products in bfloat16 or TF32.
    exact = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    dot_BST = jnp.einsum("bsd,btd->bst", speech_BSD, text_BTD, **exact)
    speech_scale_BS, text_scale_BT = inverse_root(speech_sq_BS), inverse_root(text_sq_BT)
    cosine_BST = dot_BST * speech_scale_BS[:, :, None] * text_scale_BT[:, None]
    if cost == "cosine":
        return cosine_BST, 1.0 - cosine_BST
    return cosine_BST, speech_sq_BS[:, :, None] + text_sq_BT[:, None] - 2.0 * dot_BST


def inverse_root(square: jax.Array) -> jax.Array:
    """1 / sqrt(square), 0 with gradient 0 at 0."""
    return jnp.where(square > 1e-12, jax.lax.rsqrt(jnp.maximum(square, 1e-12)), 0.0)


def position_cost(speech_mask_BS: jax.Array, text_mask_BT: jax.Array) -> jax.Array:
    """(s/(S_b - 1) - t/(T_b - 1))^2 [B, S, T] float32, S_b, T_b the valid lengths (1 is safe)."""

    def relative_position(mask):
        position = jnp.cumsum(mask, axis=1) - 1
        last = jnp.maximum(mask.sum(axis=1, keepdims=True) - 1, 1)
        return jnp.where(mask, position / last, 0.0).astype(jnp.float32)

    speech_BS, text_BT = relative_position(speech_mask_BS), relative_position(text_mask_BT)
    return jnp.square(speech_BS[:, :, None] - text_BT[:, None])


def gives_mass(mass_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """bool [B, S]: valid, and of at least MIN_MASS of the example's largest mass."""
    mass_BS = jnp.where(mask_BS, mass_BS, 0.0)
    return (mass_BS > 0) & (mass_BS >= MIN_MASS * mass_BS.max(axis=1, keepdims=True))


def first_occurrences(ids_BT: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """True at the first valid occurrence of every id [B, T]; every id's count [B, T] (float32)."""
    same_BTT = (ids_BT[:, :, None] == ids_BT[:, None]) & mask_BT[:, :, None] & mask_BT[:, None]
    earlier_BTT = jnp.tril(same_BTT, k=-1)
    return mask_BT & ~earlier_BTT.any(axis=2), same_BTT.sum(axis=2).astype(jnp.float32)


def text_centering(text_BTD: jax.Array, mask_BT: jax.Array, how: str) -> Centering | None:
    """What `center=how` removes: the mean of the valid text vectors and, for "pcs", their top
    principal directions (orthogonal iteration on the covariance, which is never formed)."""
    if how == "none":
        return None
    text_BTD = jax.lax.stop_gradient(jnp.where(mask_BT[..., None], text_BTD, 0)).astype(jnp.float32)
    mean_D = text_BTD.sum(axis=(0, 1)) / jnp.maximum(mask_BT.sum(), 1).astype(jnp.float32)
    width = text_BTD.shape[-1]
    if how == "mean":
        return Centering(mean_D, jnp.zeros((0, width)))
    centred_BTD = jnp.where(mask_BT[..., None], text_BTD - mean_D[None, None], 0)

    def iterate(_, basis_DN):
        projected_BTN = jnp.einsum("btd,dn->btn", centred_BTD, basis_DN, precision="highest")
        image_DN = jnp.einsum("btd,btn->dn", centred_BTD, projected_BTN, precision="highest")
        return jnp.linalg.qr(image_DN)[0]

    start_DN = jax.random.normal(jax.random.key(0), (width, min(NUM_DIRECTIONS, width)))
    basis_DN = jax.lax.fori_loop(0, 12, iterate, jnp.linalg.qr(start_DN)[0])
    return Centering(mean_D, basis_DN.T)


def remove_common(x_BND: jax.Array, mask_BN: jax.Array, center: Centering) -> jax.Array:
    """x minus the mean, with the directions projected out; float32, zero where masked out."""
    x_BND = x_BND.astype(jnp.float32) - center.mean_D[None, None]
    along = jnp.einsum("bnd,kd->bnk", x_BND, center.directions_ND, precision="highest")
    x_BND = x_BND - jnp.einsum("bnk,kd->bnd", along, center.directions_ND, precision="highest")
    return jnp.where(mask_BN[..., None], x_BND, 0)


def transport_plan(
    cost_BST: jax.Array,
    a_BS: jax.Array,
    b_BT: jax.Array,
    *,
    epsilon: float | jax.Array,
    num_iters: int,
    speech_tau: float = 1.0,
    backend: str = "auto",
    batch_sharding: jax.sharding.NamedSharding | None = None,
) -> jax.Array:
    """Entropic transport plans [B, S, T] float32: `num_iters` Sinkhorn iterations from potential 0.

    Args:
      cost_BST: costs; cast to float32 (a bfloat16 cost never converges).
      a_BS, b_BT: marginals, each row summing to 1, or all zero: such an example gets an all-zero
        plan. Positions of zero mass are padding: they carry exactly none of the plan, and their
        costs may be anything.
      epsilon, num_iters, speech_tau: as in `regularizer`.
      backend: "xla", blocks of matrix scalings; "pallas", the same with an example's whole tile on
        chip, or streamed through it; "ott", ott-jax's log-domain iterations, the reference; "auto",
        what measured best (xla).
      batch_sharding: how the examples are spread over devices, if they are. "pallas" has to know,
        since XLA cannot split a kernel: each device then solves its own examples.

    Every backend runs the same iterations. None is differentiable, on purpose: the plan is a
    constant to `jax.grad`. Padding by zero mass is exact because epsilon is absolute; ott's
    relative epsilon and cost scaling would read padded entries.

    Raises:
      ValueError: the backend is unknown.
      ModuleNotFoundError: its file, or a package that needs, is missing.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"otreg: backend={backend!r} is not one of auto, {', '.join(BACKENDS)}")
    nonempty_B = (a_BS.sum(axis=1) > 0) & (b_BT.sum(axis=1) > 0)
    a_BS, b_BT = (jnp.where(nonempty_B[:, None], x, 0.0) for x in (a_BS, b_BT))
    valid_BST = (a_BS[:, :, None] > 0) & (b_BT[:, None] > 0)
    # Solvers see costs in units of epsilon, which leaves them an epsilon of 1.
    cost_BST = jnp.where(valid_BST, cost_BST.astype(jnp.float32) / epsilon, 0.0)
    solve = BACKENDS["xla" if backend == "auto" else backend]
    solve = functools.partial(solve, num_iters=num_iters, speech_tau=speech_tau)
    if backend == "pallas" and batch_sharding is not None:
        mesh, rows = batch_sharding.mesh, batch_sharding.spec
        solve = jax.shard_map(solve, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return solve(*jax.lax.stop_gradient((cost_BST, a_BS, b_BT)))


def _solve_xla(cost_BST, a_BS, b_BT, num_iters, speech_tau):
    def weighted_sum(kernel_BST, weight, axis):
        equation = {1: "bst,bsi->bit", 2: "bst,bit->bsi"}[axis]
        return jnp.einsum(equation, kernel_BST, weight, precision="highest")

    return absorbed_sinkhorn(
        cost_BST,
        a_BS[:, :, None],
        b_BT[:, None],
        weighted_sum,
        num_iters=num_iters,
        speech_tau=speech_tau,
        speech_axis=1,
    )


def _solve_pallas(*problem, **options):
    return _companion("pallas").solve(absorbed_sinkhorn, *problem, **options)


def _solve_ott(*problem, **options):
    return _companion("ott").solve(*problem, **options)


BACKENDS = {"xla": _solve_xla, "pallas": _solve_pallas, "ott": _solve_ott}


def _companion(backend: str):
    """`sinkhorn/<backend>.py` beside this file, in whatever package that is; loaded when needed."""
    package = f"{__package__}." if __package__ else ""
    try:
        return importlib.import_module(f"{package}sinkhorn.{backend}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"otreg: backend={backend!r} needs the file sinkhorn/{backend}.py beside otreg.py, and "
            f"what it imports: {error}"
        ) from error


def absorbed_sinkhorn(cost, a, b, weighted_sum, *, num_iters, speech_tau, speech_axis) -> jax.Array:
    """Plans by block-absorbed Sinkhorn (Schmitzer 2019, "Stabilized sparse scaling algorithms").

    Log-domain iterations pay an exponential for every entry every time. Here the first iteration is
    exact, in the log domain; then the potentials f, g are absorbed into the kernel exp(f + g - C),
    exponentiated once for a block of iterations that only multiply and sum; their scalings u, v are
    folded back into f, g.

    Nothing overflows at any cost. With masses of at least 1/S and 1/T, the first iteration
    leaves column sums between 1/(S T) and 1, so an iteration changes a scaling by a factor between
    1/max(S, T) and max(S, T); a block is as long as the product of such factors stays within
    exp(-80) and exp(80), which float32 holds.

    Costs, in units of epsilon, are [B, S, T] or, with `speech_axis=2`, [B, T, S]; a, f, u (speech)
    and b, g, v (text) broadcast against them. `weighted_sum(kernel, weight, axis)` is the sum of
    their product over an axis, which is kept.
    """
    text_axis = 3 - speech_axis
    block = int(80 / math.log(max(*cost.shape[1:], 2)))
    log_sum_exp = functools.partial(jax.nn.logsumexp, keepdims=True)

    f = jnp.where(a > 0, 0.0, -jnp.inf)  # padding has potentials -inf throughout
    g = jnp.where(b > 0, jnp.log(b) - log_sum_exp(f - cost, speech_axis), -jnp.inf)
    f = jnp.where(a > 0, jnp.log(a) - log_sum_exp(g - cost, text_axis), -jnp.inf)
    f = speech_tau * f

    def run_block(num_iters, potentials):
        f, g = potentials
        kernel = jnp.exp(f + g - cost)

        def iterate(_, scalings):
            u, v = scalings
            reached = weighted_sum(kernel, u, speech_axis)
            v = jnp.where(reached > 0, b / reached, 1.0)  # padding reaches 0 and stays where it is
            reached = weighted_sum(kernel, v, text_axis)
            u = a / reached
            if speech_tau < 1:  # tau scales the whole potential f + log(u); `reached` contains f
                u = jnp.exp(speech_tau * jnp.log(u) + (speech_tau - 1) * f)
            return jnp.where(reached > 0, u, 1.0), v

        u, v = jax.lax.fori_loop(0, num_iters, iterate, (jnp.ones_like(a), jnp.ones_like(b)))
        return f + jnp.log(u), g + jnp.log(v)

    blocks, rest = divmod(num_iters - 1, block)
    f, g = jax.lax.fori_loop(0, blocks, lambda _, fg: run_block(block, fg), (f, g))
    f, g = run_block(rest, (f, g)) if rest else (f, g)
    return jnp.exp(f + g - cost)


def _normalize(weight_BN: jax.Array) -> jax.Array:
    total_B1 = weight_BN.sum(axis=1, keepdims=True)
    return weight_BN / jnp.where(total_B1 > 0, total_B1, 1.0)


def _is_number(value) -> bool:
    return isinstance(value, (int, float))  # a traced value cannot be looked at


def _marginal_error(plan_BST, a_BS, b_BT, speech_tau):
    """How far the plan's marginals are from the asked ones (L1); a relaxed side is not counted."""
    error_B = jnp.abs(plan_BST.sum(axis=1) - b_BT).sum(axis=1)
    if speech_tau == 1.0:
        error_B += jnp.abs(plan_BST.sum(axis=2) - a_BS).sum(axis=1)
    return error_B


def _nearest_cosine(cosine_BST, speech_mask_BS, text_mask_BT):
    nearest_BS = jnp.max(cosine_BST, axis=2, where=text_mask_BT[:, None], initial=-1.0)
    count_B = jnp.maximum(speech_mask_BS.sum(axis=1), 1).astype(jnp.float32)
    return jnp.sum(nearest_BS, axis=1, where=speech_mask_BS) / count_B


# The choices that `regularizer` gives by name.
CHOICES = {
    "text_set": ("sequence", "unique"),
    "text_mass": ("uniform", "count"),
    "center": ("none", "mean", "pcs"),
    "cost": ("cosine", "sqeuclidean"),
    "plan": ("ot", "position"),
    "backend": ("auto", *BACKENDS),
}


def check_options(choices, epsilon, num_iters, speech_tau, token_ids_BT, is_even) -> None:
    """Raises one ValueError that lists every argument of `regularizer` that cannot be meant."""
    problems = []
    for name, value in choices.items():
        if not isinstance(value, Centering) and value not in CHOICES[name]:
            problems.append(f"{name}={value!r} is not one of {', '.join(CHOICES[name])}")
    if _is_number(epsilon) and epsilon <= 0:
        problems.append(f"epsilon={epsilon} must be above 0")
    if num_iters < 1:
        problems.append(f"num_iters={num_iters} must be at least 1")
    if not 0 < speech_tau <= 1:
        problems.append(f"speech_tau={speech_tau} must be in (0, 1]")
    if choices["text_set"] == "unique" and token_ids_BT is None:
        problems.append("text_set='unique' needs token_ids_BT")
    if choices["plan"] == "position" and is_even:
        problems.append("plan='position' needs position_weight > 0: the plan would be uniform")
    if problems:
        raise ValueError("otreg: " + "; ".join(problems))
