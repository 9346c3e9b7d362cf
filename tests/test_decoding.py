"""Batched = single decoding, beams against exhaustive search, transformers' generate."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from otreg_jax import decoding, pretrained
from otreg_jax.models.llm import LLM, LLMConfig

EOS = 3
CONFIG = LLMConfig(
    vocab_size=29, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=32
)


@pytest.fixture(scope="module")
def model():
    llm = LLM(CONFIG)
    params = jax.jit(llm.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    # Larger than any initialisation, so that hypotheses differ and several end before the limit.
    return llm, jax.tree.map(lambda leaf: leaf * 2.5, params)


def prompts(count, size=7, seed=1):
    x_BPD = jax.random.normal(jax.random.key(seed), (count, size, CONFIG.embed_dim))
    length_B = jnp.asarray(np.random.default_rng(seed).integers(1, size + 1, count), jnp.int32)
    padding = jnp.arange(size) >= length_B[:, None]
    return jnp.where(padding[..., None], jnp.nan, x_BPD), length_B  # padding must never be read


@functools.partial(jax.jit, static_argnames="llm")
def next_token_log_probs(llm, params, x_BPD, length_B, tokens_BN):
    """[B, N, V] after every prefix of the tokens, by teacher forcing without a cache."""
    text_BND = llm.apply({"params": params}, tokens_BN, method="embed")
    x_BPD = jnp.where((jnp.arange(x_BPD.shape[1]) < length_B[:, None])[..., None], x_BPD, 0)
    both_BLD = jnp.concatenate([x_BPD, text_BND], axis=1)
    index_BL = jnp.arange(both_BLD.shape[1])
    gap_B = x_BPD.shape[1] - length_B
    index_BL = index_BL + jnp.where(index_BL >= length_B[:, None], gap_B[:, None], 0)
    index_BL = jnp.minimum(index_BL, both_BLD.shape[1] - 1)
    x_BLD = jnp.take_along_axis(both_BLD, index_BL[..., None], axis=1)
    hidden, _ = llm.apply({"params": params}, x_BLD, method="hidden")
    index_BN = length_B[:, None] - 1 + jnp.arange(tokens_BN.shape[1])
    hidden = jnp.take_along_axis(hidden, index_BN[..., None], axis=1)
    return jax.nn.log_softmax(llm.apply({"params": params}, hidden, method="logits"))


def hypotheses(out):
    return [list(map(int, row[:n])) for row, n in zip(out.tokens, out.length, strict=True)]


@pytest.mark.parametrize("search", [decoding.greedy, decoding.beam_search])
def test_weights_made_ready_once_a_run_are_not_transposed_in_every_call(model, search):
    llm, params = model
    x, length = prompts(3)
    settings = decoding.Settings(5, 2 if search is decoding.beam_search else 1)
    step_params = decoding.prepare_steps(llm, params)
    once, each = (
        functools.partial(search, *model, x, length, EOS, settings, step_params=ready)
        for ready in (step_params, None)
    )
    np.testing.assert_array_equal(once().tokens, each().tokens)
    transposed = lambda ready: search.lower(
        *model, x, length, EOS, settings, step_params=ready
    ).as_text()
    kernel = "tensor<32x16xf32>) -> tensor<16x32xf32>"  # the MLP's last
    assert kernel in transposed(None) and kernel not in transposed(step_params)


def test_greedy_takes_the_best_token_at_every_step(model):
    x, length = prompts(8)
    out = decoding.greedy(*model, x, length, EOS, decoding.Settings(9))
    ended = out.length < 9
    assert 0 < ended.sum() < 8  # both ways of ending took place
    np.testing.assert_array_equal(out.finished, ended)
    with_eos = jnp.where(jnp.arange(9) == out.length[:, None], EOS, out.tokens)
    log_prob = next_token_log_probs(*model, x, length, with_eos)
    counts = out.length + ended
    within = jnp.arange(9) < counts[:, None]
    np.testing.assert_array_equal(
        jnp.where(within, log_prob.argmax(axis=-1), 0), jnp.where(within, with_eos, 0)
    )
    np.testing.assert_allclose(
        out.score, log_prob.max(axis=-1, initial=-99).sum(1, where=within), atol=1e-4
    )


@pytest.mark.parametrize("width", [1, 3])
def test_batch_gives_what_each_example_alone_gives(model, width):
    x, length = prompts(8)
    search = decoding.greedy if width == 1 else decoding.beam_search

    def decode(x, length):
        return search(*model, x, length, EOS, decoding.Settings(9, width))

    together = decode(x, length)
    for i in range(8):
        alone = decode(x[i : i + 1], length[i : i + 1])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
        np.testing.assert_array_equal(alone.length[0], together.length[i])
        np.testing.assert_allclose(alone.score[0], together.score[i], atol=1e-4)


@pytest.mark.parametrize("width", [1, 3])
def test_a_limit_of_its_own_ends_an_example_as_if_it_held_for_all(model, width):
    x, length = prompts(8)
    search = decoding.greedy if width == 1 else decoding.beam_search
    limit = jnp.array([4, 9, 4, 20, 4, 9, 4, 4])
    own = search(*model, x, length, EOS, decoding.Settings(9, width), limit)
    for size in (4, 9):
        wanted = search(*model, x, length, EOS, decoding.Settings(size, width))
        rows = np.minimum(limit, 9) == size
        tokens = jnp.pad(wanted.tokens, [(0, 0)] * (wanted.tokens.ndim - 1) + [(0, 9 - size)])
        np.testing.assert_array_equal(own.tokens[rows], tokens[rows])
        np.testing.assert_array_equal(own.length[rows], wanted.length[rows])
        np.testing.assert_array_equal(own.finished[rows], wanted.finished[rows])
        np.testing.assert_allclose(own.score[rows], wanted.score[rows], atol=1e-4)
        assert not wanted.finished[rows].all()  # limits were met


def test_settings_without_effect_are_refused():
    decoding.check(decoding.Settings(9))
    decoding.check(decoding.Settings(9, 2, 0.5, 3))
    with pytest.raises(ValueError, match="length_penalty=0.5 .* needs beam_width=2 or more"):
        decoding.check(decoding.Settings(9, 1, 0.5))
    with pytest.raises(ValueError, match="beam_width=0: .*; no_repeat_ngram=-1 is below 0"):
        decoding.check(decoding.Settings(9, 0, 1.0, -1))


def test_beam_of_one_is_greedy(model):
    x, length = prompts(8)
    greedy = decoding.greedy(*model, x, length, EOS, decoding.Settings(9))
    beam = decoding.beam_search(*model, x, length, EOS, decoding.Settings(9, 1, 0.0))
    np.testing.assert_array_equal(beam.tokens[:, 0], greedy.tokens)
    np.testing.assert_array_equal(beam.length[:, 0], greedy.length)
    np.testing.assert_allclose(beam.score[:, 0], greedy.score, atol=1e-4)
    np.testing.assert_array_equal(beam.finished[:, 0], greedy.finished)


def test_wider_beams_find_more_probable_hypotheses(model):
    x, length = prompts(8)
    greedy = decoding.greedy(*model, x, length, EOS, decoding.Settings(9))
    beam = decoding.beam_search(*model, x, length, EOS, decoding.Settings(9, 4, 0.0))
    assert (beam.score[:, 0] >= greedy.score - 1e-4).all()
    assert (beam.score[:, 0] > greedy.score + 0.1).any()
    assert (jnp.diff(beam.score, axis=1) <= 0).all()  # n-best, the best first
    for tokens, count in zip(beam.tokens, beam.length, strict=True):
        assert len({tuple(map(int, t[:n])) for t, n in zip(tokens, count, strict=True)}) == 4


def test_widest_beam_is_exhaustive_search(model):
    x, length = prompts(1)
    out = decoding.beam_search(*model, x, length, EOS, decoding.Settings(2, 29))
    others = [v for v in range(29) if v != EOS]
    candidates = [[EOS], *([v, EOS] for v in others), *itertools.product(others, repeat=2)]
    batch = jnp.asarray([[*c, 0][:2] for c in candidates], jnp.int32)
    x, length = jnp.repeat(x, len(batch), axis=0), jnp.repeat(length, len(batch))
    log_prob = next_token_log_probs(*model, x, length, batch)
    chosen = jnp.take_along_axis(log_prob, batch[..., None], axis=-1)[..., 0]
    counts = np.array([len(c) for c in candidates])
    scores = np.where(counts == 1, chosen[:, 0], chosen.sum(axis=1) / 2)
    order = np.argsort(-scores)[:5]
    found = [list(map(int, out.tokens[0, w, : out.length[0, w]])) for w in range(5)]
    assert found == [[t for t in candidates[i] if t != EOS] for i in order]
    assert out.finished[0, :5].tolist() == [EOS in candidates[i] for i in order]
    np.testing.assert_allclose(out.score[0, :5], scores[order], atol=1e-4)


def test_no_ngram_is_repeated(model):
    x, length = prompts(8)
    free = decoding.greedy(*model, x, length, -1, decoding.Settings(24))

    def repeats(out):
        return [
            len(pairs) - len(set(pairs))
            for tokens in hypotheses(out)
            for pairs in [list(zip(tokens, tokens[1:], strict=False))]
        ]

    assert max(repeats(free)) > 0
    guarded = decoding.greedy(*model, x, length, -1, decoding.Settings(24, no_repeat_ngram=2))
    assert max(repeats(guarded)) == 0


def test_eight_devices_decode_as_one(model):
    llm, params = model
    x, length = prompts(8)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    sharded = jax.device_put((x, length), rows)
    replicated = jax.device_put(params, everywhere)
    for decode in (
        lambda *args: decoding.greedy(llm, *args, EOS, decoding.Settings(9)),
        lambda *args: decoding.beam_search(llm, *args, EOS, decoding.Settings(9, 3)),
    ):
        one, eight = decode(params, x, length), decode(replicated, *sharded)
        np.testing.assert_array_equal(one.tokens, eight.tokens)
        np.testing.assert_allclose(one.score, eight.score, atol=1e-4)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A tiny random Qwen2 of transformers', and the same weights here."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("qwen2")
    theirs.save_pretrained(folder)
    return theirs, pretrained.load_llm(folder)


def generate(theirs, x_BPD, length_B, **settings):
    """Token lists (the end of sequence cut off), n-best each, by transformers one at a time."""
    import torch

    for x_PD, length in zip(np.asarray(x_BPD), np.asarray(length_B), strict=True):
        prompt = torch.from_numpy(x_PD[None, :length].copy())
        with torch.no_grad():
            out = theirs.generate(
                inputs_embeds=prompt,
                attention_mask=torch.ones(1, length, dtype=torch.long),
                do_sample=False,
                eos_token_id=EOS,
                pad_token_id=EOS,
                **settings,
            )
        yield [[t for t in row if t != EOS] for row in out.tolist()]


@pytest.mark.parametrize("no_repeat_ngram", [0, 2])
def test_greedy_matches_transformers(reference, no_repeat_ngram):
    theirs, (llm, params) = reference
    x, length = prompts(8)
    settings = decoding.Settings(12, no_repeat_ngram=no_repeat_ngram)
    out = decoding.greedy(llm, params, x, length, EOS, settings)
    wanted = generate(
        theirs, x, length, max_new_tokens=12, num_beams=1, no_repeat_ngram_size=no_repeat_ngram
    )
    assert [[tokens] for tokens in hypotheses(out)] == list(wanted)
    assert len({len(tokens) for tokens in hypotheses(out)}) > 1


@pytest.mark.parametrize("width, length_penalty, ngram", [(4, 1.0, 0), (3, 2.0, 2)])
def test_beam_search_matches_transformers(reference, width, length_penalty, ngram):
    theirs, (llm, params) = reference
    x, length = prompts(8)
    settings = decoding.Settings(10, width, length_penalty, ngram)
    out = decoding.beam_search(llm, params, x, length, EOS, settings)
    wanted = generate(
        theirs,
        x,
        length,
        max_new_tokens=10,
        num_beams=width,
        num_return_sequences=width,
        length_penalty=length_penalty,
        early_stopping=False,
        no_repeat_ngram_size=ngram,
    )
    for i, best in enumerate(wanted):
        found = hypotheses(jax.tree.map(lambda leaf, i=i: leaf[i], out))
        assert found == best
