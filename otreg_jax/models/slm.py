"""The spoken language model: speech encoder, adapter and LLM over one sequence

    [prompt prefix | speech | prompt suffix | transcript]

Sequences are packed so that all padding is at the right end: attention is then purely causal and
needs no mask, positions count real tokens only, and a padded batch gives what each example alone
gives. Logits are computed at the transcript's positions only, never over the whole sequence.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh

from otreg_jax import packing, sharding
from otreg_jax.data.text import Prompt
from otreg_jax.models import adapter, encoders, lora
from otreg_jax.models.adapter import Adapter, AdapterConfig
from otreg_jax.models.encoders import EncoderConfig
from otreg_jax.models.llm import LLM, LLMConfig, between, sublayers

# What a batch has where each row has a prompt of its own.
PROMPT = ("prefix", "prefix_length", "suffix", "suffix_length")


class SLM(NamedTuple):
    """The modules, the prompt and the mesh to compute on (None: one device); `make` makes it.
    Weights are {"encoder": ..., "adapter": ..., "llm": ...}."""

    encoder: nn.Module  # of `encoders`
    adapter: Adapter
    llm: LLM
    prompt: Prompt
    mesh: Mesh | None = None


def make(
    encoder: EncoderConfig,
    adapter: AdapterConfig,
    llm: LLMConfig,
    prompt: Prompt,
    mesh: Mesh | None = None,
) -> SLM:
    """The SLM of these parts, which all compute on `mesh`."""
    return SLM(encoders.make(encoder, mesh), Adapter(adapter), LLM(llm, mesh), prompt, mesh)


class Outputs(NamedTuple):
    """What `forward` returns.

    hidden_BTD: the T + 1 hidden states that predict: state t predicts transcript token t, the last
      one after a transcript of full length the end of sequence. `logits` turns them into logits.
      None with `predict=False`.
    speech_BSD, text_BTD: the embeddings OTReg compares; for layer 0 the adapter's outputs and the
      embedding table's rows, for layer k hidden states after k layers.
    speech_length_B: int32, valid speech positions.
    adapted_BSD: the adapter's outputs, whatever the layer.
    compared: {layer: (speech [B, S, D], text [B, T, D])} of all the layers that were asked for.
    """

    hidden_BTD: jax.Array | None
    speech_BSD: jax.Array
    text_BTD: jax.Array
    speech_length_B: jax.Array
    adapted_BSD: jax.Array
    compared: dict[int, tuple[jax.Array, jax.Array]]


def speech_embeddings(
    slm: SLM, params, mel_BFM: jax.Array, mel_length_B: jax.Array, rngs=None, segments_RW=None
) -> tuple[jax.Array, jax.Array]:
    """The encoder's frames -> adapter outputs [B, S, D] and their lengths [B]. segments_RW: the
    encoder's, see `packing`; None: its rows are not packed."""
    inputs = [mel_BFM, mel_length_B] + ([] if segments_RW is None else [segments_RW])
    encoded_BSE, length_B = slm.encoder.apply({"params": params["encoder"]}, *inputs)
    return adapt(slm, params, encoded_BSE, length_B, rngs)


def adapt(slm: SLM, params, encoded_BSE: jax.Array, length_B: jax.Array, rngs=None):
    """The encoder's outputs and their lengths -> adapter outputs [B, S, D] and theirs [B]."""
    speech_BSD, length_B = slm.adapter.apply(
        {"params": params["adapter"]}, encoded_BSE, length_B, rngs=rngs
    )
    return sharding.over_batch(speech_BSD, slm.mesh), length_B


def speech_length(slm: SLM, mel_length):
    """Speech embeddings that `mel_length` frames become; an int or an array of them."""
    positions = encoders.output_length(slm.encoder.config, mel_length)
    return adapter.output_length(slm.adapter.config, positions)


def positions_of(slm: SLM, prompted: bool) -> Callable:
    """A function of mel frames, an int or an array: the LLM's positions that they become, with the
    SLM's prompt if `prompted`. Loader processes may have it, it holds no device."""
    slm = make(slm.encoder.config, slm.adapter.config, slm.llm.config, slm.prompt)
    around = len(slm.prompt.prefix) + len(slm.prompt.suffix) if prompted else 0
    return lambda frames: around + speech_length(slm, frames)


def embed(slm: SLM, params, tokens: jax.Array) -> jax.Array:
    """Token ids [...] -> input embeddings [..., D], as the LLM receives them."""
    return slm.llm.apply({"params": params["llm"]}, tokens, method="embed")


def prompt_of(batch) -> dict[str, jax.Array] | None:
    """The prompts of a batch, {"prefix" [B, P], "prefix_length" [B], "suffix" [B, Q],
    "suffix_length" [B]}, where each row has its own; None where all have the SLM's."""
    return {key: batch[key] for key in PROMPT} if PROMPT[0] in batch else None


def transcript_of(batch) -> tuple[jax.Array, jax.Array]:
    """What is said in the audio, tokens [B, T] and their number [B] (0: unknown): "transcript",
    where that is not what the model answers."""
    if "transcript" in batch:
        return batch["transcript"], batch["transcript_length"]
    return batch["tokens"], batch["token_length"]


def assemble(
    slm: SLM,
    params,
    speech_BSD: jax.Array,
    speech_length_B: jax.Array,
    text_BTD: jax.Array | None,
    prompt: dict[str, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Packs prompt, speech and transcript embeddings into one right-padded sequence.

    prompt: each row's own, see `prompt_of`; None: the SLM's.

    Returns:
      x_BLD with L = prefix + S + suffix + T, and start_B: the index of the last position before the
      transcript, whose logits predict the first transcript token.
    """
    around = functools.partial(_prompt_part, slm, params, prompt, len(speech_BSD))
    parts = [around("prefix"), (speech_BSD, speech_length_B), around("suffix")]
    unpacked = [x.astype(speech_BSD.dtype) for x, _ in parts]
    if text_BTD is not None:
        unpacked.append(text_BTD.astype(speech_BSD.dtype))
    unpacked_BLD = jnp.concatenate(unpacked, axis=1)
    index_1L = jnp.arange(unpacked_BLD.shape[1])[None]
    source_BL, end_B = index_1L, jnp.zeros_like(speech_length_B)
    for x_BND, length_B in parts:  # behind each part, everything moves left over its padding
        end_B = end_B + length_B
        padding_B = x_BND.shape[1] - length_B
        source_BL = source_BL + jnp.where(index_1L >= end_B[:, None], padding_B[:, None], 0)
    source_BL = jnp.minimum(source_BL, unpacked_BLD.shape[1] - 1)
    x_BLD = jnp.take_along_axis(unpacked_BLD, source_BL[..., None], axis=1)
    x_BLD = sharding.over_batch(x_BLD, slm.mesh)
    return x_BLD, end_B - 1


def _prompt_part(slm: SLM, params, prompt, batch: int, name: str) -> tuple[jax.Array, jax.Array]:
    """Embeddings [B, N, D] of the "prefix" or the "suffix", and how many of them are valid [B]."""
    if prompt is not None:
        return embed(slm, params, prompt[name]), prompt[f"{name}_length"]
    ids = getattr(slm.prompt, name)
    x_ND = embed(slm, params, jnp.asarray(ids, jnp.int32))
    return jnp.broadcast_to(x_ND, (batch, *x_ND.shape)), jnp.full(batch, len(ids), jnp.int32)


def predicting(hidden_BLD: jax.Array, start_B: jax.Array, count: int) -> jax.Array:
    """The hidden states [B, count, D] at start_B, start_B + 1, ..."""
    index_BT = start_B[:, None] + jnp.arange(count)[None]
    index_BT = jnp.clip(index_BT, 0, hidden_BLD.shape[1] - 1)
    return jnp.take_along_axis(hidden_BLD, index_BT[..., None], axis=1)


def logits(slm: SLM, params, hidden: jax.Array) -> jax.Array:
    """Hidden states [..., D] -> float32 logits [..., V]."""
    return slm.llm.apply({"params": params["llm"]}, hidden, method="logits")


def forward(
    slm: SLM,
    params,
    batch,
    layer: int = 0,
    rngs=None,
    predict: bool = True,
    further_layers: tuple[int, ...] = (),
) -> Outputs:
    """The teacher-forced forward pass over a batch of the data pipeline.

    Args:
      batch: {"mel" [B, F, M], "mel_length" [B], "tokens" [B, T], "token_length" [B]}, and what
        `prompt_of` and `transcript_of` look for; the encoder's kept outputs "encoded" [B, S, E] may
        stand in for "mel". With "segments" [R, W] (see `packing`) the LLM runs on packed rows, with
        "encoder_segments" the encoder.
      layer: where OTReg compares speech and text; see `Outputs`.
      rngs: {"dropout": key} in training with dropout.
      predict: whether the transcript's hidden states are wanted. Without them no more of the LLM
        runs than the layers below OTReg's embeddings.
      further_layers: beside `layer`, for `Outputs.compared`.
    """
    if "encoded" in batch:
        positions_B = encoders.output_length(slm.encoder.config, batch["mel_length"])
        adapted_BSD, speech_length_B = adapt(slm, params, batch["encoded"], positions_B, rngs)
    else:
        mel, segments = (batch["mel"], batch["mel_length"]), batch.get("encoder_segments")
        adapted_BSD, speech_length_B = speech_embeddings(slm, params, *mel, rngs, segments)
    layers = sorted({layer, *further_layers})
    text = {k: text_embeddings(slm, params, transcript_of(batch)[0], k) for k in layers}
    speech, taps, hidden_BTD = {0: adapted_BSD}, tuple(k for k in layers if k), None
    if predict or taps:
        # Attention is causal: what follows the speech does not change its states.
        answer_BTD = embed(slm, params, batch["tokens"]) if predict else None
        prompt = prompt_of(batch)
        x_BLD, start_B = assemble(slm, params, adapted_BSD, speech_length_B, answer_BTD, prompt)
        model, model_params = slm.llm, params["llm"]
        if not predict:
            model, model_params = sublayers(model, model_params, 0, taps[-1])
        packed = None
        if predict and "segments" in batch:
            packed = packing.packed(batch["segments"], *x_BLD.shape[:2])
        x_RWD, variables = packing.pack_rows(x_BLD, packed), {"params": model_params}
        out = model.apply(variables, x_RWD, taps, packed, method="hidden_and_taps")
        hidden_BLD, tapped = jax.tree.map(lambda x: packing.unpack_rows(x, packed), out)
        first, size = len(slm.prompt.prefix), adapted_BSD.shape[1]
        cut = lambda tapped_BLD: tapped_BLD[:, first : first + size]
        if prompt:
            cut = lambda tapped_BLD: predicting(tapped_BLD, prompt["prefix_length"], size)
        speech |= dict(zip(taps, map(cut, tapped), strict=True))
    if predict:
        hidden_BTD = predicting(hidden_BLD, start_B, batch["tokens"].shape[1] + 1)
    compared = {k: (speech[k], text[k]) for k in layers}
    return Outputs(hidden_BTD, *compared[layer], speech_length_B, adapted_BSD, compared)


def read(slm: SLM, params, batch) -> tuple[jax.Array, dict]:
    """The transcript read by the LLM, without LoRA and without gradient, in the place of the speech
    that `forward` has there: states [B, T + 1, D] that predict the answer as `hidden_BTD` does, and
    the parameters that `logits` turns them into logits with."""
    params = {"llm": jax.lax.stop_gradient(lora.strip(params["llm"]))}
    heard_BT, length_B = transcript_of(batch)
    heard_BTD, answer_BTD = (embed(slm, params, ids) for ids in (heard_BT, batch["tokens"]))
    x_BLD, start_B = assemble(slm, params, heard_BTD, length_B, answer_BTD, prompt_of(batch))
    hidden_BLD, _ = slm.llm.apply({"params": params["llm"]}, x_BLD, method="hidden")
    return predicting(hidden_BLD, start_B, batch["tokens"].shape[1] + 1), params


def text_embeddings(slm: SLM, params, tokens_BT: jax.Array, layer: int = 0) -> jax.Array:
    """What OTReg draws speech to [B, T, D]: for layer 0 rows of the embedding table; for layer k
    the transcript alone through the LLM's first k layers, without LoRA and without gradient: a
    target that training the speech side cannot move. Where training moves these weights themselves,
    `params["target"]["llm"]` may hold what they were (`build.text_target`)."""
    base = jax.lax.stop_gradient(lora.strip(params["llm"]))
    below, base = sublayers(slm.llm, base, 0, layer)
    target = params.get("target", {}).get("llm", {})
    if "layers" in target:
        target = target | {"layers": between(slm.llm.config, target["layers"], 0, layer)}
    flat = traverse_util.flatten_dict(base) | traverse_util.flatten_dict(target)
    variables = {"params": traverse_util.unflatten_dict(flat)}
    x_BTD = below.apply(variables, tokens_BT, method="embed")
    return below.apply(variables, x_BTD, method="hidden")[0]
