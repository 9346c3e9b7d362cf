"""Our training step beside PyTorch's: the same model, weights, batch and precision.

    python -m benchmarks.peer_step
    python -m benchmarks.peer_step --encoder=whisper-large-v3 --llm=qwen2.5-1.5b --batch_size=16 \\
        --seconds=15 --tokens=64                              # on a GPU
    taskset -c 0 python -m benchmarks.peer_step --clock=cpu   # on a machine with other work to do

The peer is what one writes with transformers and PEFT: a frozen Whisper encoder, stacked frames
through a two-layer projector, a frozen Qwen2 LLM with LoRA (rank 16 on q, k, v, o), scaled-dot-
product attention, AdamW, cross-entropy on the transcript, with and without torch.compile. Its
random weights are saved and loaded into ours, so that the first losses must agree. OTReg is off.
Both pad to the longest utterance (a pretrained Whisper of transformers would insist on 30 s).

float32 on a CPU, bfloat16 on a GPU. Steps are timed in turn, round by round; ratios are medians of
the rounds' own ratios, so that other load on the machine hits all. Prints a table and writes
benchmarks/results/peer_step.json. Needs the `bench` extra.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import peft
import torch
import transformers
from absl import app, flags

from benchmarks.common import SHAPES, describe_machine, make_batch, whisper_shape
from otreg_jax import build, command, optim, pretrained, sharding, train_step
from otreg_jax import config as config_lib
from otreg_jax.data import text

_ENCODER = flags.DEFINE_string("encoder", "whisper-tiny", "A shape of benchmarks/shapes.")
_LLM = flags.DEFINE_string("llm", "qwen2-60m", "A shape of benchmarks/shapes.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Utterances a step.")
_SECONDS = flags.DEFINE_float("seconds", 8.0, "The longest utterance.")
_TOKENS = flags.DEFINE_integer("tokens", 32, "The longest transcript.")
_COMPILE = flags.DEFINE_bool("compile", True, "Also time the peer under torch.compile.")
_REPEATS = flags.DEFINE_integer("repeats", 9, "Rounds of timing.")
_CLOCK = flags.DEFINE_enum(
    "clock", "wall", ["wall", "cpu"], "Wall-clock time, or CPU time of all threads."
)
_OUT = flags.DEFINE_string("out", "benchmarks/results/peer_step.json", "File of the results.")

PROMPT = text.Prompt(prefix=(1, 2, 3), suffix=(4, 5, 6), eos=0)
STACK, HIDDEN, RANK, LEARNING_RATE = 4, 1024, 16, 1e-4


class Peer(torch.nn.Module):
    """Whisper encoder -> projector -> Qwen2 with LoRA; forward gives the loss."""

    def __init__(self, encoder, llm):
        super().__init__()
        self.encoder, self.llm = encoder, llm
        self.projector = torch.nn.Sequential(
            torch.nn.Linear(STACK * encoder.config.d_model, HIDDEN),
            torch.nn.GELU(),
            torch.nn.Linear(HIDDEN, llm.config.hidden_size),
        )

    def forward(self, mel, speech_length, tokens, token_length):
        """mel [B, M, F]; the prompt's prefix, the speech, its suffix, the transcript, the end of
        sequence, packed without gaps and padded on the right."""
        with torch.no_grad():
            encoded = self.encoder(mel).last_hidden_state
        B, S, E = encoded.shape
        speech = self.projector(encoded.reshape(B, S // STACK, STACK * E).float())
        embed = self.llm.get_input_embeddings()
        device, dtype = mel.device, embed.weight.dtype
        ids = lambda values: embed(torch.tensor(values, device=device)).expand(B, -1, -1)
        eos = torch.full((B, 1), PROMPT.eos, device=device)
        labels = torch.cat([tokens, eos], dim=1)
        labels.scatter_(1, token_length[:, None], PROMPT.eos)
        labels = torch.where(
            torch.arange(labels.shape[1], device=device) <= token_length[:, None], labels, -100
        )
        unpacked = torch.cat(
            [ids(PROMPT.prefix), speech.to(dtype), ids(PROMPT.suffix), embed(tokens)], dim=1
        )
        first = len(PROMPT.prefix)
        index = torch.arange(unpacked.shape[1], device=device).expand(B, -1)
        behind = index >= first + speech_length[:, None]
        source = index + behind * (S // STACK - speech_length)[:, None]
        source = source.clamp(max=unpacked.shape[1] - 1)
        x = torch.gather(unpacked, 1, source[..., None].expand(-1, -1, unpacked.shape[2]))
        length = first + speech_length + len(PROMPT.suffix) + token_length
        mask = (index < length[:, None]).long()
        # Labels stand where transformers shifts them to: one behind the state that predicts them.
        place = (first + speech_length + len(PROMPT.suffix))[:, None]
        place = place + torch.arange(labels.shape[1], device=device)
        full = torch.full((B, x.shape[1] + 1), -100, device=device)
        full = full.scatter(1, place.clamp(max=x.shape[1]), labels)
        logits = self.llm(inputs_embeds=x, attention_mask=mask).logits
        return torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), full[:, 1:].flatten(), ignore_index=-100
        )


def make_peer(frames: int, device: str):
    """(Peer, directory of the encoder, directory of the LLM), weights random."""
    torch.manual_seed(0)
    read = lambda name: json.loads((SHAPES / name / "config.json").read_text())
    shape = whisper_shape(_ENCODER.value, max_source_positions=frames // 2)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        encoder = transformers.WhisperModel(transformers.WhisperConfig(**shape)).to(dtype)
        llm = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**read(_LLM.value))).to(dtype)
    folder = Path(tempfile.mkdtemp())
    encoder.save_pretrained(folder / "encoder")
    llm.save_pretrained(folder / "llm")
    llm = peft.get_peft_model(
        llm,
        peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
        ),
    )
    encoder = encoder.encoder.eval().requires_grad_(False)
    return Peer(encoder, llm).to(device), folder


def make_ours(folder, peer, frames: int, device: str):
    """(step, state, frozen, batch) with the peer's weights."""
    config = config_lib.default()
    config.batch_size = _BATCH_SIZE.value
    config.compute_dtype = "bfloat16" if device == "cuda" else "float32"
    config.encoder.path, config.llm.path = str(folder / "encoder"), str(folder / "llm")
    config.adapter.stack, config.adapter.hidden_dim = STACK, HIDDEN
    config.lora.pattern, config.lora.rank = "llm/layers/attn/[qkvo]/kernel", RANK
    config.freeze = r"^(encoder|llm)/(?!.*/lora_[ab]$)"
    config.optim.learning_rate, config.optim.warmup_steps = LEARNING_RATE, 0
    config.data.num_mels = peer.encoder.config.num_mel_bins
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    slm = build.modules(config, 0, PROMPT, config.llm.path, mesh)
    dtype = config.compute_dtype
    _, encoder = pretrained.load_speech_encoder(config.encoder.path, dtype=dtype)
    _, llm = pretrained.load_llm(config.llm.path, dtype=dtype)
    params = build.init_params(slm, config, {"encoder": encoder, "llm": llm})
    numpy = lambda x: x.detach().float().cpu().numpy()
    for name, layer in (("in", peer.projector[0]), ("out", peer.projector[2])):
        params["adapter"][name] = {"kernel": numpy(layer.weight).T, "bias": numpy(layer.bias)}
    params = jax.tree.map(jax.numpy.asarray, params)
    params, frozen = build.split(params, config)
    optimizer = optim.make_optimizer(config)
    shardings = train_step.abstract_state(params, optimizer, mesh)
    state = jax.jit(lambda p: train_step.init_state(p, optimizer))(params)
    batch = make_batch(config, frames, _TOKENS.value, slm.llm.config.vocab_size)
    batch["mel_length"] -= batch["mel_length"] % (2 * STACK)  # whole stacks, as the peer's have
    return train_step.make_step(slm, config, optimizer, shardings), state, frozen, batch


def main(argv):
    del argv
    now = time.process_time if _CLOCK.value == "cpu" else time.perf_counter
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    frames = round(100 * _SECONDS.value) // (2 * STACK) * 2 * STACK
    peer, folder = make_peer(frames, device)
    step, state, frozen, batch = make_ours(folder, peer, frames, device)

    # As ours: zeros behind each utterance's end. Whisper's encoder knows no mask, so its padding
    # takes part in attention: for equal losses every utterance here has full length.
    batch["mel_length"][:] = frames
    as_torch = lambda x: torch.as_tensor(np.asarray(x), device=device)
    mel = as_torch(batch["mel"]).transpose(1, 2)
    inputs = (
        mel.to(next(peer.encoder.parameters()).dtype),
        as_torch(batch["mel_length"]).long() // (2 * STACK),
        as_torch(batch["tokens"]).long(),
        as_torch(batch["token_length"]).long(),
    )
    batch = jax.device_put(batch)

    trained = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    forwards = {"torch": peer}
    if _COMPILE.value:
        forwards["torch.compile"] = torch.compile(peer)

    def torch_step(forward):
        def run():
            optimizer.zero_grad(set_to_none=True)
            loss = forward(*inputs)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            return float(loss)

        return run

    def our_step():
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    runs = {"ours": our_step} | {name: torch_step(f) for name, f in forwards.items()}
    with torch.no_grad():
        first = {"torch": float(peer(*inputs))}
    first["ours"] = our_step()
    np.testing.assert_allclose(
        first["ours"], first["torch"], rtol=2e-2 if device == "cuda" else 1e-4
    )
    times = {name: [] for name in runs}
    for i in range(-2, _REPEATS.value):
        for name, run in runs.items():
            start = now()
            run()
            if i >= 0:
                times[name].append(now() - start)
    memory = {"ours": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")}
    if device == "cuda":
        memory["torch"] = torch.cuda.max_memory_allocated()
    print(f"first loss: ours {first['ours']:.6f}, torch {first['torch']:.6f}")
    print(f"{'step':16}{'ms':>9}{'utt/s':>9}{'ours is faster by':>20}")
    rows = {}
    for name in runs:
        ratio = statistics.median(t / o for t, o in zip(times[name], times["ours"], strict=True))
        seconds = statistics.median(times[name])
        rows[name] = {
            "seconds": seconds,
            "utterances_per_sec": _BATCH_SIZE.value / seconds,
            "ratio": ratio,
        }
        print(f"{name:16}{1e3 * seconds:9.1f}{_BATCH_SIZE.value / seconds:9.2f}{ratio:20.2f}")
    result = {
        **describe_machine("flax", "torch", "transformers", "peft"),
        "encoder": _ENCODER.value,
        "llm": _LLM.value,
        "batch_size": _BATCH_SIZE.value,
        "seconds": _SECONDS.value,
        "tokens": _TOKENS.value,
        "repeats": _REPEATS.value,
        "clock": _CLOCK.value,
        "first_loss": first,
        "peak_bytes": memory,
        "rows": rows,
    }
    Path(_OUT.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    command.quiet_and_cached()
    app.run(main)
