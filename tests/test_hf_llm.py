"""Every LLM family against transformers, on tiny random models it saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from otreg_jax import pretrained
from otreg_jax.models.llm import init_cache

VOCAB = 61
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=10_000.0, factor=8.0, original_max_position_embeddings=64)
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)  # within so small a vocabulary
CONFIGS = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "llama3-tied-biased": transformers.LlamaConfig(
        **SHAPE,
        head_dim=18,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=LLAMA3,
    ),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=5),
    "qwen2-windowed": transformers.Qwen2Config(
        **SHAPE,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
        tie_word_embeddings=True,
    ),
    "qwen2-yarn": transformers.Qwen2Config(**SHAPE, rope_parameters=YARN),
    "qwen3": transformers.Qwen3Config(**(SHAPE | {"num_key_value_heads": 1}), head_dim=14),
    "gemma2": transformers.Gemma2Config(
        **SHAPE, head_dim=16, sliding_window=4, query_pre_attn_scalar=24
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **SHAPE,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_scaling=dict(rope_type="linear", factor=8.0),
        query_pre_attn_scalar=24,
        final_logit_softcapping=3.0,
    ),
    # Two repetitions of two layers; the global heads are wider and their values are their keys.
    "gemma4": transformers.Gemma4TextConfig(
        **(SHAPE | {"num_hidden_layers": 4}),
        head_dim=12,
        global_head_dim=16,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        final_logit_softcapping=3.0,
    ),
    # As published: a share of the pairs for each axis of an image, which a text does not have.
    "qwen3_5": transformers.Qwen3_5TextConfig(
        **(SHAPE | {"num_hidden_layers": 4}),
        head_dim=16,
        full_attention_interval=2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        rms_norm_eps=1e-3,  # below it the reference's own rounding shows: a norm of nearly nothing
        linear_value_head_dim=8,
        rope_parameters=dict(
            rope_type="default",
            rope_theta=10_000.0,
            partial_rotary_factor=0.5,
            mrope_interleaved=True,
            mrope_section=[2, 1, 1],
        ),
    ),
    "phi3": transformers.Phi3Config(**SHAPE, **IDS, sliding_window=5),
    # As Phi-4-mini: three quarters of a head turn, each pair stretched by its own factor.
    "phi3-longrope": transformers.Phi3Config(
        **SHAPE,
        **IDS,
        original_max_position_embeddings=64,
        tie_word_embeddings=True,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=10_000.0,
            partial_rotary_factor=2 / 3,
            short_factor=[1.0, 1.2, 1.5, 2.0],
            long_factor=[2.0, 3.0, 4.0, 5.0],
        ),
    ),
    "olmo2": transformers.Olmo2Config(**SHAPE, **IDS),
    "granite": transformers.GraniteConfig(
        **SHAPE,
        embedding_multiplier=12.0,
        attention_multiplier=0.2,
        residual_multiplier=0.22,
        logits_scaling=8.0,
    ),
    "smollm3": transformers.SmolLM3Config(**SHAPE, **IDS, no_rope_layer_interval=2),
    "ministral3": transformers.Ministral3Config(
        **SHAPE,
        **IDS,
        head_dim=16,
        rope_parameters=YARN
        | dict(original_max_position_embeddings=4, llama_4_scaling_beta=0.5, mscale_all_dim=1.0),
    ),
}


@pytest.fixture(scope="module", params=CONFIGS, ids=list(CONFIGS))
def family(request, tmp_path_factory):
    """(directory, the transformers model, its tokens [2, 11] and their logits)."""
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # far from every initial value, biases and norms too
            parameter += 0.2 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer += 0.2 * torch.randn_like(buffer)
    directory = tmp_path_factory.mktemp(request.param)
    model.eval().save_pretrained(directory)
    tokens = torch.randint(0, VOCAB, (2, 11))
    with torch.no_grad():
        logits = model(tokens).logits
    return directory, model, tokens, logits.numpy()


def test_matches_transformers_and_round_trips(family, tmp_path):
    directory, model, tokens, logits = family
    llm, params = pretrained.load_llm(directory)
    tokens_BL = jnp.asarray(tokens.numpy(), jnp.int32)
    ours = jax.jit(llm.apply)({"params": params}, tokens_BL)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, logits, atol=1e-4, rtol=0)

    @jax.jit
    def step(token_B, position, cache):
        x = llm.apply({"params": params}, token_B[:, None], method="embed")
        positions = jnp.full((2, 1), position)
        x, cache = llm.apply({"params": params}, x, positions, cache, method="hidden")
        return llm.apply({"params": params}, x[:, 0], method="logits"), cache

    # Token by token through the cache, then on greedily.
    cache = init_cache(llm.config, batch=2, length=16)
    decoded, generated = [], []
    for position in range(16):
        if position < 11:
            token_B = tokens_BL[:, position]
        else:
            token_B = jnp.argmax(decoded[-1], axis=-1)
            generated.append(token_B)
        step_logits, cache = step(token_B, position, cache)
        decoded.append(step_logits)
    np.testing.assert_allclose(jnp.stack(decoded[:11], 1), logits, atol=1e-4, rtol=0)
    theirs = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
    )
    np.testing.assert_array_equal(jnp.stack(generated, 1), theirs[:, 11:])

    pretrained.save_llm(tmp_path, llm, params)
    first, back = (load_file(d / "model.safetensors") for d in (directory, tmp_path))
    assert set(first) == set(back)
    for name, tensor in first.items():
        assert tensor.dtype == back[name].dtype
        np.testing.assert_array_equal(tensor, back[name], err_msg=name)
    reopened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    with torch.no_grad():
        np.testing.assert_array_equal(reopened(tokens).logits.numpy(), logits)
