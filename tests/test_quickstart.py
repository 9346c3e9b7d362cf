"""The quickstart at toy size, from speech synthesis to the report."""

import json
import pathlib
import runpy

import numpy as np
import pytest

from otreg_jax import evaluate, pretrained
from otreg_jax import train as train_lib

RECIPE = pathlib.Path(__file__).parent.parent / "configs" / "quickstart.py"


def toy_quickstart(arm: str):
    config = runpy.run_path(str(RECIPE))["get_config"](arm)
    config.num_steps, config.batch_size, config.log_every = 3, 8, 1
    config.optim.warmup_steps = 1
    config.synthetic.num_train, config.synthetic.num_test = 16, 4
    config.synthetic.conditions = {"fast": {"rate": 1.3}}
    config.encoder.update({"embed_dim": 16, "num_heads": 2, "mlp_dim": 32, "num_layers": 1})
    config.adapter.hidden_dim = 16
    config.llm.update({"embed_dim": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8})
    config.llm.mlp_dim = 32
    config.llm.pretrain.update({"num_steps": 2, "batch_size": 4})
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Work directories of the OTReg run and of the position-only control, trained as
    launch/train_local.sh does."""
    pytest.importorskip("espeakng_loader")
    folder = tmp_path_factory.mktemp("quickstart")
    train_lib.train(toy_quickstart("otreg"), folder / "otreg")
    control = toy_quickstart("position")
    control.data.cache, control.llm.path = str(folder / "otreg/data"), str(folder / "otreg/llm")
    train_lib.train(control, folder / "position")
    return folder / "otreg", folder / "position"


def test_the_run_directory_holds_everything(runs):
    ours, control = runs
    lines = [json.loads(line) for line in (ours / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) and "otreg" in line for line in lines)
    assert (ours / "config.json").exists() and (ours / "checkpoints" / "3").exists()
    assert not (control / "data").exists() and not (control / "llm").exists()


def test_the_frozen_llm_is_the_pretrained_one_in_hugging_face_layout(runs):
    from otreg_jax import build

    ours, control = runs
    _, stored = pretrained.load_llm(ours / "llm")
    for workdir in (ours, control):
        run = build.load_run(workdir)
        np.testing.assert_array_equal(
            run.params["llm"]["embed"]["embedding"], stored["embed"]["embedding"]
        )


def test_evaluation_compares_the_arms_on_every_set(runs):
    ours, control = runs
    results = evaluate.evaluate(ours, compare=[control], batch_size=8)
    assert set(results["sets"]) == {"dev", "fast"}
    for name, row in results["sets"].items():
        assert row["n"] == 4 and row["in_domain"] == (name == "dev")
        errors = row["substitutions"] + row["deletions"] + row["insertions"]
        assert row["wer"] == pytest.approx(errors / row["words"])
        assert row["wer"] > 0.5 and row["cer"] > 0.3  # after three steps it knows nothing yet
    assert set(results["compare"][str(control)]) == {"dev", "fast"}
    stored = json.loads((ours / "eval" / "results.json").read_text())
    assert stored == json.loads(json.dumps(results))
    hypotheses = (ours / "eval" / "hypotheses.jsonl").read_text().splitlines()
    assert len(hypotheses) == 8 and "reference" in json.loads(hypotheses[0])
    page = (ours / "eval" / "report.html").read_text()
    plans = page.split("<svg class='plan'")[1:]
    assert len(plans) == 4 and all("class='word'" in plan for plan in plans)  # timed by eSpeak
