"""Tiny random speech LLMs of each layout: those of transformers' classes, and Ultravox, built here
from its published layout of parts that transformers has."""

import json

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.whisper.modeling_whisper import WhisperEncoder

MELS, POSITIONS, AUDIO, VOCAB = 16, 100, 4, 40
SECONDS = 2  # that so many positions are
WORDS = ("turn", "on", "off", "the", "light", "radio", "call", "anna", "stop")
LLM = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=256,
)
WHISPER = dict(
    d_model=8,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=32,
    num_mel_bins=MELS,
    max_source_positions=POSITIONS,
)


class Projector(torch.nn.Module):
    """Ultravox's: frames stacked, RMSNorm, SwiGLU, RMSNorm, projection (or the norm after it)."""

    def __init__(self, config):
        super().__init__()
        self.stack, size = config["stack_factor"], config["hidden_size"]
        stacked, out = 8 * self.stack, 16
        norm = torch.nn.RMSNorm
        self.ln_pre = norm(stacked, eps=1e-6)
        self.linear_1 = torch.nn.Linear(stacked, size, bias=False)
        self.linear_2 = torch.nn.Linear(size // 2, out, bias=False)
        late = not config["projector_ln_mid"]
        self.ln_mid = torch.nn.Identity() if late else norm(size // 2, eps=1e-6)
        self.ln_post = norm(out, eps=1e-6) if late else torch.nn.Identity()

    def forward(self, x_BSE):
        x_BSE = torch.nn.functional.pad(x_BSE, (0, 0, 0, -x_BSE.shape[1] % self.stack))
        stacked = x_BSE.reshape(len(x_BSE), -1, x_BSE.shape[2] * self.stack)
        value, gate = self.linear_1(self.ln_pre(stacked)).chunk(2, dim=-1)
        return self.ln_post(self.linear_2(self.ln_mid(value * torch.nn.functional.silu(gate))))


class Ultravox(torch.nn.Module):
    """What the published layout says, one utterance at a time."""

    def __init__(self, config):
        super().__init__()
        audio = transformers.WhisperConfig(**config["audio_config"])
        text = transformers.AutoConfig.for_model(**config["text_config"])
        self.audio_tower = WhisperEncoder(audio)
        self.multi_modal_projector = Projector(config)
        self.language_model = transformers.AutoModelForCausalLM.from_config(text)

    def embed(self, prefix, suffix, features_1MF):
        tower, table = self.audio_tower, self.language_model.get_input_embeddings()
        x = torch.nn.functional.gelu(tower.conv1(features_1MF))
        x = torch.nn.functional.gelu(tower.conv2(x)).permute(0, 2, 1)
        x = x + tower.embed_positions.weight[: x.shape[1]]
        for layer in tower.layers:
            x = layer(x, None)
        x = self.multi_modal_projector(tower.layer_norm(x))
        ids = [torch.tensor([part], dtype=torch.long) for part in (prefix, suffix)]
        return torch.cat([table(ids[0]), x, table(ids[1])], dim=1)


def make(layout: str, folder, late_norm: bool = False):
    """Writes a random model of `layout` with a tokenizer to `folder`."""
    torch.manual_seed(0)
    whisper = {key.replace("d_model", "hidden_size"): value for key, value in WHISPER.items()}
    if layout == "voxtral":
        audio = {"model_type": "voxtral_encoder", **whisper}
        names = {"encoder_layers": "num_hidden_layers", "encoder_ffn_dim": "intermediate_size"}
        names |= {"encoder_attention_heads": "num_attention_heads"}
        audio = {names.get(key, key): value for key, value in audio.items()}
        text = {"model_type": "llama", **LLM, "head_dim": 8}
        config = transformers.VoxtralConfig(
            audio_config=audio, text_config=text, audio_token_id=AUDIO
        )
        model = transformers.VoxtralForConditionalGeneration(config)
    elif layout == "qwen2_audio":
        audio = {"model_type": "qwen2_audio_encoder", **WHISPER}
        config = transformers.Qwen2AudioConfig(
            audio_config=audio,
            text_config={"model_type": "qwen2", **LLM},
            audio_token_index=AUDIO,
        )
        model = transformers.Qwen2AudioForConditionalGeneration(config)
    else:
        config = {
            "model_type": "ultravox",
            "architectures": ["UltravoxModel"],
            "audio_config": {"model_type": "whisper", **WHISPER, "pad_token_id": 0},
            "text_config": {"model_type": "llama", **LLM, "tie_word_embeddings": True},
            "hidden_size": 24,
            "stack_factor": 3,
            "projector_act": "swiglu",
            "projector_ln_mid": not late_norm,
            "audio_token_index": AUDIO,
            "audio_model_id": None,
            "text_model_id": None,
            "norm_init": 0.4,
            "torch_dtype": "float32",
        }
        model = Ultravox(config)
    with torch.no_grad():  # far from every initial value, biases and norms too
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    if layout == "ultravox":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {k: v for k, v in model.state_dict().items() if "lm_head" not in k}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        model.save_pretrained(folder)
    write_tokenizer(folder)


def write_tokenizer(folder):
    special = ["<unk>", "<s>", "</s>", "<|im_end|>", "[AUDIO]"]
    vocab = {word: i for i, word in enumerate([*special, *WORDS, "listen", "say"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.decoder = tokenizers.decoders.Fuse()
    made.add_special_tokens(special)
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def open_model(folder):
    """The one class that opens `folder`, in evaluation mode."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "ultravox":
        kind = getattr(transformers, config["architectures"][0])
        return kind.from_pretrained(folder, attn_implementation="eager").eval()
    model = Ultravox(config)
    tensors = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"language_model.lm_head.weight"} and not unexpected
    return model.eval()


def features(audio):
    """(mel [1, M, F], mask [1, F]) of a whole window, as the layouts' processors make them."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=MELS, chunk_length=SECONDS)
    made = extractor(
        audio,
        sampling_rate=16_000,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="np",
    )
    return made.input_features, made.attention_mask


@torch.no_grad()
def generate(model, layout, prefix, suffix, mel, mask, num_tokens: int, eos: int, audio=AUDIO):
    """(logits after the prompt [V], greedy tokens) of one utterance; audio: what stands for it."""
    mel, mask = torch.tensor(np.array(mel)), torch.tensor(mask)
    options = dict(max_new_tokens=num_tokens, do_sample=False, eos_token_id=eos, pad_token_id=0)
    options |= dict(return_dict_in_generate=True, output_logits=True)
    if layout == "ultravox":
        x = model.embed(list(prefix), list(suffix), mel)
        ones = torch.ones(x.shape[:2], dtype=torch.long)
        out = model.language_model.generate(inputs_embeds=x, attention_mask=ones, **options)
        return out.logits[0][0].numpy(), out.sequences[0].tolist()
    inputs = {"input_features": mel}
    count = POSITIONS // 4
    if layout == "qwen2_audio":
        inputs["feature_attention_mask"] = mask
        count = -(-int(mask.sum()) // 2) // 2
    ids = torch.tensor([[*prefix, *[audio] * count, *suffix]])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, **options)
    return out.logits[0][0].numpy(), out.sequences[0, ids.shape[1] :].tolist()


def speech(seed: int, seconds: float):
    """A chirp with noise, float32 at 16 kHz."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * 16_000)) / 16_000
    wave = 0.3 * np.sin(2 * np.pi * (200 + 300 * (seed % 5) + 400 * t) * t)
    return (wave + 0.02 * rng.normal(size=len(t))).astype(np.float32)
