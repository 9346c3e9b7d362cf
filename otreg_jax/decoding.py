"""Greedy and beam search over a KV cache: batched, jitted, static shapes, early stop.

Prompts are embeddings, right-padded; every example decodes at its own positions (cache slot index
is position), so an example's result does not depend on what shares its batch, but for rounding (see
docs/evaluation.md on bfloat16).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from otreg_jax import sharding
from otreg_jax.models import slm as slm_lib
from otreg_jax.models.llm import LLM, Cache, for_steps, init_cache

NEVER = -1e9  # a log probability that no hypothesis reaches


class Decoded(NamedTuple):
    """Hypotheses. greedy: [B]; beam_search: [B, W], the best first.

    tokens: int32 [..., N], the end of sequence left out, zeros from `length` on.
    length: int32 [...].
    score: float32 [...], log probability of the tokens, the end of sequence included where it was
      reached; beam_search divides it by (number of tokens, that one included) ** length_penalty.
    finished: bool [...], whether the hypothesis reached the end of sequence, not the limit.
    """

    tokens: jax.Array
    length: jax.Array
    score: jax.Array
    finished: jax.Array


class Settings(NamedTuple):
    """How to decode.

    max_tokens: a hypothesis ends after so many tokens, or after its own limit if that is less.
    beam_width: hypotheses kept; 1 is greedy search.
    length_penalty: exponent of the length that a beam's log probability is divided by; above 0
      favours longer hypotheses.
    no_repeat_ngram: n > 0 forbids any sequence of n tokens to occur twice in a hypothesis.
    """

    max_tokens: int
    beam_width: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0


def check(settings: Settings) -> None:
    """Raises ValueError for settings that are none, or would have no effect."""
    problems = []
    if settings.beam_width < 1:
        problems.append(f"beam_width={settings.beam_width}: at least one hypothesis is kept")
    if settings.no_repeat_ngram < 0:
        problems.append(f"no_repeat_ngram={settings.no_repeat_ngram} is below 0")
    if settings.beam_width == 1 and settings.length_penalty != 1.0:
        problems.append(
            f"length_penalty={settings.length_penalty:g} weighs hypotheses of a beam against each "
            "other: it needs beam_width=2 or more"
        )
    if problems:
        raise ValueError("; ".join(problems))


def define_flags(define) -> None:
    """The flags of commands that decode; `settings_of` reads them."""
    default = Settings(0)
    define.integer("beam_width", default.beam_width, "Hypotheses kept; 1: greedy search.", 1)
    penalty = "Exponent of the length in beam scores."
    define.float("length_penalty", default.length_penalty, penalty)
    ngram = "Forbid repeated n-grams; 0: allow them."
    define.integer("no_repeat_ngram", default.no_repeat_ngram, ngram, 0)


def settings_of(values) -> Settings:
    """How the flags of `define_flags` say to decode; max_tokens 0 is left to the command."""
    return Settings(0, values.beam_width, values.length_penalty, values.no_repeat_ngram)


@functools.partial(jax.jit, static_argnames=("slm", "settings"))
def recognize(
    slm: slm_lib.SLM,
    params: dict,
    mel_BFM: jax.Array,
    mel_length_B: jax.Array,
    settings: Settings,
    limit_B: jax.Array | None = None,
    prompt: dict[str, jax.Array] | None = None,
) -> Decoded:
    """Log-mel frames -> the best hypothesis of each utterance, [B, N]. limit_B: see `greedy`;
    prompt: of each row, see `slm.prompt_of`; params: of the SLM, and with those of `for_run`
    nothing is made anew in every call."""
    speech_BSD, speech_length_B = slm_lib.speech_embeddings(slm, params, mel_BFM, mel_length_B)
    x_BPD, last_B = slm_lib.assemble(slm, params, speech_BSD, speech_length_B, None, prompt)
    args = slm.llm, params["llm"], x_BPD, last_B + 1, slm.prompt.eos, settings, limit_B
    args = *args, params.get("llm_for_steps")
    if settings.beam_width == 1:
        return greedy(*args)
    return jax.tree.map(lambda leaf: leaf[:, 0], beam_search(*args))


@functools.partial(jax.jit, static_argnames=("llm", "eos", "settings"))
def greedy(
    llm: LLM,
    params: dict,
    x_BPD: jax.Array,
    length_B: jax.Array,
    eos: int,
    settings: Settings,
    limit_B: jax.Array | None = None,
    step_params: dict | None = None,
) -> Decoded:
    """The most probable token at every step, until `eos` or `settings.max_tokens` (N) tokens.

    Args:
      llm, params: the model and its weights.
      x_BPD: prompt embeddings as the LLM receives them; positions ≥ length_B may hold anything.
      length_B: int32, valid prompt positions, at least 1.
      limit_B: int32, at least 1: an example's hypothesis ends after so many tokens, whatever else
        is in the batch; by default, and at most, max_tokens.
      step_params: `prepare_steps` of the weights, where many calls share them.
    """
    max_tokens = settings.max_tokens
    limit_B = jnp.full(len(length_B), max_tokens) if limit_B is None else limit_B
    batch, prompt_size = x_BPD.shape[:2]
    logits_BV, cache = _prefill(llm, params, x_BPD, length_B, prompt_size + max_tokens)
    step_params = step_params or prepare_steps(llm, params)
    tokens_BN = jnp.zeros((batch, max_tokens), jnp.int32)
    zeros_B = jnp.zeros(batch, jnp.int32)

    def emit(n, logits_BV, tokens_BN, emitted_B, score_B, finished_B):
        log_prob_BV = jax.nn.log_softmax(logits_BV)
        allowed_BV = _forbid_repeats(log_prob_BV, tokens_BN, n, settings.no_repeat_ngram)
        token_B = jnp.argmax(allowed_BV, axis=-1).astype(jnp.int32)
        chosen_B = jnp.take_along_axis(log_prob_BV, token_B[:, None], axis=-1)[:, 0]
        going_B = ~finished_B & (n < limit_B)
        score_B += jnp.where(going_B, chosen_B, 0.0)
        finished_B |= going_B & (token_B == eos)
        going_B &= ~finished_B
        tokens_BN = tokens_BN.at[:, n].set(jnp.where(going_B, token_B, 0))
        return tokens_BN, emitted_B + going_B, score_B, finished_B

    def step(state):
        n, cache, tokens_BN, *rest = state
        positions_B = length_B + n - 1
        logits_BV, cache = _next_logits(llm, step_params, tokens_BN[:, n - 1], positions_B, cache)
        return n + 1, cache, *emit(n, logits_BV, tokens_BN, *rest)

    start = emit(0, logits_BV, tokens_BN, zeros_B, jnp.zeros(batch), zeros_B.astype(bool))
    going = lambda n, finished_B: (n < max_tokens) & (~finished_B & (n < limit_B)).any()
    running = lambda state: going(state[0], state[-1])
    state = jax.lax.while_loop(running, step, (1, cache, *start))
    return Decoded(*state[2:])


@functools.partial(jax.jit, static_argnames=("llm", "eos", "settings"))
def beam_search(
    llm: LLM,
    params: dict,
    x_BPD: jax.Array,
    length_B: jax.Array,
    eos: int,
    settings: Settings,
    limit_B: jax.Array | None = None,
    step_params: dict | None = None,
) -> Decoded:
    """Beam search; returns the `settings.beam_width` (W) best hypotheses of every example.

    The rules are those of transformers' `generate(num_beams=W, early_stopping=False)`: each step
    ranks 2 W continuations, those of the first W that end are candidates for the result, the best W
    that go on are the next beams. An example is settled once all W results beat the best beam's
    score at its current length; with length_penalty 0 nothing better can follow.

    Args: as in `greedy`.
    """
    max_tokens, width = settings.max_tokens, settings.beam_width
    limit_B = jnp.full(len(length_B), max_tokens) if limit_B is None else limit_B
    limit_B = jnp.minimum(limit_B, max_tokens)
    batch, prompt_size = x_BPD.shape[:2]
    logits_BV, cache = _prefill(llm, params, x_BPD, length_B, prompt_size + max_tokens)
    step_params, vocab = step_params or prepare_steps(llm, params), logits_BV.shape[-1]
    cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, width, axis=1), cache)
    first_row_B = jnp.arange(batch)[:, None] * width

    def advance(n, logits_BWV, cache, beams: Decoded, results: Decoded, open_B):
        log_prob_BWV = jax.nn.log_softmax(logits_BWV)
        flat = (batch * width, -1)
        log_prob_BWV = _forbid_repeats(
            log_prob_BWV.reshape(flat), beams.tokens.reshape(flat), n, settings.no_repeat_ngram
        ).reshape(batch, width, vocab)
        total_BV = (log_prob_BWV + beams.score[..., None]).reshape(batch, -1)
        score_BC, index_BC = jax.lax.top_k(total_BV, 2 * width)
        parent_BC, token_BC = index_BC // vocab, (index_BC % vocab).astype(jnp.int32)
        ended_BC = token_BC == eos
        final_BC = ended_BC | (n + 1 >= limit_B)[:, None]
        tokens_BCN = jnp.take_along_axis(beams.tokens, parent_BC[..., None], axis=1)
        tokens_BCN = tokens_BCN.at[:, :, n].set(jnp.where(ended_BC, 0, token_BC))
        candidates = Decoded(tokens_BCN, n + 1 - ended_BC, score_BC, ended_BC)

        on_score_BC = score_BC + jnp.where(final_BC, NEVER, 0.0)
        beams, chosen_BW = _best(candidates._replace(score=on_score_BC), width)
        rows = (first_row_B + jnp.take_along_axis(parent_BC, chosen_BW, axis=1)).reshape(-1)
        cache = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=1), cache)

        # Beyond the first W, candidates are only there to keep W beams going.
        enters_BC = final_BC & (jnp.arange(2 * width) < width) & open_B[:, None]
        penalty = jnp.asarray(n + 1, jnp.float32) ** settings.length_penalty
        entry_BC = jnp.where(enters_BC, score_BC / penalty, NEVER)
        entries = candidates._replace(score=entry_BC)
        both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), results, entries)
        results, _ = _best(both, width)
        open_B &= beams.score[:, 0] / penalty > results.score[:, -1]
        open_B &= n + 1 < limit_B
        return n + 1, cache, beams, results, open_B

    def step(state):
        n, cache, beams, results, open_B = state
        tokens = beams.tokens[:, :, n - 1].reshape(-1)
        positions = jnp.repeat(length_B + n - 1, width)
        logits, cache = _next_logits(llm, step_params, tokens, positions, cache)
        return advance(n, logits.reshape(batch, width, -1), cache, beams, results, open_B)

    empty = Decoded(
        jnp.zeros((batch, width, max_tokens), jnp.int32),
        jnp.zeros((batch, width), jnp.int32),
        jnp.full((batch, width), NEVER),
        jnp.zeros((batch, width), bool),
    )
    # All beams start equal: only the first may be continued, or every result would come W times.
    beams = empty._replace(score=empty.score.at[:, 0].set(0.0))
    logits_BWV = jnp.broadcast_to(logits_BV[:, None], (batch, width, vocab))
    state = advance(0, logits_BWV, cache, beams, empty, jnp.ones(batch, bool))
    running = lambda state: (state[0] < max_tokens) & state[-1].any()
    return jax.lax.while_loop(running, step, state)[3]


def _best(hypotheses: Decoded, count: int) -> tuple[Decoded, jax.Array]:
    """The `count` best of hypotheses [B, C], best first, and their indices [B, count]."""
    score, index = jax.lax.top_k(hypotheses.score, count)
    tokens = jnp.take_along_axis(hypotheses.tokens, index[..., None], axis=1)
    length = jnp.take_along_axis(hypotheses.length, index, axis=1)
    finished = jnp.take_along_axis(hypotheses.finished, index, axis=1)
    return Decoded(tokens, length, score, finished), index


def for_run(slm: slm_lib.SLM, params: dict) -> dict:
    """The SLM's weights for `recognize`, with what many calls share made once."""
    return params | {"llm_for_steps": prepare_steps(slm.llm, params["llm"])}


def prepare_steps(llm: LLM, params: dict) -> dict:
    """The LLM's weights as its one-token steps read them: on a CPU a copy, which saves more time
    than it costs."""
    platform = llm.mesh.devices.flat[0].platform if llm.mesh else jax.default_backend()
    return jax.jit(for_steps, static_argnums=0)(llm.config, params) if platform == "cpu" else params


def _prefill(llm: LLM, params, x_BPD, length_B, slots: int) -> tuple[jax.Array, Cache]:
    """Runs the prompts; next-token logits [B, V] and a cache of `slots` positions.

    Padding writes to slots behind the prompt; each is overwritten before anything may attend to it.
    """
    batch, prompt_size = x_BPD.shape[:2]
    positions_BP = jnp.broadcast_to(jnp.arange(prompt_size), (batch, prompt_size))
    x_BPD = jnp.where((positions_BP < length_B[:, None])[..., None], x_BPD, 0)
    cache = init_cache(llm.config, batch, slots)
    if llm.mesh:
        placed = lambda x: sharding.cache_sharding(x.shape, llm.mesh)
        cache = jax.lax.with_sharding_constraint(cache, jax.tree.map(placed, cache))
    hidden_BPD, cache = llm.apply(
        {"params": params}, x_BPD, positions_BP, cache, length_B, method="hidden"
    )
    last_B1D = jnp.take_along_axis(hidden_BPD, (length_B - 1)[:, None, None], axis=1)
    return llm.apply({"params": params}, last_B1D[:, 0], method="logits"), cache


def _next_logits(llm: LLM, params, token_B, position_B, cache) -> tuple[jax.Array, Cache]:
    """One token through the LLM: logits [B, V] for what follows it, and the cache with it."""
    x_B1D = llm.apply({"params": params}, token_B[:, None], method="embed")
    hidden_B1D, cache = llm.apply(
        {"params": params}, x_B1D, position_B[:, None], cache, method="hidden"
    )
    hidden_BD = sharding.to_weights(hidden_B1D[:, 0], llm.mesh, "fsdp")
    logits_BV = llm.apply({"params": params}, hidden_BD, method="logits")
    return sharding.to_weights(logits_BV, llm.mesh, "tensor"), cache


def _forbid_repeats(log_prob_BV, tokens_BN, n, size: int) -> jax.Array:
    """-inf at tokens that would complete a `size`-gram already among the first n tokens."""
    starts = tokens_BN.shape[1] - size + 1
    if not size or starts < 1:
        return log_prob_BV
    first = jnp.arange(starts)
    context = jnp.maximum(n - size + 1 + jnp.arange(size - 1), 0)
    windows_BWG = tokens_BN[:, first[:, None] + jnp.arange(size)]
    same_BW = (windows_BWG[..., :-1] == tokens_BN[:, None, context]).all(axis=-1)
    forbidden_BW = same_BW & (first + size <= n)
    ban_BW = jnp.where(forbidden_BW, -jnp.inf, jnp.inf)
    rows = jnp.arange(len(tokens_BN))[:, None]
    return log_prob_BV.at[rows, windows_BWG[..., -1]].min(ban_BW)
