"""What transport plans say of speech and its transcript: alignment figures, spans, word times."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import regex

from otreg_jax import languages, otreg
from otreg_jax.data import features, sources
from otreg_jax.models import encoders
from otreg_jax.models import slm as slm_lib
from otreg_jax.models.layers import length_mask

NUM_MEASURED = 32  # utterances of each set that the alignment figures are computed on
# The plan of the figures is the same for every run, however it was trained: similarity alone, no
# position prior, enough iterations to converge.
MEASURED_PLAN = dict(text_set="sequence", position_weight=0.0, epsilon=0.05, num_iters=200)
# A slight position prior settles which of two equal words is which.
POSITION_WEIGHT = 0.3

# A frame this far below the loudest LOUD_FRAMES of the utterance is silent: the default of Praat's
# "To TextGrid (silences)".
SILENCE_DB = -25.0
LOUD_FRAMES = 20  # 0.2 s, so that a click does not pass for speech
CLOSED = 0.05  # the share of a word that is silent
FLOOR = 1e-6  # no position alone rules out an order of words
# A letter of a script without spaces: a grapheme cluster with the punctuation around it.
CLUSTER = regex.compile(r"[\p{Ps}\p{Pi}]*(?!\s)\X[\p{P}--[\p{Ps}\p{Pi}]]*", regex.V1)
CLOSE = 0.1  # seconds: a word's edge is right when it is no further off


class Word(NamedTuple):
    """A word of a transcript and when it is said.

    start, end: in positions or seconds from the utterance's start.
    confidence: the mean, over the word's positions, of the plan's share that goes to its tokens.
    """

    text: str
    start: float
    end: float
    confidence: float


class Sample(NamedTuple):
    """What the alignment figures need of one utterance; no padding."""

    utterance: sources.Utterance
    mel_FM: np.ndarray
    speech_SD: np.ndarray
    text_TD: np.ndarray
    ids_T: np.ndarray
    begins_T: np.ndarray  # where each token begins in the transcript
    spoken_T2: np.ndarray  # start and end of each token's word, relative to the length; or NaN


def sample_of(
    utterance: sources.Utterance, tokenizer, batch, compared, b: int, frontend: features.Frontend
) -> Sample:
    """Row `b` of a batch on the host, of frames that `frontend` made.

    compared: speech [B, S, D], its lengths [B] and text [B, T, D], the embeddings that OTReg
    compares.
    """
    speech_BSD, speech_length_B, text_BTD = compared
    tokens_BT, token_length_B = slm_lib.transcript_of(batch)
    ids_T = tokens_BT[b, : token_length_B[b]]
    begins_T = np.array(tokenizer.begins(utterance.text), np.int32)
    return Sample(
        utterance,
        features.heard(frontend, batch["mel"][b, : batch["mel_length"][b]]),
        speech_BSD[b, : speech_length_B[b]].astype(np.float32),
        text_BTD[b, : len(ids_T)].astype(np.float32),
        ids_T,
        begins_T,
        spoken_times(utterance, begins_T),
    )


def measure(samples: dict[str, list[Sample]]) -> dict[str, dict[str, Any]]:
    """Alignment figures of every set, on the plan MEASURED_PLAN, mean-centred by the set's text.

    Returns for each set `figures` (see docs/evaluation.md), and of the utterance `example`, the one
    of median transcript length, the `plan_ST` and the `words` (`word_times`).
    """
    everything = [sample for found in samples.values() for sample in found]
    if not everything:
        return {}
    num_speech = max(len(sample.speech_SD) for sample in everything)
    num_text = max(len(sample.ids_T) for sample in everything)
    num_frames = max(len(sample.mel_FM) for sample in everything)
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
        embedded = stack("speech_SD", num_speech), stack("text_TD", num_text)
        padded_lengths = [pad(np.array(length, np.int32), NUM_MEASURED) for length in lengths]
        found_figures, plan_BST = figures(
            *embedded, stack("ids_T", num_text), stack("spoken_T2", num_text), *padded_lengths
        )
        words, example = [], int(np.argsort(lengths[1], kind="stable")[len(found) // 2])
        if any(sample.utterance.words for sample in found):
            mel_length = pad(np.array([len(s.mel_FM) for s in found], np.int32), NUM_MEASURED)
            mel = stack("mel_FM", num_frames), mel_length
            heard = [np.asarray(x) for x in shares(*embedded, *padded_lengths, *mel)]
            found_figures |= word_time_figures(found, *heard)
            words = word_times(found[example], *(x[example] for x in heard))
        plan_ST = np.asarray(plan_BST[example, : lengths[0][example], : lengths[1][example]])
        measured[name] = {
            # A figure without its data (word times) is not a number, and left out.
            "figures": {k: float(v) for k, v in found_figures.items() if np.isfinite(v)},
            "example": found[example],
            "plan_ST": plan_ST,
            "words": words,
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
    """`shares` of a batch of the data pipeline, and the number of speech positions, [B].

    Positions are those of the speech: a prompt before it does not move them.
    """
    out = slm_lib.forward(slm, params, batch, layer)
    lengths = out.speech_length_B, slm_lib.transcript_of(batch)[1]
    frontend = encoders.frontend(slm.encoder.config)
    mel_BFM = features.heard_jnp(frontend, batch["mel"], batch["mel_length"])
    mel = mel_BFM, batch["mel_length"]
    return *shares(out.speech_BSD, out.text_BTD, *lengths, *mel), out.speech_length_B


@jax.jit
def shares(speech_BSD, text_BTD, speech_length_B, text_length_B, mel_BFM, mel_length_B):
    """The share of each speech position's mass that goes to each token, [B, S, T], and `silence`.

    Silent positions take no part in the plan: it would have to send their mass to some token, and
    all words would move to make room for it. Their shares are even: no token is preferred.
    """
    silence_BS = silence(mel_BFM, mel_length_B, speech_length_B, speech_BSD.shape[1])
    speech_mask_BS = length_mask(speech_length_B, speech_BSD.shape[1]) & (silence_BS < 0.5)
    text_mask_BT = length_mask(text_length_B, text_BTD.shape[1])
    options = MEASURED_PLAN | {"position_weight": POSITION_WEIGHT}
    plan_BST = otreg.regularizer(
        speech_BSD, text_BTD, speech_mask_BS, text_mask_BT, center="mean", **options
    ).plan
    shares_BST = plan_BST / jnp.maximum(plan_BST.sum(axis=2, keepdims=True), 1e-12)
    even_BT = text_mask_BT / jnp.maximum(text_length_B, 1)[:, None]
    return jnp.where(speech_mask_BS[..., None], shares_BST, even_BT[:, None]), silence_BS


def silence(mel_BFM, mel_length_B, speech_length_B, num_speech: int) -> jax.Array:
    """[B, S]: the share of silent frames in each of the positions that divide the audio.

    A frame is silent SILENCE_DB below the loudest part of the utterance; noise that is louder than
    that hides the silence in it.

    mel_BFM: log-mel features of `data.features`.
    """
    valid_BF = length_mask(mel_length_B, mel_BFM.shape[1])
    power_BF = jnp.where(valid_BF, jnp.sum(10.0 ** (4 * mel_BFM - 4), axis=2), 0)
    window_BF = jax.lax.reduce_window(power_BF, 0.0, jax.lax.add, (1, LOUD_FRAMES), (1, 1), "SAME")
    loudest_B = window_BF.max(axis=1) / jnp.clip(mel_length_B, 1, LOUD_FRAMES)
    silent_BF = power_BF < loudest_B[:, None] * 10 ** (SILENCE_DB / 10)
    frame_F = jnp.arange(mel_BFM.shape[1])
    position_BF = frame_F * speech_length_B[:, None] // jnp.maximum(mel_length_B, 1)[:, None]
    total = jax.vmap(lambda x, index: jax.ops.segment_sum(x, index, num_speech))
    frames_BS = total(valid_BF.astype(jnp.float32), position_BF)
    silent_BS = total((silent_BF & valid_BF).astype(jnp.float32), position_BF)
    return silent_BS / jnp.maximum(frames_BS, 1)


def monotone_spans(
    shares_ST: np.ndarray, silence_S: np.ndarray, opens_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The spans [start, end) of speech positions, one a token in order, of largest likelihood.

    Viterbi over the states of CTC (Graves et al. 2006, figure 3), silence, token, silence, …,
    token, silence, where silence may be passed over: a position is silent with probability
    silence_S, or else says token t with probability shares_ST. So every token has a position, and
    none of the silence around its word. With fewer positions than tokens, positions are divided
    first. Words hold silence too (stops are closed for a while): it does not rule a token out.

    opens_T: bool, whether a token begins a word. Silence stands before these and at the end.
    """
    num_speech, num_text = shares_ST.shape
    fold = -(-num_text // num_speech)  # parts of a position, so that every token gets one
    log = lambda x: np.log(np.maximum(np.repeat(x, fold, axis=0), FLOOR))
    score_SN = np.full((num_speech * fold, 2 * num_text + 1), -np.inf)
    score_SN[:, 1::2] = log(np.maximum(1 - silence_S, CLOSED)[:, None] * shares_ST)
    open_N = np.append(opens_T, True)
    score_SN[:, ::2] = np.where(open_N, log(silence_S)[:, None], -np.inf)

    skips_N = np.arange(2 * num_text + 1) % 2 == 1  # from token to token
    total_N = np.where(np.arange(2 * num_text + 1) < 2, score_SN[0], -np.inf)
    step_SN = np.zeros(score_SN.shape, np.int32)  # how many states on from the position before
    for s in range(1, len(score_SN)):
        one_N = np.append(-np.inf, total_N[:-1])
        two_N = np.where(skips_N, np.append([-np.inf, -np.inf], total_N)[:-2], -np.inf)
        from_3N = np.stack([total_N, one_N, two_N])
        step_SN[s] = from_3N.argmax(axis=0)
        total_N = from_3N.max(axis=0) + score_SN[s]
    n = 2 * num_text - int(total_N[-1] <= total_N[-2])
    state_S = np.zeros(len(score_SN), np.int32)
    for s in range(len(score_SN) - 1, -1, -1):
        state_S[s] = n
        n -= step_SN[s, n]
    tokens_T = 2 * np.arange(num_text) + 1
    starts_T = np.searchsorted(state_S, tokens_T)
    return starts_T / fold, np.searchsorted(state_S, tokens_T, side="right") / fold


def units(text: str, lang: str = "") -> list[tuple[int, int]]:
    """Where the words of a transcript stand in it; in a language without spaces, its letters."""
    pattern = CLUSTER if languages.find(lang).unspaced else regex.compile(r"\S+")
    return [found.span() for found in pattern.finditer(text)]


def _letters_before(text: str) -> np.ndarray:
    """[len(text) + 1]: how many letters (all but spaces) stand before each place of a text."""
    return np.cumsum([0, *(not letter.isspace() for letter in text)])


def token_letters(text: str, begins_T: Sequence[int]) -> np.ndarray:
    """[T, 2]: which letters of the text each token says, [first, end), spaces not counted.

    What no token holds goes to the token before it. Tokens that say a letter together (its bytes),
    and those of spaces alone, say the letters of the next token.
    """
    before = _letters_before(text)
    edges = np.maximum.accumulate(before[[0, *begins_T[1:], len(text)]])
    spans_T2 = np.stack([edges[:-1], edges[1:]], axis=1)
    for ts in (range(len(spans_T2) - 2, -1, -1), range(1, len(spans_T2))):
        for t in ts:
            if spans_T2[t, 0] == spans_T2[t, 1]:
                spans_T2[t] = spans_T2[t + 1 if ts.step < 0 else t - 1]
    return spans_T2


def words_of(
    text: str,
    spans: Sequence[tuple[int, int]],
    begins_T: Sequence[int],
    shares_ST: np.ndarray,
    silence_S: np.ndarray,
) -> list[Word]:
    """The words that stand at `spans` of a transcript, timed in positions.

    A token that says letters of several words divides its time among its letters evenly.

    begins_T: where each token begins in the text. Others: see `shares`; one position a row.
    """
    before = _letters_before(text)
    letters_T2 = token_letters(text, begins_T)
    firsts = {before[a] for a, _ in spans}
    is_same_T = np.append(False, (letters_T2[1:] == letters_T2[:-1]).all(axis=1))
    opens_T = np.array([first in firsts for first in letters_T2[:, 0]]) & ~is_same_T
    starts_T, ends_T = monotone_spans(shares_ST, silence_S, opens_T)

    times_L2 = np.zeros((before[-1], 2))
    for first, end in np.unique(letters_T2, axis=0):
        mine_T = letters_T2[:, 0] == first
        edges = np.linspace(starts_T[mine_T].min(), ends_T[mine_T].max(), end - first + 1)
        times_L2[first:end] = np.stack([edges[:-1], edges[1:]], axis=1)
    words = []
    for a, b in spans:
        first, end = before[a], before[b]
        if first == end:
            continue
        start, stop = times_L2[first, 0], times_L2[end - 1, 1]
        mine_T = (letters_T2[:, 0] < end) & (letters_T2[:, 1] > first)
        share_S = shares_ST[int(start) : int(np.ceil(stop)), mine_T].sum(axis=1)
        words.append(Word(text[a:b], float(start), float(stop), float(share_S.mean())))
    return words


def spoken_times(utterance: sources.Utterance, begins_T: Sequence[int]) -> np.ndarray:
    """[T, 2]: when each token's word begins and ends, relative to the utterance's length.

    NaN where the manifest does not time the words, or times other words than the transcript's.
    """
    spans = sources.word_spans(utterance) if utterance.words else []
    if not spans or not len(begins_T):
        return np.full((len(begins_T), 2), np.nan, np.float32)
    before = _letters_before(utterance.text)
    ends = before[[b for _, b in spans]]
    index_T = np.searchsorted(ends, token_letters(utterance.text, begins_T)[:, 0], side="right")
    times = np.array([(start, end) for _, start, end in utterance.words], np.float32)
    return times[np.minimum(index_T, len(times) - 1)] / utterance.duration


def word_times(
    sample: Sample, shares_ST: np.ndarray, silence_S: np.ndarray
) -> list[tuple[Word, float, float]]:
    """The words of an utterance as `align` times them, each with the start and end of the
    manifest; all in seconds. Empty where it says none. Others: see `shares`."""
    utterance, num_speech, num_text = sample.utterance, len(sample.speech_SD), len(sample.ids_T)
    spans = sources.word_spans(utterance) if utterance.words else []
    if not spans or not num_text:
        return []
    found = words_of(
        utterance.text,
        spans,
        sample.begins_T,
        shares_ST[:num_speech, :num_text],
        silence_S[:num_speech],
    )
    seconds = len(sample.mel_FM) / features.FRAME_RATE / num_speech
    timed = [entry for entry, (a, b) in zip(utterance.words, spans, strict=True) if a < b]
    return [
        (word._replace(start=word.start * seconds, end=word.end * seconds), start, end)
        for word, (_, start, end) in zip(found, timed, strict=True)
    ]


def word_time_figures(
    samples: Sequence[Sample], shares_BST: np.ndarray, silence_BS: np.ndarray
) -> dict[str, float]:
    """How far `align`'s word edges are from those of the manifest, where it times its words.

    `word_time_error_ms`, the median over starts and ends, and `word_times_close`, the share of them
    no further off than CLOSE. Empty where no words are timed.
    """
    errors = []
    for found in map(word_times, samples, shares_BST, silence_BS):
        for word, start, end in found:
            errors += [abs(word.start - start), abs(word.end - end)]
    if not errors:
        return {}
    return {
        "word_time_error_ms": 1000 * float(np.median(errors)),
        "word_times_close": float(np.mean(np.array(errors) <= CLOSE)),
    }
