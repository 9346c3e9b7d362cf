"""Whole speech LLMs, in and out: against transformers' classes, and Ultravox as published."""

import functools
import json

import jax
import numpy as np
import pytest
import soundfile
import speech_llms
from safetensors.numpy import load_file

from otreg_jax import build, decoding, evaluate, export, pretrained, train
from otreg_jax import config as config_lib
from otreg_jax.data import pipeline, sources, tokenization
from otreg_jax.models import encoders, lora
from otreg_jax.models import slm as slm_lib
from otreg_jax.models.adapter import AdapterConfig
from otreg_jax.models.llm import LLMConfig
from otreg_jax.models.speech_encoder import SpeechEncoderConfig
from otreg_jax.pretrained import configs, layouts

KINDS = ("voxtral", "qwen2_audio", "ultravox", "ultravox-0.4")
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A manifest of four utterances, the last one as long as the window."""
    folder = tmp_path_factory.mktemp("audio")
    lines = []
    for i, seconds in enumerate((0.33, 0.525, 1.2504, speech_llms.SECONDS)):
        soundfile.write(folder / f"{i}.wav", speech_llms.speech(i, seconds), 16_000, "FLOAT")
        text = " ".join(speech_llms.WORDS[i : i + 3])
        line = {"audio_filepath": f"{i}.wav", "text": text, "duration": seconds, "id": f"u{i}"}
        lines.append(json.dumps(line))
    (folder / "set.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "set.jsonl"


def settings(layout, path):
    """The settings that a start from `path` needs, with LoRA."""
    config = config_lib.default()
    config.model.path, config.prompt = str(path), "listen {speech} say"
    config.data.num_mels, config.data.max_duration = speech_llms.MELS, speech_llms.SECONDS
    config.lora.pattern, config.lora.rank = "llm/layers/attn/[qv]/kernel", 2
    config.freeze = r"^(encoder|llm)/(?!.*/lora_[ab]$)"
    if layout != "ultravox":
        config.data.window = speech_llms.SECONDS
        config.data.window_masked = layout == "qwen2_audio"
    return config


@functools.partial(jax.jit, static_argnums=0)
def first_logits_and_tokens(slm, params, batch):
    out = slm_lib.forward(slm, params, batch)
    mel = batch["mel"], batch["mel_length"]
    decoded = decoding.recognize(slm, params, *mel, decoding.Settings(MAX_TOKENS))
    return slm_lib.logits(slm, params, out.hidden_BTD[:, 0]), decoded.tokens, decoded.length


def agree(layout, model, slm, params, batch, utterances, audio_token):
    """Asserts that a model gives our logits after the prompt, and our tokens."""
    logits_BV, tokens_BN, length_B = first_logits_and_tokens(slm, params, batch)
    for row, i in enumerate(batch["index"]):
        audio, _ = soundfile.read(utterances[i].audio, dtype="float32")
        mel, mask = speech_llms.features(audio)
        if layout == "ultravox":  # audio of any length: only the windows of 30 s are Whisper's own
            mel = batch["mel"][row, : batch["mel_length"][row]].T[None]
        prompt = slm.prompt.prefix, slm.prompt.suffix
        theirs, greedy = speech_llms.generate(
            model, layout, *prompt, mel, mask, MAX_TOKENS, slm.prompt.eos, audio_token
        )
        np.testing.assert_allclose(logits_BV[row], theirs, atol=1e-4, rtol=0)
        ours = tokens_BN[row, : length_B[row]].tolist()
        assert ours == [token for token in greedy if token != slm.prompt.eos]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_gives_what_its_class_gives_and_comes_back_to_the_bit(kind, recordings, tmp_path):
    layout = kind.partition("-")[0]
    speech_llms.make(layout, tmp_path / "in", late_norm=kind.endswith("-0.4"))
    config = settings(layout, tmp_path / "in")
    tokenizer = tokenization.load_tokenizer(tmp_path / "in")
    slm, params = build.build(config, tokenizer, config.llm.path)
    utterances = sources.read_manifest(str(recordings))
    data = pipeline.for_evaluation(config.data, num_buckets=1)
    frontend = encoders.frontend(slm.encoder.config)
    (batch,) = pipeline.eval_batches(utterances, tokenizer, data, batch_size=4, frontend=frontend)
    reference = speech_llms.open_model(tmp_path / "in")
    agree(layout, reference, slm, params, batch, utterances, speech_llms.AUDIO)

    # Untrained pairs change nothing: what goes out is what came in.
    run = build.Run(config, slm, params, tokenizer, 0, None)
    export.export(run, tmp_path / "out")
    first, back = (load_file(tmp_path / d / "model.safetensors") for d in ("in", "out"))
    assert set(first) == set(back)
    for name, tensor in first.items():
        assert tensor.dtype == back[name].dtype
        np.testing.assert_array_equal(tensor, back[name], err_msg=name)
    encoder = pretrained.speech_encoder_config(tmp_path / "out")
    llm = pretrained.llm_config(tmp_path / "out")
    assert encoder == pretrained.speech_encoder_config(tmp_path / "in")
    assert llm == pretrained.llm_config(tmp_path / "in")
    adapters = [pretrained.adapter_config(tmp_path / d, None, encoder, llm) for d in ("in", "out")]
    assert adapters[0] == adapters[1]

    # As if trained: the class that opens the export gives what this model gives.
    draw = lambda path, x: x + 0.3 * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
    moves = lambda path: path[0].key == "adapter" or path[-1].key in lora.PAIR
    trained = jax.tree_util.tree_map_with_path(
        lambda path, x: draw(path, x) if moves(path) else x, params
    )
    export.export(run._replace(params=trained), tmp_path / "trained")
    described = json.loads((tmp_path / "trained" / "config.json").read_text())
    token = described[layouts.LAYOUTS[layout].token[0]]
    assert (token == speech_llms.AUDIO) == (layout == "voxtral")  # whose tokenizer has [AUDIO]
    model = speech_llms.open_model(tmp_path / "trained")
    agree(layout, model, slm, trained, batch, utterances, token)


def test_a_trained_run_is_served_with_the_hypotheses_of_its_evaluation(
    recordings, tmp_path, capsys
):
    """From a directory to training, evaluation, export and transformers' own class."""
    speech_llms.make("voxtral", tmp_path / "in")
    config = settings("voxtral", tmp_path / "in")
    config.data.train = config.data.dev = str(recordings)
    config.num_steps, config.batch_size, config.optim.warmup_steps = 2, 8, 0
    config.otreg.weight, config.optim.learning_rate = 1.0, 0.02
    config.decode.max_tokens = MAX_TOKENS
    train.train(config, tmp_path / "run")
    evaluate.evaluate(tmp_path / "run", batch_size=8)
    assert export.cli([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]) in (None, 0)
    said = capsys.readouterr().out
    assert f"wrote {tmp_path / 'out'} as one voxtral model" in said
    assert "it cannot become ultravox: adapter.kind=voxtral, not ultravox" in said

    model = speech_llms.open_model(tmp_path / "out")
    prompt = json.loads((tmp_path / "out" / "otreg.json").read_text())["prompt"]
    tokenizer = tokenization.load_tokenizer(tmp_path / "out")
    lines = (tmp_path / "run" / "eval" / "hypotheses.jsonl").read_text().splitlines()
    assert len(lines) == 4
    for line in map(json.loads, lines):
        audio, _ = soundfile.read(recordings.parent / f"{line['id'][1:]}.wav", dtype="float32")
        features = speech_llms.features(audio)
        _, greedy = speech_llms.generate(
            model,
            "voxtral",
            prompt["prefix"],
            prompt["suffix"],
            *features,
            MAX_TOKENS,
            prompt["eos"],
        )
        assert tokenizer.decode(greedy).strip() == line["hypothesis"]


def test_what_a_start_needs_of_the_data_is_said_at_once(tmp_path):
    speech_llms.make("qwen2_audio", tmp_path)
    config = settings("ultravox", tmp_path)
    config.data.num_mels = 80
    tokenizer = tokenization.load_tokenizer(tmp_path)
    said = (
        r"takes 16 mel bins of windows of 2 s: set data.num_mels=16 \(it is 80\), "
        r"data.window=2.0 \(it is 0.0\), data.window_masked=True \(it is False\)"
    )
    with pytest.raises(ValueError, match=said):
        build.build(config, tokenizer, config.llm.path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"projector_act": "gelu"}, "projector_act='gelu': only swiglu"),
        ({"num_projector_layers": 2}, "num_projector_layers"),
        ({"audio_latency_block_size": 100}, "audio_latency_block_size"),
        ({"stack_factor": 0}, "stack_factor is 0, not a whole number"),
        ({"projector_bias": True}, "unknown key 'projector_bias'"),
        ({"text_model_id": "meta/llama"}, "set llm.path to that of meta/llama"),
        ({"audio_model_id": "openai/whisper"}, "set encoder.path to that of openai/whisper"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised .'gptq'.*take the model"),
    ],
)
def test_layouts_that_would_be_computed_wrongly_are_refused(changes, message, tmp_path):
    text = {"model_type": "llama", **speech_llms.LLM}
    raw = {"model_type": "ultravox", "text_config": text, "audio_config": speech_llms.WHISPER}
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(ValueError, match=message):
        encoder = pretrained.speech_encoder_config(tmp_path)
        llm = pretrained.llm_config(tmp_path)
        pretrained.adapter_config(tmp_path, None, encoder, llm)


def test_what_keeps_a_model_from_a_layout_is_said():
    encoder = SpeechEncoderConfig(8, 1, 2, 32, max_positions=100)
    llm = LLMConfig(24, 16, 1, 2, 1, 8, 16)
    adapter = AdapterConfig(8, 16, hidden_dim=16, kind="voxtral", stack=4)
    window = pretrained.Window(2.0, False)
    found = functools.partial(pretrained.obstacles, "voxtral")
    assert found(encoder, adapter, llm, window) == []
    odd = AdapterConfig(8, 16, hidden_dim=24, kind="voxtral", stack=2, norm="table")
    assert found(SpeechEncoderConfig(8, 1, 2, 32, strides=(2, 2)), odd, llm, window) == [
        "adapter.norm=table: its projector has no such norm",
        "encoder.strides=(2, 2), not Whisper's (1, 2)",
        "data.window=2 and data.window_masked=False, not 60 and False",
        "adapter.stack=2, not 4",
        "adapter.hidden_dim=24, not the LLM's 16",
    ]
    assert pretrained.obstacles("qwen2_audio", encoder, adapter, llm, window) == [
        "adapter.kind=voxtral, not linear",
        "encoder.pool=1, not 2",
        "data.window=2 and data.window_masked=False, not 2 and True",
        "adapter.stack=4, not 1",
    ]


@pytest.mark.parametrize(
    "family, layouts_refused, message",
    [
        ({"model_type": "gemma2"}, ("voxtral", "qwen2_audio", "ultravox"), "speech too"),
        (
            {"model_type": "gemma3_text", "final_logit_softcapping": 30.0},
            ("voxtral", "qwen2_audio"),
            "soft-capped at 30",
        ),
        (
            {"model_type": "granite", "logits_scaling": 8.0},
            ("voxtral", "qwen2_audio"),
            "divided by 8",
        ),
        (
            {"model_type": "granite", "embedding_multiplier": 12.0},
            ("voxtral", "qwen2_audio", "ultravox"),
            "by 12, speech too",
        ),
        ({"model_type": "gemma3_text"}, (), ""),
    ],
)
def test_llms_that_a_layout_would_compute_otherwise_are_refused(
    family, layouts_refused, message, tmp_path
):
    """In both directions: transformers' classes scale speech too, or leave out what comes after the
    LLM's head."""
    text = family | speech_llms.LLM
    llm = configs.llm_config(text)
    for layout in layouts.LAYOUTS:
        raw = {"model_type": layout, "text_config": text, "audio_config": speech_llms.WHISPER}
        found = layouts.llm_obstacles(layout, llm)
        if layout in layouts_refused:
            assert any(message in line for line in found)
            with pytest.raises(ValueError, match=message):
                configs.llm_config(raw)
        else:
            assert not found and configs.llm_config(raw).family == llm.family
