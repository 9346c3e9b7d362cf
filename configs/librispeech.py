"""English: Whisper-large-v3 + Qwen2.5-1.5B-Instruct, adapter and LoRA, on LibriSpeech.

    for split in train-clean-100 train-clean-360 train-other-500 dev-clean dev-other; do
      python -m otreg_jax.data.prepare --layout=librispeech --split=$split \\
          --lower_case --input=LibriSpeech --output=data/librispeech
    done
    for model in openai/whisper-large-v3 Qwen/Qwen2.5-1.5B-Instruct; do   # COMMIT: which you pin
      hf download $model --revision COMMIT --include '*.json' --include '*.safetensors' \\
          --local-dir weights/${model#*/}
    done

    python -m otreg_jax.train --config=configs/librispeech.py:otreg --workdir=runs/libri
    python -m otreg_jax.train --config=configs/librispeech.py:runlocal --workdir=runs/libri-local

On TPUs, `@` says below what data/ and weights/ are (docs/launch.md is the whole way there):

    gcloud storage cp -r data weights gs://BUCKET/
    bash launch/train_tpu.sh --name libri --zone us-east5-a --type v5litepod-16 \\
        --config configs/librispeech.py:otreg@gs://BUCKET --workdir gs://BUCKET/runs/libri

`otreg` aligns the adapter first, then the LLM comes in. `baseline` is cross-entropy alone.
`runlocal` is `otreg` at a tiny size with random weights and synthetic speech: a minute on a CPU to
see that everything fits together. The sizes of weights and learning rates come from experiments on
small models; expect to tune them.
"""

import functools

from otreg_jax import config as config_lib

ARMS = ("otreg", "baseline", "runlocal")


def get_config(argument: str = "otreg"):
    """The recipe of an arm; "otreg@DIR" finds data/ and weights/ in DIR."""
    arm, _, root = argument.partition("@")
    if arm not in ARMS:
        raise ValueError(
            f"configs/librispeech.py:{arm}: no such arm, choose from {', '.join(ARMS)}"
        )
    c = config_lib.default()
    c.num_steps = 20_000
    c.batch_size = 128
    c.log_every = 50
    c.checkpoint_every = 1000
    c.compute_dtype = "bfloat16"
    c.remat = "dots"
    c.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    below = functools.partial(join, root)
    splits = ("train_clean_100", "train_clean_360", "train_other_500")
    c.data.train = ",".join(below(f"data/librispeech:{split}") for split in splits)
    c.data.dev = below("data/librispeech:dev_clean")
    c.data.test = "other=" + below("data/librispeech:dev_other")
    c.data.num_mels = 128
    c.data.num_buckets = 4
    c.data.num_workers = 8
    c.data.augment.time_masks = 2
    c.data.augment.freq_masks = 2
    c.encoder.path = below("weights/whisper-large-v3")
    c.llm.path = below("weights/Qwen2.5-1.5B-Instruct")
    c.prompt = "chat:Transcribe: {speech}"
    c.adapter.stack = 4  # 12.5 positions a second
    c.adapter.hidden_dim = 2048
    c.adapter.norm = "table"
    c.lora.pattern = "llm/layers/attn/(q|k|v|o)/kernel"
    c.lora.rank = 16
    c.freeze = r"^(encoder|llm)/(?!.*/lora_[ab]$)"
    c.optim.learning_rate = 2e-4
    c.optim.warmup_steps = 1000
    c.optim.weight_decay = 0.01
    if arm != "baseline":
        otreg(c)
    if arm == "runlocal":
        runlocal(c)
    return c


def join(root: str, path: str) -> str:
    """A path below a folder or bucket; the path alone if there is none."""
    return f"{root.rstrip('/')}/{path}" if root else path


def otreg(c) -> None:
    """The adapter is aligned first, by CTC, for a twentieth of the steps, none of which runs the
    LLM. Then CTC stays beside the cross-entropy and, after a tenth of the run, a light OTReg:
    contextual, centred, with a prior that fades. docs/study.md says why: the first on real parts,
    the second on tiny ones."""
    c.stages = {
        "align": {
            "start": 0,
            "ce": {"weight": 0.0},
            "ctc": {"weight": 1.0},
            "otreg": {"weight": 0.0, "start_step": 0, "ramp_steps": 0},
            "optim": {"learning_rate": 2e-3, "warmup_steps": 100},
            "train": "^(adapter|ctc)/",
        },
        "sft": {"start": c.num_steps // 20},
    }
    c.ctc.classes = "used"
    c.ctc.weight = 0.3
    c.otreg.weight = 0.3
    c.otreg.start_step = c.num_steps // 10
    c.otreg.ramp_steps = c.num_steps // 10
    c.otreg.layer = 1
    c.otreg.text_set = "sequence"
    c.otreg.center = "mean"
    c.otreg.position_weight = 3.0
    c.otreg.position_weight_final = 0.0


def runlocal(c) -> None:
    """Tiny random weights in place of the pretrained ones, a few synthetic utterances."""
    c.encoder.path = c.llm.path = ""
    c.prompt = "{speech}\n"
    c.adapter.hidden_dim = 64
    c.mesh.data, c.mesh.fsdp = -1, 1
    c.data.update({"train": "", "dev": "", "test": "", "num_workers": 0, "num_buckets": 2})
    c.compute_dtype = "float32"
    c.num_steps, c.batch_size, c.log_every = 20, 8, 5
    c.otreg.start_step, c.otreg.ramp_steps = 5, 5
    c.stages.align.optim.warmup_steps, c.stages.sft.start = 2, 5
    c.optim.warmup_steps = 5
    c.synthetic.update(
        {
            "num_train": 48,
            "num_test": 8,
            "seed": 0,
            "lang": "en",
            "rate": 175,
            "train_voices": (("en-us", 40), ("en-gb+f2", 60)),
            "conditions": {},
            "templates": (
                "call {person} {when}",
                "write to {person} {when}",
                "visit {person} {when}",
            ),
            "slots": {
                "person": ("anna", "peter", "maria", "david", "laura", "simon", "julia"),
                "when": ("today", "tomorrow", "on monday", "on friday", "next week"),
            },
        }
    )
