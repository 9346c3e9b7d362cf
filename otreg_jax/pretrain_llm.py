"""Text-only pretraining of a small from-scratch LLM, before it meets speech.

An SLM's LLM knows the language and can copy what stands in its context. A tiny LLM learns both here
from the training sentences alone: part of the examples are plain text, in the others the place of
the speech is taken by the transcript's own embeddings, each repeated a random number of times with
fillers between them, all under noise: what ideally aligned speech would look like.
"""

import functools
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from otreg_jax import build, losses, pretrained
from otreg_jax.data import prompts
from otreg_jax.models import slm as slm_lib
from otreg_jax.models.llm import LLM

FILLER = -1  # in place of a token id: noise without a token


def ensure_llm(config, tokenizer, sentences: list[str], out_dir) -> None:
    """Writes the pretrained LLM to `out_dir` in Hugging Face layout, unless it is there, made of
    the same text in the same way (pretrain.json beside it says how)."""
    recipe = {
        "seed": config.seed,
        "prompt": prompts.example(config),
        "tokenizer": tokenizer.fingerprint,
        "text": hashlib.sha256("\n".join(sentences).encode()).hexdigest(),
        "llm": config.llm.to_dict(),
    }
    stored = Path(out_dir) / "pretrain.json"
    if not stored.exists() or json.loads(stored.read_text()) != recipe:
        llm, params = pretrain(config, tokenizer, sentences)
        pretrained.save_llm(out_dir, llm, params, tokenizer)
        stored.write_text(json.dumps(recipe, indent=2) + "\n")


def pretrain(config, tokenizer, sentences: list[str]):
    """(LLM, params) trained for `config.llm.pretrain.num_steps` on the sentences."""
    c = config.llm.pretrain
    llm = LLM(build.new_llm_config(config, tokenizer.vocab_size))
    init = jax.jit(llm.init)
    params = init(jax.random.key(config.seed), jnp.zeros((1, 4), jnp.int32))["params"]
    slm = slm_lib.SLM(None, None, llm, prompts.shared(tokenizer, config))
    encoded = [tokenizer.encode(sentence) for sentence in sentences]
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, c.learning_rate, max(c.num_steps // 20, 1), c.num_steps, 0.0
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))

    @jax.jit
    def step(params, opt_state, batch, key):
        loss_of = lambda p: copy_loss(slm, {"llm": p}, batch, key, c.noise)
        (loss, accuracy), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss, accuracy

    opt_state = optimizer.init(params)
    progress = tqdm.trange(c.num_steps, desc="pretraining the LLM on text", mininterval=0.5)
    for i in progress:
        batch = make_batch(encoded, c, np.random.default_rng((config.seed, i)))
        key = jax.random.fold_in(jax.random.key(config.seed), i)
        params, opt_state, loss, accuracy = step(params, opt_state, batch, key)
        if i % 50 == 49:
            progress.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}")
    return llm, params


def make_batch(encoded: list[list[int]], c, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random sentences: "tokens" [B, T], "token_length" [B], and the stretched copies in the place
    of speech, "source" [B, S] (token ids or FILLER), "source_length" [B] (0: plain text)."""
    longest = max(map(len, encoded))
    num_source = longest * (c.max_repeat + 3) // 2  # a little over the mean length
    tokens = np.zeros((c.batch_size, longest), np.int32)
    source = np.full((c.batch_size, num_source), FILLER, np.int32)
    token_length = np.zeros(c.batch_size, np.int32)
    source_length = np.zeros(c.batch_size, np.int32)
    for row, pick in enumerate(rng.integers(len(encoded), size=c.batch_size)):
        ids = np.asarray(encoded[pick], np.int32)
        tokens[row, : len(ids)], token_length[row] = ids, len(ids)
        if rng.random() < c.copy_fraction:
            repeats = rng.integers(1, c.max_repeat + 1, size=len(ids))
            fillers = rng.integers(0, 2, size=len(ids))
            while repeats.sum() + fillers.sum() > num_source:
                repeats = np.maximum(repeats - 1, 1)
            pairs = np.stack([ids, np.full_like(ids, FILLER)], axis=1).ravel()
            stretched = np.repeat(pairs, np.stack([repeats, fillers], axis=1).ravel())
            source[row, : len(stretched)], source_length[row] = stretched, len(stretched)
    return {
        "tokens": tokens,
        "token_length": token_length,
        "source": source,
        "source_length": source_length,
    }


def copy_loss(slm: slm_lib.SLM, params, batch, key, noise: float):
    """Cross-entropy and accuracy of the transcript after its stretched, noisy embeddings."""
    source_BSD = slm_lib.embed(slm, params, jnp.maximum(batch["source"], 0))
    source_BSD = jnp.where((batch["source"] == FILLER)[..., None], 0, source_BSD)
    table_VD = params["llm"]["embed"]["embedding"]
    deviation = noise * jnp.sqrt(jnp.mean(jnp.square(table_VD)))
    source_BSD += deviation * jax.random.normal(key, source_BSD.shape)
    text_BTD = slm_lib.embed(slm, params, batch["tokens"])
    x_BLD, start_B = slm_lib.assemble(slm, params, source_BSD, batch["source_length"], text_BTD)
    hidden_BLD, _ = slm.llm.apply({"params": params["llm"]}, x_BLD, method="hidden")
    hidden_BTD = slm_lib.predicting(hidden_BLD, start_B, batch["tokens"].shape[1] + 1)
    return losses.cross_entropy(
        hidden_BTD,
        functools.partial(slm_lib.logits, slm, params),
        batch["tokens"],
        batch["token_length"],
        jnp.ones_like(batch["token_length"], bool),
        slm.prompt.eos,
    )
