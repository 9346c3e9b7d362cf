"""Processes that differ end before they train, say where, and restore one checkpoint or none."""

import pathlib
import re

import pytest
from test_checkpoint import MADE_OF, state_of
from test_cluster import by_hand, run_all
from toy_run import tone_config, write_tones

from otreg_jax import agreement, checkpoint, cluster
from otreg_jax import train as train_lib
from otreg_jax.data import sources

CORPUS = """
    from otreg_jax import agreement
    from otreg_jax.data import sources
    found = [sources.Utterance(str(i), f"{i}.wav", f"text {i}", 1.0) for i in range(2000)]
    agreement.check_data("training data", found)
    print("agreed", flush=True)
    if jax.process_index():
        CHANGE
    agreement.check_data("training data", found)
"""


@pytest.mark.parametrize(
    "change, first",
    [
        ("found[1500] = found[1500]._replace(text='other')", "utterance 1500 = .*other"),
        ("found = found[:-1]", "utterance 1999 = None"),
        ("found[7], found[8] = found[8], found[7]", "utterance 7 = .*text 8"),
    ],
)
def test_the_first_utterance_that_differs_is_named(change, first):
    body = CORPUS.replace("CHANGE", change).strip()
    for status, printed in run_all(by_hand(2), body=body):
        assert status == 1 and "agreed" in printed, printed
        assert "differ in their training data:" in printed and "process 1 on" in printed
        assert re.search(first, printed)


def test_weights_are_compared_by_their_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    before = dict(agreement.signature(str(tmp_path)))
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[:8] = b"revision"
    (tmp_path / "model.safetensors").write_bytes(bytes(content))
    assert before.keys() == dict(agreement.signature(str(tmp_path))).keys()
    assert before != dict(agreement.signature(str(tmp_path)))


def test_the_corpus_is_its_utterances_in_their_order():
    found = [sources.Utterance(str(i), f"{i}.wav", f"text {i}", 1.0) for i in range(3)]
    assert agreement.corpus(found).startswith("3 utterances, 0.00 h, ")
    others = [
        found[::-1],
        found[:2],
        [*found[:2], found[2]._replace(text="x")],
        [*found[:2], found[2]._replace(duration=1.1)],
        [*found[:2], found[2]._replace(id="x")],
    ]
    assert len({agreement.corpus(x) for x in (found, *others)}) == 6
    # Where the audio is kept does not matter.
    assert agreement.corpus([u._replace(audio=f"/data/{u.audio}") for u in found]) == (
        agreement.corpus(found)
    )


RESTORE = """
    import sys; sys.path.insert(0, "TESTS")
    from test_checkpoint import MADE_OF, abstract, state_of
    from otreg_jax import checkpoint
    if "FAILS" == "one":
        real = checkpoint.ocp.training.Checkpointer.load
        def load(self, step, *args):
            if step == 8 and jax.process_index() == 1:
                raise OSError("503 Service Unavailable")
            return real(self, step, *args)
        checkpoint.ocp.training.Checkpointer.load = load
    state = checkpoint.restore("WORKDIR", abstract(), MADE_OF)
    print("restored", int(state.step), flush=True)
    with checkpoint.Checkpoints("WORKDIR") as checkpoints:
        checkpoints.save(state, 9, MADE_OF)
    print("saved", flush=True)
"""


@pytest.mark.parametrize("fails, step", [("none", 8), ("one", None), ("all", 4)])
def test_all_processes_restore_the_same_checkpoint_or_none(fails, step, tmp_path):
    """Of the steps 4 and 8 the newest; none if one process cannot read what the other can; the one
    before if the newest is damaged."""
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for saved in (4, 8):
            checkpoints.save(state_of(saved), saved, MADE_OF)
    if fails == "all":
        (tmp_path / "checkpoints/8/_CHECKPOINT_METADATA").write_text("{")
    tests = str(pathlib.Path(__file__).parent)
    body = RESTORE.replace("WORKDIR", str(tmp_path)).replace("TESTS", tests)
    for status, printed in run_all(by_hand(2), body=body.replace("FAILS", fails).strip()):
        if step:
            assert status == 0 and f"restored {step}" in printed and "saved" in printed, printed
        else:
            assert status == cluster.RESTART and "restored" not in printed, printed
            assert "process 1 cannot read" in printed and "503 Service" in printed
    assert (tmp_path / "checkpoints/9").exists() == bool(step)


def test_a_run_resumes_on_other_data_only_when_told(tmp_path):
    manifest = write_tones(tmp_path)
    changes = dict(num_steps=2, checkpoint_every=2, otreg__start_step=0, data__num_buckets=1)
    train_lib.train(tone_config(manifest, **changes), tmp_path / "run")
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="corpus: '12 utterances.*11 utterances.*allow_change"):
        train_lib.train(tone_config(manifest, **changes), tmp_path / "run")
    config = tone_config(manifest, data__allow_change=True, **changes)
    assert int(train_lib.train(config, tmp_path / "run").step) == 2
