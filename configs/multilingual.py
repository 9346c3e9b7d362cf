"""Ten languages: Whisper-large-v3 + Qwen2.5-7B, adapter and LoRA, on Multilingual LibriSpeech and
Common Voice.

    for lang in de nl fr es it pt pl; do for split in train dev; do
      python -m otreg_jax.data.prepare --layout=mls --split=$split \\
          --input=mls_$lang --output=data/mls_$lang
    done; done
    for lang in en ja zh-CN; do for split in train dev; do
      python -m otreg_jax.data.prepare --layout=common_voice --split=$split \\
          --input=cv_$lang --output=data/cv_$lang
    done; done
    for model in openai/whisper-large-v3 Qwen/Qwen2.5-7B-Instruct; do   # COMMIT: which you pin
      hf download $model --revision COMMIT --include '*.json' --include '*.safetensors' \\
          --local-dir weights/${model#*/}
    done

    python -m otreg_jax.train --config=configs/multilingual.py:otreg --workdir=runs/multi
    python -m otreg_jax.train --config=configs/multilingual.py:runlocal --workdir=runs/multi-local

    gcloud storage cp -r data weights gs://BUCKET/
    bash launch/train_tpu.sh --name multi --zone us-east5-a --type v5p-128 \\
        --config configs/multilingual.py:otreg@gs://BUCKET --workdir gs://BUCKET/runs/multi

Languages are drawn with temperature 2: small ones more often than their share. Arms as in
configs/librispeech.py, and `full`: the whole LLM trains, without LoRA, and OTReg aims at a frozen
copy of what lies below (embedding table and one layer: 1.5 GiB, 93 MiB on each of 16 chips).
"""

import functools
import runpy
from pathlib import Path

ARMS = ("otreg", "baseline", "full", "runlocal")
LIBRISPEECH = runpy.run_path(str(Path(__file__).with_name("librispeech.py")))

MLS = ("de", "nl", "fr", "es", "it", "pt", "pl")
COMMON_VOICE = ("en", "ja", "zh-CN")


def get_config(argument: str = "otreg"):
    """The recipe of an arm; "otreg@DIR" finds data/ and weights/ in DIR."""
    arm, _, root = argument.partition("@")
    if arm not in ARMS:
        raise ValueError(
            f"configs/multilingual.py:{arm}: no such arm, choose from {', '.join(ARMS)}"
        )
    c = LIBRISPEECH["get_config"](f"baseline@{root}")
    below = functools.partial(LIBRISPEECH["join"], root)
    # Not more than 16: split further, 3584 rows no longer fill TPU tiles, and XLA gathers them by
    # all-reduce, at twice the traffic.
    c.mesh = {"data": -1, "fsdp": 16, "tensor": 1}
    c.num_steps = 100_000
    c.batch_size = 512
    c.llm.path = below("weights/Qwen2.5-7B-Instruct")
    corpora = [f"mls_{lang}" for lang in MLS] + [f"cv_{lang}" for lang in COMMON_VOICE]
    c.data.train = ",".join(below(f"data/{corpus}:train") for corpus in corpora)
    c.data.dev = ""
    c.data.test = ",".join(f"{corpus}={below(f'data/{corpus}:dev')}" for corpus in corpora)
    c.data.mixture = "lang"
    c.data.temperature = 2.0
    c.data.num_buckets = 6
    if arm != "baseline":
        LIBRISPEECH["otreg"](c)
    if arm == "full":
        c.lora.pattern, c.freeze = "", "^encoder/"
        c.optim.learning_rate = 2e-5
        c.optim.multipliers = (("^adapter/", 10.0),)
    if arm == "runlocal":
        LIBRISPEECH["runlocal"](c)
        c.synthetic.lang = "de"
        c.synthetic.train_voices = (("de", 45), ("de+f2", 60))
        c.synthetic.templates = ("ruf {person} {when} an", "schreib {person} {when}")
        c.synthetic.slots.when = ("heute", "morgen", "am montag", "am freitag", "nachher")
    return c
