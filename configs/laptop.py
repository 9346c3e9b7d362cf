"""A recogniser from models people have, built on a laptop: Whisper base + SmolLM2-135M-Instruct.

    hf download openai/whisper-base --local-dir=whisper-base
    hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir=smollm2-135m

    python -m otreg_jax.train --config=configs/laptop.py --workdir=runs/laptop \\
        --config.encoder.path=whisper-base --config.llm.path=smollm2-135m \\
        --config.data.train=my/train.jsonl --config.data.test=mine=my/test.jsonl
    python -m otreg_jax.evaluate --workdir=runs/laptop

Both models stay frozen. First the adapter alone is aligned to the LLM's embedding table, which
needs none of the LLM's layers; then adapter and LoRA learn to transcribe. What the encoder says of
each recording is computed once and kept.

Arms: `ctc` (CTC aligns), `otreg` (CTC and OTReg at layer 0 do), `position` (CTC and a plan that
never looks at the embeddings: the control), `ce` (no aligning, as long: cross-entropy from the
first step). On human speech never heard `ctc` and `otreg` make about as many errors, `ce` a quarter
to four fifths more (docs/study.md); `ctc` is the simpler one, and the default.

To train on text that eSpeak NG speaks, alone or beside recordings:
--config.synthetic.sentences=FILE.

How well it does and how long it takes: docs/recognizer.md.
"""

from otreg_jax import config as config_lib

ARMS = ("ctc", "otreg", "position", "ce")


def get_config(arm: str = "ctc"):
    """The recipe of an arm: ctc, otreg, position or ce."""
    if arm not in ARMS:
        raise ValueError(f"configs/laptop.py:{arm}: no such arm, choose from {', '.join(ARMS)}")
    c = config_lib.default()
    # 20 steps that align take as long as one through the LLM.
    c.num_steps = 1600 if arm == "ce" else 3500
    c.batch_size = 8
    c.packing = True
    c.checkpoint_every = 250
    c.encoder.path = "whisper-base"
    c.encoder.keep = True
    c.llm.path = "smollm2-135m"
    # As a chat turn ("chat:Transcribe the speech. {speech}") it has 37 tokens, most of what the
    # LLM reads of a short recording: a step would take nearly twice as long.
    c.prompt = "{speech}\n"
    c.adapter.stack = 4  # 12.5 positions a second
    c.adapter.hidden_dim = 1024
    c.adapter.norm = "table"
    c.lora.pattern = "llm/layers/attn/(q|k|v|o)/kernel"
    c.lora.rank = 16
    c.freeze = r"^(encoder|llm)/(?!.*/lora_[ab]$)"
    c.data.max_duration = 20.0
    c.data.num_buckets = 6
    c.optim.learning_rate = 5e-4
    c.optim.warmup_steps = 25
    c.ctc.classes = "used"
    c.otreg.text_set, c.otreg.center = "sequence", "mean"
    c.otreg.position_weight, c.otreg.position_weight_final = 3.0, 0.0
    if arm == "position":
        c.otreg.plan, c.otreg.position_weight_final = "position", -1.0
    if arm != "ce":
        c.stages = {
            "align": {
                "start": 0,
                "ce": {"weight": 0.0},
                "ctc": {"weight": 1.0},
                "otreg": {"weight": 0.0 if arm == "ctc" else 1.0},
                "optim": {"learning_rate": 2e-3},
                "train": "^(adapter|ctc)/",
            },
            "sft": {"start": 2000},
        }
    return c
