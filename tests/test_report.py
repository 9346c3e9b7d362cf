"""The report: escaping, completeness, and a real browser opening it."""

import base64
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from otreg_jax import metrics, report
from otreg_jax.report import drawings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCRIPT = "<script>document.title='pwned';alert(1)</script>"


def make_run(name, *, seed=0, sharp=1.0, compared_with=None):
    rng = np.random.default_rng(seed)
    tokens = ["▁turn", "▁the", "▁light", "▁in", "▁the", "▁kit", "chen", "▁on", SCRIPT, "नमस्ते"]
    references = ["turn the light in the kitchen on", f"say {SCRIPT}", "", "a < b & c > d"]
    hypotheses = ["turn light in the chicken on", "say nothing", "you", "a < b & c > d"]
    sets = {}
    for set_name, in_domain in (("dev", True), ("other voices", False), ("noise <b>", False)):
        row = metrics.score(references, hypotheses)
        sets[set_name] = row | {
            "in_domain": in_domain,
            "alignment": {"transport_cost": 0.41, "entropy": 5.2, "monotonicity": None},
        }
    rows = [
        {"set": "dev", "id": f"utt-{i}", "reference": r, "hypothesis": h, "errors": 4 - i}
        for i, (r, h) in enumerate(zip(references, hypotheses, strict=True))
    ]
    curve = [
        {"step": step, "ce": 4 * np.exp(-step / 150) + 0.1 * rng.random(), "otreg": 1 - step / 900}
        for step in range(0, 500, 10)
    ]
    positions = np.linspace(0, len(tokens) - 1, 40)
    distance = np.abs(positions[:, None] - np.arange(len(tokens)))
    plan = np.exp(-sharp * distance)
    plan /= plan.sum(axis=1, keepdims=True) * len(plan)
    words = [("turn", 0.0, 0.4, 0.1, 0.5), (SCRIPT, 0.4, 3.2, 0.6, 3.0)]
    mel = rng.normal(size=(320, 80)) + 2 * np.sin(np.arange(320)[:, None] / 25)
    return report.Run(
        name=name,
        sets=sets,
        hypotheses=rows,
        curve=curve,
        config={"otreg.weight": 3.0 * sharp, "data.train": f"a{SCRIPT}.jsonl"},
        plans=[report.Plan("dev", "a/b/utt-0", 3.2, mel, plan, tokens, words)],
        speech_ND=rng.normal(size=(200, 16)),
        text_ND=rng.normal(size=(60, 16)) + 1.0,
        differences=compared_with and {"dev": {"difference": -0.061, "interval": (-0.102, -0.021)}},
    )


@pytest.fixture(scope="module")
def page():
    runs = [
        make_run("OTReg, layer 1"),
        make_run(f"CE alone {SCRIPT}", seed=1, sharp=0.3, compared_with="OTReg"),
    ]
    return report.page(runs, versions={"python": "3.11", "jax": "0.10"}, notes=[f"bad {SCRIPT}"])


def test_page_stands_alone_and_is_escaped(page):
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    assert "@import" not in page and "url(" not in page
    for section in ("Error rates", "Training", "Transport plans", "Worst utterances", "Versions"):
        assert section in page


def test_page_marks_domains_and_differences(page):
    assert page.count(">in domain</span>") == 1 and page.count(">out of domain</span>") == 2
    assert "<b>−6.1</b><small>−10.2 … −2.1</small>" in page
    assert "<del>kitchen</del> <ins>chicken</ins>" in page


def test_page_of_one_run_with_nothing_but_scores():
    bare = report.Run("run", {"dev": metrics.score(["a"], ["a"]) | {"in_domain": True}})
    page = report.page([bare], versions={})
    assert "0.0" in page and "Transport plans" not in page


def test_plan_heat_map_holds_the_plan():
    plan = np.zeros((4, 2))
    plan[:2, 0] = plan[2:, 1] = 0.25
    svg = drawings.plan_svg(report.Plan("dev", "u", 1.0, np.zeros((8, 5)), plan, ["a", "b"]))
    data = re.findall(r"base64,([^']+)", svg)[1]
    pixels = drawings.matplotlib.image.imread(drawings.io.BytesIO(base64.b64decode(data)))
    dark = pixels[..., :3].sum(axis=-1) < 1.5
    np.testing.assert_array_equal(dark, [[1, 1, 0, 0], [0, 0, 1, 1]])


def test_words_stand_where_align_finds_them_and_where_they_are_spoken():
    words = [("ab", 0.0, 0.5, 0.25, 0.5), ("c", 0.5, 2.0, 1.0, 2.0)]
    plan = report.Plan("dev", "u", 2.0, np.zeros((8, 5)), np.full((4, 2), 0.1), ["ab", "c"], words)
    boxes = re.findall(r"class='word' x='(.+?)' y='(.+?)' width='(.+?)'", drawings.plan_svg(plan))
    (left, align, _), (_, _, _), (_, spoken, _), (_, _, _) = boxes
    places = [(y, (float(x) - float(left)) / 290, float(w) / 290) for x, y, w in boxes]
    expected = [(align, 0, 0.25), (align, 0.25, 0.75), (spoken, 0.125, 0.125), (spoken, 0.5, 0.5)]
    assert align < spoken
    for (row, at, wide), (other_row, other_at, other_wide) in zip(places, expected, strict=True):
        assert row == other_row and (at, wide) == pytest.approx((other_at, other_wide), abs=1e-3)
    assert "class='word'" not in drawings.plan_svg(plan._replace(words=()))


def test_projection_keeps_the_two_widest_directions():
    rng = np.random.default_rng(0)
    gap = np.zeros(8)
    gap[3] = 5.0
    speech, text, explained = drawings.project(
        rng.normal(size=(50, 8)) * 0.01 + gap, rng.normal(size=(50, 8)) * 0.01 - gap
    )
    assert abs(speech[:, 0].mean() - text[:, 0].mean()) == pytest.approx(2.0, abs=1e-2)
    assert explained > 0.99


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [390, 1200])
def test_browser_shows_every_image_and_logs_no_error(page, tmp_path, width):
    # A probe after the page's own end writes what the browser made of it into the dumped DOM.
    probe = """<script>addEventListener('load', () => {
        const root = document.documentElement, images = [...document.images];
        root.dataset.images = images.length;
        root.dataset.broken = images.filter(i => !i.complete || !i.naturalWidth).length;
        root.dataset.overflow = root.scrollWidth - innerWidth;
        root.dataset.shown = document.title + '|' + document.body.innerText.includes('<script>');
        root.dataset.requests = performance.getEntriesByType('resource')
            .filter(r => !r.name.startsWith('data:')).length;
    })</script>"""
    (tmp_path / "report.html").write_text(page + probe, encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},1000",
        "--enable-logging=stderr",
        "--log-level=0",
        "--virtual-time-budget=10000",
        "--dump-dom",
        (tmp_path / "report.html").as_uri(),
    ]
    if keep := os.environ.get("OTREG_SCREENSHOTS"):
        screenshot = [f"--screenshot={keep}/report-{width}.png", f"--window-size={width},6000"]
        subprocess.run([*command[:-2], *screenshot, command[-1]], capture_output=True, timeout=60)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    facts = dict(re.findall(r"data-(\w+)=\"([^\"]*)\"", done.stdout[:2000]))
    assert facts["images"] == "5" and facts["broken"] == "0", done.stderr
    assert int(facts["overflow"]) <= 0  # nothing sticks out sideways, on a phone either
    assert facts["requests"] == "0"
    assert facts["shown"] == "OTReg, layer 1 · OTReg evaluation|true"
    assert "CONSOLE" not in done.stderr


@pytest.mark.parametrize("token", ["▁house", "Ġhouse"])
def test_the_space_before_a_word_is_one_sign_whatever_the_tokenizer(token):
    assert drawings._visible(token) == "␣house"
