"""The study's recipe, and its report on made-up results."""

import pathlib
import re
import runpy
import statistics

import jax
import numpy as np
import pytest

from benchmarks import study, study_questions, study_report
from otreg_jax import config as config_lib
from otreg_jax import losses, optim, otreg
from otreg_jax.data import sets
from otreg_jax.models.adapter import Adapter, AdapterConfig

RECIPE = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "configs" / "study.py"))
get_config = RECIPE["get_config"]


@pytest.mark.parametrize("arm", RECIPE["ARMS"])
def test_every_arm_is_a_valid_configuration_in_every_world(arm):
    for world in RECIPE["WORLDS"]:
        for options in ("", "+lora", "+tuned", "+screen", "+lora+tuned+screen"):
            config = get_config(f"{world}{options},{arm},3")
            config_lib.check(config)
            assert config.seed == 3
            assert bool(config.lora.pattern) == ("lora" in options)


def test_every_question_asks_for_known_runs():
    for question in study_questions.QUESTIONS:
        for run in question.runs():
            get_config(run)
    assert {arm for pair in study_report.PAIRS for arm in pair} <= set(RECIPE["ARMS"])


def test_names_that_mean_nothing_are_all_listed():
    with pytest.raises(ValueError) as error:
        get_config("trimed+lorra,cee,x,otreg.weight")
    for part in ("'trimed'", "'lorra'", "'cee'", "'x'", "'otreg.weight'"):
        assert part in str(error.value)
    assert get_config("trimmed,ce,1,otreg.weight=2.5").otreg.weight == 2.5


def test_the_splits_share_no_voice_that_is_tested_and_no_text():
    confirm, screen = (
        sets.synthetic_sets(get_config(f"{world},ce,0").synthetic)
        for world in ("untrimmed", "untrimmed+screen")
    )
    words = lambda items: {word for item in items for word in item.text.split()}
    for split in (confirm, screen):
        assert words(split["domain"]) <= words(split["train"])  # the same words, in other orders
        assert all(0.2 <= s <= 0.8 for item in split["train"] for s in item.silence)
        heard = {voice for voice, _ in get_config("encoder").synthetic.train_voices}
        assert not heard & {item.voice for item in split["unheard"]}
        assert heard >= {item.voice for item in split["voices"]}
    for name in ("train", "voices", "unheard", "domain"):
        assert not {i.voice for i in confirm[name]} & {i.voice for i in screen[name]}
        assert not {i.text for i in confirm[name]} & {i.text for i in screen[name]}
    grammar = get_config("untrimmed,ce,0").synthetic
    assert study.hallucinated([item.text for item in confirm["domain"]], grammar) == 0
    in_domain = [item.text for item in confirm["dev"]]
    assert study.hallucinated([*in_domain, "set a"], grammar) == 48 / 49


def line(arm: str, seed: int, errors, world="trimmed", step_seconds=0.1):
    """A run with `errors` on each of the sentences of every set, five words each."""
    names = [name for members in study_questions.SHIFTS.values() for name in members]
    one = {"errors": list(errors), "lengths": [5] * len(errors), "hallucinated": 0.25}
    return {
        "run": f"{world},{arm},{seed}",
        "world": world,
        "arm": arm,
        "seed": seed,
        "changes": [],
        "sets": dict.fromkeys(names, one),
        "process": 1,
        "step_seconds": step_seconds,
        "spoken_mass": 0.4,
        "spoken_mass_even": 0.6,
        "seconds": [1000, 200],
    }


@pytest.fixture
def results(monkeypatch):
    question = study_questions.Question("Made up", "trimmed", ("ce", "better", "same"), (1, 2, 3))
    monkeypatch.setattr(study_report, "PAIRS", (("better", "ce"), ("same", "ce")))
    monkeypatch.setattr(study_report, "QUESTIONS", (question,))
    monkeypatch.setitem(study_questions.RECIPE, "ARMS", dict.fromkeys(question.arms))
    return [
        line("ce", 1, [2, 2, 2, 2]),
        line("ce", 2, [3, 3, 3, 3]),
        line("ce", 3, [4, 4, 4, 4]),
        line("better", 1, [1, 1, 1, 1], step_seconds=0.15),
        line("better", 2, [1, 1, 1, 1]),
        line("better", 3, [1, 1, 1, 1], step_seconds=0.2),
        line("same", 1, [1, 3, 2, 2]),
        line("same", 2, [3, 3, 2, 4]),
        line("same", 3, [5, 3, 4, 4]),
    ]


def test_the_report_holds_what_the_lines_say(results, tmp_path):
    courses = [
        {"run": f"trimmed,ce,{seed}", "step": step, "wer": 0.5, "spoken_mass": mass}
        for seed, step, mass in [(1, 0, 0.1), (1, 50, 0.2), (2, 0, 0.2), (2, 50, 0.4)]
    ]
    text = study_report.report(results, courses, tmp_path)
    assert "| trimmed: mass at step | seeds | 0 | 50 |" in text
    assert "| ce | 2 | 0.15 | 0.30 |" in text and "untrimmed: mass" not in text
    # ce: 8/20, 12/20 and 16/20 words wrong.
    assert f"| ce | 3 | 60.0 ± {statistics.stdev([40, 60, 80]):.1f} |" in text
    assert "| better | 3 | 20.0 ± 0.0 |" in text
    # better - ce: -20, -40 and -60 points; the mean of seeds drawn with replacement lies between,
    # and beyond the quantiles are 1/27 of the draws each.
    assert "| better − ce | **-40.0 [-60.0, -20.0] 3/3** |" in text
    assert re.search(r"\| same − ce \| \+0.0 \[-\d+.0, \+\d+.0\] 0/3 \|", text)
    assert "**better**: 40.0 points fewer errors than ce on in-domain" in text
    assert "**same**: not significantly different from ce on in-domain (95 %)" in text
    assert "Fewest errors on new text: better (20.0 %)" in text
    assert "| better | 1.00 | 1 |" in text and "The 9 runs took 3.0 hours" in text
    assert (tmp_path / "study-trimmed.png").stat().st_size > 0


def test_the_report_says_which_runs_are_missing(results, tmp_path):
    text = study_report.report(results[:-1], [], tmp_path)
    assert "1 of 9 runs were not made" in text
    # Two seeds show their interval, but no claim is made of it.
    assert re.search(r"\| same − ce \| [^*|]* 0/2 \|", text) and "**same**" not in text
    assert "Not run." in study_report.report([], [], tmp_path)


def test_outputs_run_away_beyond_their_text():
    one = {"errors": [7, 6, 0], "lengths": [5, 5, 5]}
    line = {"sets": {"a": one, "b": {"errors": [13], "lengths": [10]}}}
    assert study_report.runaway(line, ("a", "b")) == 0.5


def test_infonce_is_the_mean_of_both_directions_over_real_rows():
    rng = np.random.default_rng(0)
    speech, text = rng.normal(size=(2, 3, 4, 8)).astype(np.float32)
    mask = np.ones((3, 4), bool)
    mask[0, 2:] = False
    text_mask = mask.copy()
    text_mask[2] = False  # a filler row: neither a query nor a candidate
    speech[0, 2:] = np.nan
    loss = losses.infonce_loss(speech, mask, text, text_mask, 0.5)
    unit = lambda x: x / np.linalg.norm(x)
    s = np.stack([unit(speech[0, :2].mean(0)), unit(speech[1].mean(0))])
    t = np.stack([unit(text[0, :2].mean(0)), unit(text[1].mean(0))])
    rows = [m[i] - m[i, i] for m in (s @ t.T * 2, t @ s.T * 2) for i in (0, 1)]
    expected = np.mean([np.log(np.exp(row).sum()) for row in rows])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_centred_infonce_is_lowest_where_speech_is_the_text():
    # The texts of a batch share a vector three times as long as what tells them apart, as rows of
    # published tables do. Uncentred, speech that is the very text is far above the lowest loss.
    rng = np.random.default_rng(0)
    text = (rng.normal(size=(8, 5, 16)) + 3 * rng.normal(size=16)).astype(np.float32)
    mask = np.arange(5)[None] < rng.integers(2, 6, 8)[:, None]
    text[~mask] = np.nan
    speech = np.where(mask[..., None], text, 0)
    center = otreg.text_centering(text, mask, "mean")
    loss = lambda speech, center: losses.infonce_loss(speech, mask, text, mask, 0.1, center)
    raw, centred = (jax.value_and_grad(loss)(speech, c) for c in (None, center))
    assert raw[0] > 1.0 and centred[0] < 0.1, (raw[0], centred[0])
    assert np.isfinite(centred[1]).all()
    # Away from what all texts share, as the uncentred gradient asks, is away from the text.
    moved = speech - np.where(mask[..., None], 0.9 * np.asarray(center.mean_D), 0)
    assert loss(moved, None) < raw[0] and loss(moved, center) > centred[0]


def test_dropout_acts_in_training_alone():
    config = get_config("trimmed,dropout,0")
    plain = Adapter(AdapterConfig(8, 8, 64, stack=1))
    dropping = Adapter(AdapterConfig(8, 8, 64, stack=1, dropout=config.adapter.dropout))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    params = plain.init(jax.random.key(1), x, np.array([5, 3]))
    expected, _ = plain.apply(params, x, np.array([5, 3]))
    evaluated, _ = dropping.apply(params, x, np.array([5, 3]))
    trained, _ = dropping.apply(params, x, np.array([5, 3]), rngs={"dropout": jax.random.key(2)})
    np.testing.assert_array_equal(evaluated, expected)
    assert np.abs(trained[0] - expected[0]).max() > 1e-3
    assert not trained[1, 3:].any()


def test_learning_rate_restarts():
    config = config_lib.default()
    config.num_steps, config.optim.warmup_steps, config.optim.restart_step = 100, 10, 50
    rate = optim.learning_rate(config)
    peak, low = config.optim.learning_rate, 0.1 * config.optim.learning_rate
    np.testing.assert_allclose([rate(10), rate(60), rate(100)], [peak, peak, low], rtol=1e-5)
    assert rate(49) < 1.2 * low and rate(50) == 0


def test_the_pages_say_what_the_committed_results_say(tmp_path):
    results = study_questions.read_results()
    courses = study_questions.read_results(study_questions.COURSE_RESULTS)
    for path, generated in (
        (study_report.PAGE, study_report.report(results, courses, tmp_path)),
        (study_report.README, study_report.headline(results)),
    ):
        page = path.read_text()
        assert study_report.with_generated(page, generated) == page, "run benchmarks.study --report"
    for figure in tmp_path.iterdir():
        assert (study_report.PAGE.parent / figure.name).exists()
