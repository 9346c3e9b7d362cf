"""What transport plans say of speech and its transcript: alignment figures, spans, word times."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from otreg_jax import otreg
from otreg_jax.data import sources
from otreg_jax.models import slm as slm_lib
from otreg_jax.models.layers import length_mask

NUM_MEASURED = 32  # utterances of each set that the alignment figures are computed on
# The plan of the figures is the same for every run, however it was trained: similarity alone, no
# position prior, enough iterations to converge.
MEASURED_PLAN = dict(text_set="sequence", position_weight=0.0, epsilon=0.05, num_iters=200)
# A slight position prior settles which of two equal words is which.
POSITION_WEIGHT = 0.3

Words = list[tuple[str, float, float]]  # word, start and end in seconds


class Sample(NamedTuple):
    """What the alignment figures need of one utterance; no padding."""

    id: str
    mel_FM: np.ndarray
    speech_SD: np.ndarray
    text_TD: np.ndarray
    ids_T: np.ndarray
    spoken_T2: np.ndarray  # start and end of each token's word, relative to the length; or NaN


def sample_of(utterance: sources.Utterance, tokenizer, batch, compared, b: int) -> Sample:
    """Row `b` of a batch on the host.

    compared: speech [B, S, D], its lengths [B] and text [B, T, D], the embeddings that OTReg
    compares.
    """
    speech_BSD, length_B, text_BTD = compared
    ids_T = batch["tokens"][b, : batch["token_length"][b]]
    return Sample(
        utterance.id,
        batch["mel"][b, : batch["mel_length"][b]],
        speech_BSD[b, : length_B[b]].astype(np.float32),
        text_BTD[b, : len(ids_T)].astype(np.float32),
        ids_T,
        spoken_times(utterance, word_index(tokenizer, ids_T.tolist())),
    )


def measure(samples: dict[str, list[Sample]]) -> dict[str, dict[str, Any]]:
    """Alignment figures of every set, on the plan MEASURED_PLAN, mean-centred by the set's text.

    Returns for each set `figures` (see docs/evaluation.md), and the `plan_ST` of the utterance
    `example`, the one of median transcript length.
    """
    everything = [sample for found in samples.values() for sample in found]
    if not everything:
        return {}
    num_speech = max(len(sample.speech_SD) for sample in everything)
    num_text = max(len(sample.ids_T) for sample in everything)
    measured = {}
    for name, found in samples.items():
        if not found:
            continue
        pad = lambda x, size: np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)])
        # One shape for all sets: one compilation.
        stack = lambda field, size, found=found, pad=pad: pad(
            np.stack([pad(getattr(sample, field), size) for sample in found]), NUM_MEASURED
        )
        lengths = [[len(s.speech_SD) for s in found], [len(s.ids_T) for s in found]]
        found_figures, plan_BST = figures(
            stack("speech_SD", num_speech), stack("text_TD", num_text), stack("ids_T", num_text),
            stack("spoken_T2", num_text),
            *(pad(np.array(length, np.int32), NUM_MEASURED) for length in lengths),
        )  # fmt: skip
        example = int(np.argsort(lengths[1], kind="stable")[len(found) // 2])
        plan_ST = np.asarray(plan_BST[example, : lengths[0][example], : lengths[1][example]])
        measured[name] = {
            # A figure without its data (word times) is not a number, and left out.
            "figures": {k: float(v) for k, v in found_figures.items() if np.isfinite(v)},
            "example": found[example],
            "plan_ST": plan_ST,
        }
    return measured


@jax.jit
def figures(speech_BSD, text_BTD, ids_BT, spoken_BT2, speech_length_B, text_length_B):
    """Alignment figures of a padded batch of utterances, and their transport plans [B, S, T].

    The definitions are in docs/evaluation.md. spoken_BT2: see `spoken_times`.
    """
    speech_mask_BS = length_mask(speech_length_B, speech_BSD.shape[1])
    text_mask_BT = length_mask(text_length_B, text_BTD.shape[1])
    center = otreg.text_centering(text_BTD, text_mask_BT, "mean")
    out = otreg.regularizer(
        speech_BSD, text_BTD, speech_mask_BS, text_mask_BT, center=center, **MEASURED_PLAN
    )
    plan_BST = out.plan
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)

    # Token retrieval: the barycentre of a token's speech looks for its nearest transcript token.
    speech = otreg.remove_common(speech_BSD, speech_mask_BS, center)
    text = otreg.remove_common(text_BTD, text_mask_BT, center)
    barycentre_ND = unit(jnp.einsum("bst,bsd->btd", plan_BST, speech)).reshape(-1, text.shape[-1])
    candidate_ND = unit(text).reshape(-1, text.shape[-1])
    valid_N, ids_N = text_mask_BT.reshape(-1), ids_BT.reshape(-1)
    similarity_NN = jnp.where(valid_N, barycentre_ND @ candidate_ND.T, -jnp.inf)
    retrieved_N = ids_N[similarity_NN.argmax(axis=1)] == ids_N
    num_tokens = jnp.maximum(valid_N.sum(), 1)

    # Monotonicity: correlation of s and t when (s, t) is drawn from the plan.
    mass_BST = plan_BST / jnp.maximum(plan_BST.sum(axis=(1, 2), keepdims=True), 1e-12)
    s_BS = jnp.where(speech_mask_BS, jnp.arange(speech_BSD.shape[1], dtype=jnp.float32), 0)
    t_BT = jnp.where(text_mask_BT, jnp.arange(text_BTD.shape[1], dtype=jnp.float32), 0)
    over_s, over_t = mass_BST.sum(axis=2), mass_BST.sum(axis=1)
    s_BS -= (over_s * s_BS).sum(axis=1, keepdims=True)
    t_BT -= (over_t * t_BT).sum(axis=1, keepdims=True)
    covariance_B = jnp.einsum("bst,bs,bt->b", mass_BST, s_BS, t_BT)
    variance_B = (over_s * s_BS**2).sum(axis=1) * (over_t * t_BT**2).sum(axis=1)
    defined_B = (speech_length_B > 1) & (text_length_B > 1)
    correlation_B = covariance_B / jnp.sqrt(jnp.maximum(variance_B, 1e-12))

    def mean_unit(x_BND, mask_BN):
        total_D = jnp.where(mask_BN[..., None], unit(x_BND), 0).sum(axis=(0, 1))
        return total_D / jnp.maximum(mask_BN.sum(), 1)

    # Mass on the word spoken at the time, by the plan and by tokens spread evenly over the time.
    time_BS = (jnp.arange(speech_BSD.shape[1]) + 0.5) / jnp.maximum(speech_length_B, 1)[:, None]
    start_BT, end_BT = spoken_BT2[..., 0], spoken_BT2[..., 1]
    heard_BST = (time_BS[..., None] >= start_BT[:, None]) & (time_BS[..., None] < end_BT[:, None])
    timed_B = (text_length_B > 0) & ~jnp.isnan(start_BT).any(axis=1, where=text_mask_BT)
    even_BS = (time_BS * text_length_B[:, None]).astype(jnp.int32)
    even_BST = (even_BS[..., None] == jnp.arange(text_BTD.shape[1])) & speech_mask_BS[..., None]
    even_BST = even_BST / jnp.maximum(speech_length_B, 1)[:, None, None]
    on_spoken = lambda plan: (
        jnp.sum(jnp.sum(plan * heard_BST, axis=(1, 2)), where=timed_B) / timed_B.sum()
    )

    gap_D = mean_unit(speech_BSD, speech_mask_BS) - mean_unit(text_BTD, text_mask_BT)
    values = out.metrics | {
        "retrieval_accuracy": (retrieved_N & valid_N).sum() / num_tokens,
        "monotonicity": jnp.sum(correlation_B, where=defined_B) / jnp.maximum(defined_B.sum(), 1),
        "centroid_distance": jnp.linalg.norm(gap_D),
        "spoken_mass": on_spoken(mass_BST),
        "spoken_mass_even": on_spoken(even_BST),
    }
    return values, plan_BST


# Words -----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("slm", "layer"))
def token_shares(slm, params, batch, layer: int):
    """The share of each speech position's mass that goes to each token, [B, S, T]."""
    out = slm_lib.forward(slm, params, batch, layer)
    speech_mask_BS = length_mask(out.speech_length_B, out.speech_BSD.shape[1])
    text_mask_BT = length_mask(batch["token_length"], out.text_BTD.shape[1])
    options = MEASURED_PLAN | {"position_weight": POSITION_WEIGHT}
    plan_BST = otreg.regularizer(
        out.speech_BSD, out.text_BTD, speech_mask_BS, text_mask_BT, center="mean", **options
    ).plan
    mass_BS1 = plan_BST.sum(axis=2, keepdims=True)
    return plan_BST / jnp.maximum(mass_BS1, 1e-12), out.speech_length_B


def monotone_spans(shares_ST: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The spans [start, end) of speech positions, one a token in order, of largest log share.

    Viterbi: position s belongs to token t(s), t rises by 0 or 1 from one position to the next and
    runs from the first token to the last. With fewer positions than tokens, positions are divided
    first.
    """
    num_speech, num_text = shares_ST.shape
    fold = -(-num_text // num_speech)  # parts of a position, so that every token gets one
    score_ST = np.log(np.maximum(np.repeat(shares_ST, fold, axis=0), 1e-6))
    total_T = np.full(num_text, -np.inf)
    total_T[0] = score_ST[0, 0]
    advanced_ST = np.zeros(score_ST.shape, bool)
    for s in range(1, len(score_ST)):
        from_before_T = np.concatenate([[-np.inf], total_T[:-1]])
        advanced_ST[s] = from_before_T > total_T
        total_T = np.maximum(total_T, from_before_T) + score_ST[s]
    starts_T = np.zeros(num_text)
    t = num_text - 1
    for s in range(len(score_ST) - 1, 0, -1):
        if advanced_ST[s, t]:
            starts_T[t] = s
            t -= 1
    ends_T = np.append(starts_T[1:], len(score_ST))
    return starts_T / fold, ends_T / fold


def words_of(tokenizer, tokens: Sequence[int], starts_T, ends_T) -> Words:
    """Joins tokens to the words of the decoded text (by whitespace)."""
    words = tokenizer.decode(tokens).split()
    spans: dict[int, tuple[float, float]] = {}
    for t, index in enumerate(word_index(tokenizer, tokens)):
        start, _ = spans.get(index, (float(starts_T[t]), 0.0))
        spans[index] = (start, float(ends_T[t]))
    return [(words[i], *span) for i, span in sorted(spans.items()) if i < len(words)]


def word_index(tokenizer, ids: Sequence[int]) -> list[int]:
    """Which word of the text (by whitespace) each token belongs to."""
    # The word in which the text up to here ends.
    return [max(len(tokenizer.decode(ids[: t + 1]).split()) - 1, 0) for t in range(len(ids))]


def spoken_times(utterance: sources.Utterance, index_T: Sequence[int]) -> np.ndarray:
    """[T, 2]: when each token's word begins and ends, relative to the utterance's length.

    NaN where the manifest does not time the words, or times other words than the transcript's.
    """
    # An entry may hold several words that were timed together.
    times = [(start, end) for word, start, end in utterance.words for _ in word.split()]
    if len(times) != len(utterance.text.split()) or max(index_T, default=0) >= len(times):
        return np.full((len(index_T), 2), np.nan, np.float32)
    return np.array([times[i] for i in index_T], np.float32).reshape(-1, 2) / utterance.duration
