"""Evaluation and transcription from a run directory alone."""

import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy_run import make_run, serve_buckets, write_set

from otreg_jax import (
    alignment,
    build,
    decoding,
    evaluate,
    recognition,
    rundir,
    sharding,
    transcribe,
)
from otreg_jax.data import sets, sources


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    dev, other = write_set(folder / "dev", 9, seed=0), write_set(folder / "other", 5, seed=1)
    (folder / "other" / "1.wav").write_bytes(b"not audio")
    for name, seed in (("ours", 0), ("theirs", 1)):
        make_run(folder / name, dev=dev, test=f"other voices={other}", seed=seed)
    return folder


@pytest.fixture(scope="module")
def results(runs):
    return evaluate.evaluate(runs / "ours", compare=[runs / "theirs"], batch_size=8)


def test_every_set_is_scored_and_marked(runs, results):
    stored = json.loads((runs / "ours" / "eval" / "results.json").read_text())
    assert stored["normalizer"] == {"style": "whisper", "version": 2}
    assert stored["step"] == 3 and list(stored["sets"]) == ["dev", "other voices"]
    dev, other = stored["sets"].values()
    assert (dev["n"], dev["in_domain"], other["n"], other["in_domain"]) == (9, True, 4, False)
    for row in (dev, other):
        assert row["wer"] > 0 and row["interval"][0] <= row["wer"] <= row["interval"][1]
        assert row["unfinished"] + row["empty_hypotheses"] > 0  # the model has learned nothing
        assert set(row["alignment"]) == {
            "transport_cost",
            "marginal_error",
            "entropy",
            "nearest_cosine",
            "retrieval_accuracy",
            "monotonicity",
            "centroid_distance",
        }
        assert np.isfinite(list(row["alignment"].values())).all()
    rows = [json.loads(x) for x in (runs / "ours/eval/hypotheses.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows if r["set"] == "dev"] == [f"utt-{i}" for i in range(9)]
    assert sum(r["errors"] for r in rows if r["set"] == "dev") == pytest.approx(
        dev["wer"] * dev["words"]
    )


def test_unreadable_audio_is_reported_and_not_fatal(runs, results):
    skipped = (runs / "ours" / "eval" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"].rpartition("/")[2] for line in skipped] == ["set.jsonl:2"]
    assert "Not evaluated" in (runs / "ours" / "eval" / "report.html").read_text()


def test_two_processes_evaluate_as_one(runs, results, tmp_path):
    rows = (runs / "ours/eval/hypotheses.jsonl").read_text().splitlines()
    shutil.copytree(runs / "ours", tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = ["-m", "otreg_jax.evaluate", f"--workdir={tmp_path / 'run'}", "--batch_size=8"]
    processes = []
    for i in range(2):
        env = os.environ | {
            "JAX_NUM_CPU_DEVICES": "4",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i),
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        }
        processes.append(
            subprocess.Popen([sys.executable, *command], env=env, stdout=subprocess.PIPE, text=True)
        )
    shown = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert ["report:" in text for text in shown] == [True, False]  # process 0 speaks and writes
    found = (tmp_path / "run/eval/hypotheses.jsonl").read_text().splitlines()
    for one, two in zip(map(json.loads, rows), map(json.loads, found), strict=True):
        assert two.pop("score") == pytest.approx(one.pop("score"), abs=1e-4)
        assert two == one
    skipped = (tmp_path / "run/eval/skipped.jsonl").read_text().splitlines()
    assert len(skipped) == 1


def test_compared_run_has_its_own_results_and_paired_intervals(runs, results):
    differences = results["compare"][str(runs / "theirs")]
    theirs = json.loads((runs / "theirs" / "eval" / "results.json").read_text())
    for name, row in results["sets"].items():
        low, high = differences[name]["interval"]
        assert differences[name]["difference"] == pytest.approx(
            row["wer"] - theirs["sets"][name]["wer"]
        )
        assert low <= differences[name]["difference"] <= high
    page = (runs / "ours" / "eval" / "report.html").read_text()
    assert page.count("<svg class='plan'") == 4  # two sets, two runs
    table = evaluate.table(results)
    assert "other voices" in table and "- theirs" in table


def test_finished_evaluation_of_a_compared_run_is_used_again(runs, results, capsys):
    path = runs / "theirs" / "eval" / "hypotheses.jsonl"
    before = path.stat().st_mtime_ns
    again = evaluate.evaluate(runs / "ours", compare=[runs / "theirs"], batch_size=8)
    assert again == results
    assert path.stat().st_mtime_ns == before
    assert "using its evaluation of step 3" in capsys.readouterr().out


def test_interrupted_evaluation_goes_on_where_it_stopped(runs, results, monkeypatch):
    path = runs / "ours" / "eval" / "partial.jsonl"
    assert not path.exists()
    decoded = []

    def stop_after_one(*args):
        decoded.append(len(args[1]))
        yield next(batches(*args))
        raise KeyboardInterrupt

    batches = recognition.batches
    monkeypatch.setattr(alignment, "NUM_MEASURED", 2)
    monkeypatch.setattr(recognition, "batches", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(runs / "ours", batch_size=8)
    done = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert len(done) == 7  # one of the batch is unreadable
    measured_again = sum(row["id"] in ("utt-0", "utt-1") for row in done)
    with open(path, "a") as file:
        file.write('{"set": "dev", "id": "torn')

    monkeypatch.setattr(
        recognition, "batches", lambda *args: decoded.append(len(args[1])) or batches(*args)
    )
    again = evaluate.evaluate(runs / "ours", batch_size=8)
    assert decoded == [14, 14 - 7 + measured_again]
    for name, row in results["sets"].items():
        assert again["sets"][name]["wer"] == row["wer"] and again["sets"][name]["n"] == row["n"]
    assert not path.exists()


def test_a_remote_run_is_evaluated_into_its_bucket(runs, results, tmp_path, monkeypatch):
    """Everything but its checkpoint, which is another's."""
    serve_buckets()
    monkeypatch.chdir(tmp_path)
    run = build.load_run(runs / "ours")
    monkeypatch.setattr(build, "load_run", lambda *_: run)
    found = evaluate.evaluate("gs://bucket/ours", batch_size=8)
    assert {name: row["wer"] for name, row in found["sets"].items()} == {
        name: row["wer"] for name, row in results["sets"].items()
    }
    folder = rundir.of("gs://bucket/ours").eval
    written = {path.name for path in folder.iterdir()}
    assert written == {path.name for path in (runs / "ours" / "eval").iterdir()}
    assert "<h1>ours</h1>" in (folder / "report.html").read_text()
    assert not list(tmp_path.iterdir())


def test_other_sets_can_be_named(runs, tmp_path):
    silence = write_set(tmp_path / "silence", 3, seed=5, texts=("",), lang="de")
    results = evaluate.evaluate(
        runs / "ours", manifests=f"silence={silence}", in_domain=["silence"], batch_size=8
    )
    row = results["sets"]["silence"]
    assert row["in_domain"] and row["empty_references"] == 3 and "alignment" not in row
    assert row["empty_words"] == row["insertions"] and row["empty_hypotheses"] == 0
    named = {"manifests": f"silence={silence}", "batch_size": 8, "normalizer": "open_asr"}
    again = evaluate.evaluate(runs / "ours", in_domain=["silence"], **named)
    assert again["normalizer"]["style"] == "open_asr"
    thai = write_set(tmp_path / "thai", 1, seed=5, lang="Thai")
    with pytest.raises(ValueError, match="open_asr has rules for en, .* the sets are in th"):
        evaluate.evaluate(runs / "ours", **named | {"manifests": f"thai={thai}"})
    with pytest.raises(ValueError, match="no set speech; there are silence"):
        evaluate.evaluate(runs / "ours", manifests=f"silence={silence}", in_domain=["speech"])


def test_what_is_wrong_is_said(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run here"):
        evaluate.evaluate(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such manifest"):
        evaluate.evaluate(runs / "ours", manifests="x=missing.jsonl")
    make_run(tmp_path / "bare", dev="")
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate.evaluate(tmp_path / "bare")


def test_eight_devices_evaluate_as_one(runs, results):
    run = build.load_run(runs / "ours")
    assert run.mesh.size == 8
    utterances, _ = sets.load_eval(run.config, runs / "ours")
    one = jax.make_mesh((1, 1, 1), sharding.AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1])
    slm = build.modules(run.config, run.tokenizer.vocab_size, run.slm.prompt, mesh=one)
    params = jax.device_put(run.params, NamedSharding(one, P()))
    alone = run._replace(mesh=one, slm=slm, params=params)
    settings = decoding.Settings(6)
    rows = []
    for r in (run, alone):
        with recognition.Partial(runs / "partial.jsonl", {"devices": r.mesh.size}) as partial:
            skipped = runs / "skipped.jsonl"
            rows += recognition.decode_sets(r, utterances, settings, 0, 8, skipped, "", partial)[:1]
    for eight, single in zip(*rows, strict=True):
        assert eight["score"] == pytest.approx(single["score"], abs=1e-4)
        assert {**eight, "score": 0} == {**single, "score": 0}
    assert len({row["hypothesis"] for row in rows[0]}) > 1


def test_alignment_figures_of_a_known_alignment():
    # Every token is said by four speech positions in its own direction, the third token twice.
    T, S, D = 6, 24, 8
    text = np.zeros((2, T, D), np.float32)
    text[0, np.arange(T), [0, 1, 2, 3, 4, 2]] = text[1, np.arange(T), [5, 6, 7, 0, 1, 2]] = 1.0
    ids = text.argmax(axis=-1)
    speech = np.repeat(text, S // T, axis=1) + 0.5
    # The times say that the second half of every token is spoken by the next one.
    edges = np.arange(T + 1) / T + 0.5 / T
    spoken = np.broadcast_to(np.stack([edges[:-1], edges[1:]], axis=1), (2, T, 2))
    lengths = (np.array([S, S]), np.array([T, T]))
    figures, plan = alignment.figures(speech - 0.5, text, ids, spoken, *lengths)
    assert figures["spoken_mass_even"] == pytest.approx(0.5)
    assert figures["spoken_mass"] == pytest.approx(0.45, abs=0.05)  # a repeated word divides
    assert figures["retrieval_accuracy"] == 1.0
    assert figures["monotonicity"] > 0.8
    assert figures["centroid_distance"] == pytest.approx(0, abs=1e-6)
    assert figures["transport_cost"] < 0.02
    np.testing.assert_allclose(plan.sum(axis=(1, 2)), 1, atol=1e-4)
    reversed_figures, _ = alignment.figures(speech[:, ::-1] - 0.5, text, ids, spoken, *lengths)
    assert reversed_figures["monotonicity"] == pytest.approx(
        -float(figures["monotonicity"]), abs=1e-3
    )
    shifted, _ = alignment.figures(speech, text, ids, spoken, *lengths)
    assert shifted["centroid_distance"] > 0.3

    pad = lambda x: np.pad(x, [(0, 1), (0, 3), *[(0, 0)] * (x.ndim - 2)])
    padded = [pad(x) for x in (speech - 0.5, text, ids, spoken)]
    padded[0][0, S:] = padded[1][0, T:] = np.nan
    same, _ = alignment.figures(*padded, *(np.append(length, 0) for length in lengths))
    for name, value in figures.items():
        assert same[name] == pytest.approx(float(value), abs=1e-4), name


# Transcription ---------------------------------------------------------------------------------


def test_cuts_lie_at_the_quietest_moments():
    rng = np.random.default_rng(0)
    audio = rng.normal(size=16000 * 10).astype(np.float32)
    for quiet in (2.5, 5.0, 7.2):
        audio[int(16000 * (quiet - 0.2)) : int(16000 * (quiet + 0.2))] *= 0.01
    edges = transcribe.quiet_cuts(audio, 16000, limit=3.0)
    assert edges[0] == 0 and edges[-1] == 10
    np.testing.assert_allclose(edges[1:4], [2.5, 5.0, 7.2], atol=0.15)
    assert max(np.diff(edges)) <= 3.0 + 1e-6
    assert transcribe.quiet_cuts(audio[:32000], 16000, limit=3.0) == [0, 2]
    noise = transcribe.quiet_cuts(np.ones(16000 * 20, np.float32), 16000, limit=3.0)
    assert max(np.diff(noise)) <= 3.0 + 1e-6


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    rng = np.random.default_rng(3)
    soundfile.write(folder / "short.wav", rng.normal(size=12000) * 0.1, 16000)
    soundfile.write(folder / "long.flac", rng.normal(size=(44100 * 5, 2)) * 0.1, 44100)
    (folder / "broken.wav").write_bytes(b"RIFF")
    return folder


def test_files_are_transcribed_whole(runs, audio, capsys, monkeypatch):
    command = [f"--workdir={runs / 'ours'}"]
    files = [str(audio / "*.wav"), str(audio / "long.flac")]
    assert transcribe.cli([*command, *files, "--json"]) == 1
    out, err = capsys.readouterr()
    assert "broken.wav cannot be read as audio" in err
    short, long = map(json.loads, out.splitlines())
    assert short["file"].endswith("short.wav") and len(short["segments"]) == 1
    pieces = long["segments"]
    assert [p["start"] for p in pieces[1:]] == [p["end"] for p in pieces[:-1]]
    assert pieces[0]["start"] == 0 and pieces[-1]["end"] == pytest.approx(5.0)
    assert all(p["end"] - p["start"] <= 2.0 for p in pieces)
    assert long["text"] == " ".join(p["text"] for p in pieces if p["text"])
    assert any(p["unfinished"] for p in pieces) and "pieces ran into the limit of tokens" in err

    assert transcribe.cli([*command, files[1], "--srt"]) == 0
    blocks = [block.splitlines() for block in capsys.readouterr().out.strip().split("\n\n")]
    assert [block[0] for block in blocks] == [str(i + 1) for i in range(len(blocks))]
    shown = " ".join(line for block in blocks for line in block[2:])
    assert shown.split() == long["text"].split()
    stamps = [stamp for block in blocks for stamp in block[1].split(" --> ")]
    assert stamps == sorted(stamps) and stamps[-1] <= "00:00:05,000"

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{audio / 'short.wav'}\n\n"))
    assert transcribe.cli([*command, "-"]) == 0
    assert capsys.readouterr().out == f"{audio / 'short.wav'}\t{short['text']}\n"

    assert transcribe.cli([*command, str(audio / "nothing*.mp3")]) == 1
    assert "no such audio file" in capsys.readouterr().err
    assert transcribe.cli([*command, str(audio / "*"), "--srt"]) == 1
    assert "take one file" in capsys.readouterr().err


def test_a_file_says_the_same_whatever_else_is_in_the_command(runs, audio):
    run = build.load_run(runs / "ours")
    run.config.decode.max_tokens = 0  # by the length of the audio
    short, long = str(audio / "short.wav"), str(audio / "long.flac")
    alone, _ = transcribe.transcribe(run, [short])
    # Pieces are no longer than what was trained on.
    together, _ = transcribe.transcribe(run._replace(longest_seconds=1.3), [short, long])
    assert alone[short] == [
        pytest.approx(together[short][0]._replace(text=alone[short][0].text), abs=1e-4)
    ]
    assert alone[short][0].text == together[short][0].text
    assert max(s.end - s.start for s in together[long]) <= 1.3
    assert together[long][-1].end == pytest.approx(5.0)
    for piece in itertools.chain(*together.values()):
        count, limit = len(run.tokenizer.encode(piece.text)), 8 + 16 * (piece.end - piece.start)
        assert count <= limit and (piece.finished or count == int(limit))
    pieces = transcribe.transcribe(run, [short], silence_db=-10.0)[0][short]
    assert pieces == [transcribe.Segment(0.0, 0.75, "", 0.0, True)]
    for seconds in (0, -1, 3.0, float("nan")):
        with pytest.raises(ValueError, match="the model takes 0.1 to 2 s"):
            transcribe.transcribe(run, [short], chunk_seconds=seconds)


def test_loudness_is_in_decibels_of_full_scale():
    tone = 0.1 * np.sin(np.arange(16000) / 5)
    assert transcribe.loudness(np.pad(tone, 32000)) == pytest.approx(-23.0, abs=0.1)
    assert transcribe.loudness(np.zeros(100)) == -200


def test_pieces_of_a_file_are_the_audio(audio):
    whole = sources.from_file(str(audio / "long.flac"))
    pieces = [sources.load_audio(piece) for piece in transcribe.split(whole, 2.0)]
    together, expected = np.concatenate(pieces), sources.load_audio(whole)
    assert len(together) == pytest.approx(len(expected), abs=2 * len(pieces))
    assert jnp.corrcoef(together[:16000], expected[:16000])[0, 1] > 0.99
