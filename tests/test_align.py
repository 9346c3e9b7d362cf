"""Word times: monotone spans against brute force, tokens to words, and the command."""

import itertools
import json

import numpy as np
import pytest
from toy_run import make_run, write_set

from otreg_jax import align, alignment


def test_spans_are_the_best_monotone_division():
    rng = np.random.default_rng(0)
    for _ in range(20):
        num_speech, num_text = rng.integers(4, 8), rng.integers(1, 5)
        shares = rng.dirichlet(np.ones(num_text), num_speech)

        def likelihood(cuts, shares=shares, num_speech=num_speech):
            edges = [0, *cuts, num_speech]
            return sum(
                np.log(shares[a:b, t]).sum() for t, (a, b) in enumerate(itertools.pairwise(edges))
            )

        best = max(itertools.combinations(range(1, num_speech), num_text - 1), key=likelihood)
        starts, ends = alignment.monotone_spans(shares)
        np.testing.assert_array_equal(starts, [0, *best])
        np.testing.assert_array_equal(ends, [*best, num_speech])


def test_more_tokens_than_positions_share_them():
    starts, ends = alignment.monotone_spans(np.full((2, 5), 0.2))
    assert starts[0] == 0 and ends[-1] == 2
    assert (starts[1:] == ends[:-1]).all() and (starts < ends).all()


class Pieces:
    """A tokenizer whose pieces begin words with "_"."""

    vocabulary = ("_turn", "_on", "_the", "_kit", "chen", "_")

    def decode(self, ids):
        return "".join(self.vocabulary[i] for i in ids).replace("_", " ").strip()


def test_pieces_are_joined_to_words():
    starts = np.arange(4.0)
    words = alignment.words_of(Pieces(), [0, 2, 3, 4], starts, starts + 1)
    assert words == [("turn", 0.0, 1.0), ("the", 1.0, 2.0), ("kitchen", 2.0, 4.0)]


def test_textgrid_covers_the_utterance():
    text = align.as_textgrid([("a", 0.5, 1.0), ('say "b"', 1.0, 1.5)], duration=2.0)
    assert "intervals: size = 4" in text
    assert 'text = "say ""b"""' in text
    assert text.count("xmax = 2\n") == 3  # the file's, the tier's, the last interval's


def test_command_times_every_word_in_order(tmp_path, capsys):
    manifest = write_set(tmp_path / "dev", 9, seed=0)
    make_run(tmp_path / "run", dev=manifest)
    assert align.cli([str(manifest), f"--workdir={tmp_path / 'run'}", "--batch_size=8"]) == 0
    printed = map(json.loads, capsys.readouterr().out.splitlines())
    aligned = {line["id"]: line["words"] for line in printed}
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert set(aligned) == {line["id"] for line in lines}
    for line in lines:
        words = aligned[line["id"]]
        assert [word for word, _, _ in words] == line["text"].split()
        times = [t for _, start, end in words for t in (start, end)]
        assert times == sorted(times)
        assert times[0] == 0 and times[-1] == pytest.approx(line["duration"], abs=0.02)
    grids = tmp_path / "grids"
    command = [str(manifest), f"--workdir={tmp_path / 'run'}", f"--textgrid={grids}"]
    assert align.cli([*command, "--batch_size=8"]) == 0
    assert len(list(grids.glob("utt-*.TextGrid"))) == 9
    assert align.cli(["missing.jsonl", "--workdir=x"]) == 1
    assert "no such manifest" in capsys.readouterr().err
