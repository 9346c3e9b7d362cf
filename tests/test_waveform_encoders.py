"""Encoders that read the waveform against transformers, on tiny random models that it saved."""

import dataclasses
import logging
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from toy_run import tone_config

from otreg_jax import build, encode_once, pretrained, recognition, sharding, train, transcribe
from otreg_jax.data import features, sources
from otreg_jax.models import encoders
from otreg_jax.pretrained import encoders as files

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
WAVE = SHAPE | {
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 7,
}
PARAKEET = SHAPE | {
    "attention_bias": False,
    "conv_kernel_size": 5,
    "num_mel_bins": 16,
    "subsampling_factor": 4,
    "subsampling_conv_channels": 4,
}
# Of each: its class and configuration; the part that is the encoder; what makes its inputs, and
# how many samples that takes at least. Settings have at least two of their values, distances and
# WavLM's buckets are soon used up.
WAVEFORM = transformers.Wav2Vec2FeatureExtractor(), 0
MODELS = {
    "wav2vec2": (
        transformers.Wav2Vec2ForCTC,
        WAVE | {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True},
        "wav2vec2",
        *WAVEFORM,
    ),
    "hubert": (
        transformers.HubertForCTC,
        WAVE | {"feat_proj_layer_norm": False},
        "hubert",
        *WAVEFORM,
    ),
    "wavlm": (
        transformers.WavLMModel,
        WAVE | {"num_buckets": 8, "max_bucket_distance": 6, "num_conv_pos_embeddings": 5},
        "",
        *WAVEFORM,
    ),
    "wav2vec2-bert": (
        transformers.Wav2Vec2BertForCTC,
        SHAPE
        | {"vocab_size": 7, "conv_depthwise_kernel_size": 5}
        | {"left_max_position_embeddings": 4, "right_max_position_embeddings": 2},
        "wav2vec2_bert",
        transformers.SeamlessM4TFeatureExtractor(),
        640,
    ),
    "parakeet": (
        transformers.ParakeetForCTC,
        {"vocab_size": 7, "encoder_config": PARAKEET, "pad_token_id": 6},
        "encoder",
        transformers.ParakeetFeatureExtractor(feature_size=16),
        0,
    ),
}
FRAMES = 40


def make(name, folder):
    """transformers' encoder; the model that it is in is saved to the folder."""
    kind, config, part, extract, _ = MODELS[name]
    torch.manual_seed(0)
    model = kind(kind.config_class(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for buffer, values in model.named_buffers():
            if "running" in buffer:  # statistics of a batch norm
                values += 0.5 * torch.rand_like(values)
    model.save_pretrained(folder)
    extract.save_pretrained(folder)
    return getattr(model, part) if part else model


def encode_alone(reference, name, audio_N):
    """What transformers' encoder says of one recording, [S, E]."""
    *_, extract, shortest = MODELS[name]
    audio_N = np.pad(audio_N, (0, max(shortest - len(audio_N), 0)))
    inputs = extract(audio_N, sampling_rate=16_000, return_tensors="pt")
    if "input_values" in inputs:  # one position needs 400 samples
        missing = max(400 - len(audio_N), 0)
        inputs = {"input_values": torch.nn.functional.pad(inputs.input_values, (0, missing))}
    with torch.no_grad():
        out = reference(**inputs)
    mask = out.get("attention_mask", inputs.get("attention_mask"))
    size = None if mask is None else mask.sum()
    return out.last_hidden_state[0, :size].numpy()


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """(transformers' encoder, the directory that its model was saved to)."""
    folder = tmp_path_factory.mktemp("saved") / request.param
    return make(request.param, folder), folder


@pytest.fixture(scope="module")
def loaded(saved):
    return pretrained.load_speech_encoder(saved[1])


def test_an_utterance_gives_in_any_batch_what_it_gives_transformers_alone(saved, loaded):
    """Also where norms are over time; neither centred nor of unit power."""
    rng = np.random.default_rng(0)
    audio = (0.2 * rng.normal(size=(3, FRAMES, 160)) + 0.05).astype(np.float32)
    lengths = np.array([FRAMES, 23, 2])
    audio[np.arange(FRAMES)[None] >= lengths[:, None]] = np.nan
    encoder, params = loaded
    encode = jax.jit(lambda *frames: encoder.apply({"params": params}, *frames))
    features, positions = encode(audio, jnp.asarray(lengths))
    np.testing.assert_array_equal(positions, encoders.output_length(encoder.config, lengths))
    reference, folder = saved
    for found, size, frames, length in zip(features, positions, audio, lengths, strict=True):
        expected = encode_alone(reference, folder.name, frames[:length].reshape(-1))
        assert size == len(expected)
        np.testing.assert_allclose(found[:size], expected, atol=1e-4, rtol=0)
        assert not np.any(found[size:])


def test_nothing_is_promoted_and_every_length_and_shard_is_known(loaded):
    encoder = encoders.make(dataclasses.replace(loaded[0].config, dtype="bfloat16"))
    encode = lambda params, *frames: encoder.apply({"params": params}, *frames)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for frames in (1, 5, 40):
            inputs = jnp.zeros((2, frames, 160)), jnp.array([frames, 1])
            features, length = jax.eval_shape(encode, loaded[1], *inputs)
            assert features.dtype == jnp.bfloat16 and length.dtype == jnp.int32
            assert features.shape[1] == encoders.output_length(encoder.config, frames)
    mesh = jax.make_mesh((2, 2, 2), sharding.AXES, (jax.sharding.AxisType.Auto,) * 3)
    sharding.tree_shardings({"encoder": loaded[1]}, mesh)


def test_it_goes_out_as_it_came_in_and_its_class_opens_it(saved, loaded, tmp_path):
    reference, folder = saved
    pretrained.save_speech_encoder(tmp_path, *loaded)
    first, back = (load_file(d / "model.safetensors") for d in (folder, tmp_path))
    prefix = MODELS[folder.name][2] + "."
    first = {name.removeprefix(prefix): tensor for name, tensor in first.items()}
    left_out = re.compile(r"(lm|ctc)_head\..*|masked_spec_embed|.*\.num_batches_tracked")
    assert back.keys() == {name for name in first if not left_out.fullmatch(name)}
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, first[name], err_msg=name)
    _, info = type(reference).from_pretrained(tmp_path, output_loading_info=True)
    missing = [name for name in info.pop("missing_keys") if "num_batches_tracked" not in name]
    assert not missing and not any(info.values()), (missing, info)
    assert pretrained.speech_encoder_config(tmp_path) == loaded[0].config


def test_older_names_are_read_and_heads_are_named_once(saved, loaded, tmp_path, caplog):
    shutil.copytree(saved[1], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    for i, old in enumerate(("weight_g", "weight_v")):
        new = f"parametrizations.weight.original{i}"
        for name in [name for name in tensors if name.endswith(new)]:
            tensors[name.replace(new, old)] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING, "absl"):
        _, params = pretrained.load_speech_encoder(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, loaded[1])
    lines = [record.getMessage() for record in caplog.records if "passed over" in record.message]
    heads = ", ".join(sorted(name for name in tensors if "_head." in name))
    assert lines == ([f"{tmp_path}: not needed and passed over: {heads}"] if heads else [])


def test_what_is_not_computed_is_refused_by_name():
    wrong = {
        "hidden_size": 18,
        "num_attention_heads": 4,
        "num_conv_pos_embedding_groups": 4,
        "conv_kernel": [3, 2],
        "hidden_act": "selu",
        "feat_extract_norm": "batch",
        "layer_norm_eps": 1e-6,
        "add_adapter": True,
        "adapter_attn_dim": 16,
    }
    with pytest.raises(ValueError) as caught:
        files.speech_encoder_config(
            {"model_type": "wav2vec2"} | wrong, preprocessor={"sampling_rate": 8000}
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "config.json (wav2vec2):"
    assert lines[1:] == [
        "  hidden_size=18 does not divide among 4 heads",
        "  num_conv_pos_embedding_groups=4 does not divide hidden_size=18",
        "  conv_dim, conv_kernel, conv_stride: not as long as one another",
        "  hidden_act 'selu' is not supported",
        "  feat_extract_norm 'batch' is not group or layer",
        "  layer_norm_eps=1e-06: only 1e-05 is computed",
        "  add_adapter=True: convolutions behind the encoder are not computed",
        "  adapter_attn_dim=16: adapters in its layers (MMS) are not computed",
        "  preprocessor_config.json: its audio is not mono at 16000 Hz",
    ]
    with pytest.raises(ValueError, match="conv_pos_batch_norm=True: a batch norm of positions"):
        files.speech_encoder_config({"model_type": "hubert", "conv_pos_batch_norm": True})
    with pytest.raises(ValueError) as caught:
        files.speech_encoder_config(
            {"model_type": "wav2vec2-bert", "position_embeddings_type": "rotary"}
            | {"feature_projection_input_dim": 161, "conv_depthwise_kernel_size": 8}
        )
    assert str(caught.value).splitlines()[1:] == [
        "  position_embeddings_type='rotary': only 'relative_key' is computed",
        "  conv_depthwise_kernel_size=8 is even",
        "  feature_projection_input_dim is not 2 times a number of bins",
    ]
    with pytest.raises(ValueError) as caught:
        files.speech_encoder_config(
            {"model_type": "parakeet_tdt", "encoder_config": {"subsampling_factor": 6}},
            preprocessor={"feature_size": 128, "n_fft": 1024},
        )
    assert str(caught.value).splitlines() == [
        "config.json (parakeet_encoder):",
        "  preprocessor_config.json: n_fft=1024, not 512",
        "  preprocessor_config.json: feature_size=128, not 80",
        "  subsampling_factor=6: not a power of 2 that divides the bins",
    ]
    with pytest.raises(ValueError, match="unknown key 'conv_rope_theta' = 10"):
        files.speech_encoder_config({"model_type": "wavlm", "conv_rope_theta": 10})
    with pytest.raises(ValueError, match=r"conv_stride is \[5, 0\], not a list of whole numbers"):
        files.speech_encoder_config({"model_type": "wavlm", "conv_stride": [5, 0]})


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "wavlm", "wav2vec2-bert", "parakeet_ctc"])
def test_sizes_that_cannot_be_are_named_before_memory_is_taken(kind):
    for key in SHAPE:
        for bad in (0, -1, None, "512", 512.0, True, 10**18, [512]):
            raw = {"model_type": kind, key: bad}
            raw |= {"encoder_config": {key: bad}} if kind == "parakeet_ctc" else {}
            with pytest.raises(ValueError, match=f"\n  {key} is .*, not a whole number"):
                files.speech_encoder_config(raw)


def test_a_run_trains_it_and_hears_with_it(manifest, tmp_path):
    make("hubert", tmp_path / "hubert")
    path = str(tmp_path / "hubert")
    changes = {"encoder__path": path, "data__features": "step", "freeze": "", "num_steps": 3}
    with pytest.raises(ValueError, match="takes the waveform: set data.augment.freq_masks=0 "):
        train.train(tone_config(manifest, **changes), tmp_path / "run")
    changes |= {"data__augment__freq_masks": 0, "data__num_buckets": 1, "otreg__weight": 0.0}
    state = train.train(tone_config(manifest, **changes), tmp_path / "run")
    before = pretrained.load_speech_encoder(path)[1]
    after = jax.tree.map(np.asarray, state.params["encoder"])
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    assert all(jax.tree.leaves(moved)), moved
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))

    run = build.load_run(tmp_path / "run")
    utterances = sources.read_manifest(manifest)
    timed = {u.id: [w.text for w in words] for u, words in recognition.aligned(run, utterances)}
    assert timed == {u.id: u.text.split() for u in utterances}
    assert not transcribe.transcribe(run, [utterances[0].audio])[1]
    # Kept outputs are those of each utterance alone.
    kept = encode_once.encode_once(
        run.config, utterances, run.tokenizer, run.slm, run.params, (0, 1), tmp_path / "kept", None
    )
    frames = features.frames(features.WAVEFORM, sources.load_audio(utterances[3]))
    encode = jax.jit(lambda *frames: run.slm.encoder.apply({"params": after}, *frames))
    alone, size = encode(frames[None], jnp.array([len(frames)]))
    assert len(kept.read(3)) == size[0]
    np.testing.assert_allclose(kept.read(3), alone[0], atol=1e-5)
