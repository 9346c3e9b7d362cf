"""Your own recordings: a small spoken language model from scratch, from JSONL manifests.

A manifest has one recording a line, paths relative to it:
    {"audio_filepath": "audio/0001.flac", "text": "what is said", "duration": 3.2}

    python -m otreg_jax.train --config=configs/manifest.py --workdir=runs/mine \\
        --config.data.train=my/train.jsonl --config.data.dev=my/dev.jsonl
    python -m otreg_jax.evaluate --workdir=runs/mine

All parts are trained together, with OTReg and CTC as auxiliary losses; `configs/manifest.py:ce` has
neither. Sized for hours of speech and a CPU or one small GPU. With a pretrained encoder and LLM use
configs/librispeech.py.
"""

from otreg_jax import config as config_lib

ARMS = ("otreg", "ce")


def get_config(arm: str = "otreg"):
    """The recipe; "ce" is cross-entropy alone."""
    if arm not in ARMS:
        raise ValueError(f"configs/manifest.py:{arm}: no such arm, choose from {', '.join(ARMS)}")
    c = config_lib.default()
    c.num_steps = 4000
    c.batch_size = 16
    c.log_every = 50
    c.data.num_buckets = 4
    c.data.augment.time_masks = 2
    c.data.augment.time_width = 25
    c.data.augment.freq_masks = 2
    c.data.augment.freq_width = 15
    c.tokenizer.vocab_size = 256
    c.encoder.embed_dim = 144
    c.encoder.num_layers = 4
    c.encoder.num_heads = 4
    c.encoder.mlp_dim = 576
    c.encoder.strides = (2, 2)  # 25 positions a second
    c.encoder.max_positions = 750
    c.adapter.hidden_dim = 288
    c.llm.embed_dim = 144
    c.llm.num_layers = 3
    c.llm.head_dim = 36
    c.llm.mlp_dim = 432
    c.optim.warmup_steps = 200
    c.optim.weight_decay = 0.01
    if arm == "otreg":
        c.otreg.weight = 1.0
        c.otreg.text_set = "sequence"
        c.otreg.position_weight = 3.0
        c.ctc.weight = 0.3
    return c
