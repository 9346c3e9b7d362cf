"""What runs on a GPU, as far as a machine without one can tell: programs lowered for CUDA, and
benchmarks/gpu.sh against time limits, failures and, slowly, in full."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from toy import toy_config

from otreg_jax import aot
from otreg_jax.models import attention

ROOT = Path(__file__).parents[1]
GPU_INFO = "jax._src.pallas.triton.gpu_info"
SCRIPT = ROOT / "benchmarks/gpu.sh"


@pytest.mark.parametrize("options", [{"is_causal": True}, {"length_B": [9, 4]}], ids=str)
def test_flash_attention_and_its_gradient_lower_for_cuda(options, monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    options = {name: jnp.asarray(x) if name == "length_B" else x for name, x in options.items()}

    def loss(q, k, v):
        attend = functools.partial(attention.attention, scale=0.125, kernel="cudnn", **options)
        return attend(q, k, v).astype(jnp.float32).sum()

    shape = lambda heads: jax.ShapeDtypeStruct((2, 9, heads, 64), jnp.bfloat16)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(shape(4), shape(2), shape(2))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in program and "__cudnn$fmhaSoftmaxBackward" in program


def test_the_whole_step_lowers_for_cuda_with_flash_attention_and_the_fused_kernel(monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention, "choose_kernel", lambda *_, **__: "cudnn")
    config = toy_config(compute_dtype="bfloat16", otreg__weight=1.0, otreg__backend="pallas")
    config.encoder.update(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32)
    config.llm.update(embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
    slm, step_of, arguments = aot.abstract_step(config, jax.devices()[:1], 64, 7)
    if importlib.util.find_spec(GPU_INFO):  # JAX 0.12 takes it from the mesh, whose device is a CPU
        monkeypatch.setattr(f"{GPU_INFO}.get_device_kind", lambda: "NVIDIA H100 80GB HBM3")
    program = step_of(slm).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in program and "triton" in program
    assert "f64" not in program


# ---- benchmarks/gpu.sh ---------------------------------------------------------------------------


@pytest.fixture
def fake_python(tmp_path):
    """An interpreter that writes down its modules, writes their --out, and does as told with them:
    fails at `benchmarks.step`, hangs at `benchmarks.peer_step`."""
    path = tmp_path / "python"
    path.write_text(
        f"#!{sys.executable}\n"
        "import sys, time, pathlib\n"
        "module, out = sys.argv[2], sys.argv[-1].removeprefix('--out=')\n"
        f"with open({str(tmp_path / 'calls')!r}, 'a') as file: print(module, file=file)\n"
        "if module == 'benchmarks.step': sys.exit('no such device')\n"
        "if module == 'benchmarks.peer_step': time.sleep(100)\n"
        "pathlib.Path(out).write_text('{}')\n"
    )
    path.chmod(0o755)
    return path


def run_script(*arguments, **environment):
    return subprocess.run(
        ["bash", SCRIPT, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def parts_of(out):
    return {p["part"]: p for p in map(json.loads, (out / "parts.jsonl").read_text().splitlines())}


def test_a_part_that_fails_or_hangs_does_no_harm_to_the_next(tmp_path, fake_python):
    script = SCRIPT.read_text().replace("part peer_step 100", "part peer_step 6")
    assert script != SCRIPT.read_text()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/gpu.sh").write_text(script)
    done = subprocess.run(
        ["bash", tmp_path / "benchmarks/gpu.sh", tmp_path / "out"],
        env=os.environ | {"PYTHON": str(fake_python)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "== step: failed with 1\nno such device" in done.stdout
    parts = parts_of(tmp_path / "out")
    assert list(parts)[:3] == ["correct", "step", "peer_step"]
    codes = {name: part["exit"] for name, part in parts.items()}
    assert codes.pop("step") == 1 and codes.pop("peer_step") == 124 and not any(codes.values())
    assert parts["peer_step"]["seconds"] <= 12
    assert all((tmp_path / "out" / f"{name}.json").exists() for name in codes)


def test_what_has_no_time_left_is_not_started(tmp_path, fake_python):
    done = run_script(tmp_path / "out", PYTHON=str(fake_python), MINUTES="0")
    assert done.returncode == 1 and not (tmp_path / "calls").exists()
    assert {part["exit"] for part in parts_of(tmp_path / "out").values()} == {124}


def test_the_study_takes_what_was_carried_there(tmp_path, fake_python):
    done = run_script(tmp_path / "out", "--study=carried", PYTHON=str(fake_python), MINUTES="3")
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "calls").read_text().split() == ["benchmarks.study_real"]
    assert (tmp_path / "out" / "study.jsonl").exists()


def test_its_parts_fit_into_the_time_there_is():
    limits = [
        int(line.split()[2])
        for line in SCRIPT.read_text().partition("\nelse\n")[2].splitlines()
        if line.startswith("  part ")
    ]
    assert len(limits) >= 6 and sum(limits) <= 9 * 60


def test_wheels_of_what_is_missing_are_installed_beside_it(tmp_path):
    """The script asks pip for those alone whose packages this Python does not have."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("numpy-1.0-py3-none-any.whl", "no_such_thing-1.0-py3-none-any.whl"):
        (wheels / name).write_bytes(b"")
    done = run_script(tmp_path / "out", PYTHON=sys.executable, WHEELS=str(wheels), MINUTES="0")
    assert done.returncode != 0 and "no_such_thing" in done.stderr and "numpy" not in done.stderr


@pytest.mark.slow
def test_rehearsal(tmp_path):
    settings = {"PYTHON": sys.executable, "MINUTES": "25", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = run_script(tmp_path / "out", "--rehearse", **settings)
    parts = parts_of(tmp_path / "out")
    assert done.returncode == 0, done.stdout
    for name in parts:
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())
    rows = json.loads((tmp_path / "out/correct.json").read_text())["rows"]
    assert len(rows) > 10 and all(row["good"] for row in rows.values())
