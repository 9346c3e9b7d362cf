"""The report's drawings: charts as `<img>` data, transport plans as inline SVG."""

import base64
import html
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from otreg_jax.report.data import Plan, Run

RUN_COLORS = ("#1f5f8b", "#c2571a", "#3f8052", "#7b5aa6", "#6b6b6b")
SPEECH_COLOR, TEXT_COLOR = "#1f5f8b", "#c2571a"
PLAN_COLORS = LinearSegmentedColormap.from_list("plan", ["#fff", "#9cc4dd", "#1f5f8b", "#0a2438"])

# metrics.jsonl key → caption; a chart is drawn for each that was logged.
CURVES = {
    "ce": "Cross-entropy (nats a token)",
    "otreg": "OTReg: transport cost",
    "ctc": "CTC auxiliary (nats a token)",
    "marginal_error": "Marginal error of the plan (L1)",
    "entropy": "Entropy of the plan (nats)",
    "nearest_cosine": "Cosine to the nearest transcript vector",
    "dev_ce": "Cross-entropy, dev",
    "dev_wer": "WER, dev",
    "grad_norm": "Gradient norm",
}


def esc(value: Any) -> str:
    """A value as text that cannot become markup."""
    return html.escape(str(value))


def color(i: int) -> str:
    """The colour of the i-th run."""
    return RUN_COLORS[i % len(RUN_COLORS)]


def chart(draw: Callable[[Figure], None], width: float, height: float, alt: str) -> str:
    """A matplotlib chart of width × height inches as an `<img>` holding its own SVG."""
    style = {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#999999",
        "axes.labelcolor": "#555555",
        "xtick.color": "#555555",
        "ytick.color": "#555555",
        "grid.color": "#ececec",
        "axes.axisbelow": True,
        "lines.linewidth": 1.4,
        "svg.hashsalt": "otreg",
    }
    buffer = io.BytesIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # A run named in a script that matplotlib's font lacks is no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure((width, height), layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img src='data:image/svg+xml;base64,{data}' alt='{esc(alt)}'>"


def png(rgba: np.ndarray) -> str:
    """An image [height, width, 4] in [0, 1] as data of a URL."""
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, rgba, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def forest(runs: Sequence[Run]) -> str:
    """Error rates and their intervals, a row a set."""
    names = sorted(runs[0].sets, key=lambda name: not runs[0].sets[name]["in_domain"])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, run in enumerate(runs):
            for y, name in enumerate(names):
                if name not in run.sets:
                    continue
                row = run.sets[name]
                at = y + (i - (len(runs) - 1) / 2) * 0.2
                axes.plot([100 * x for x in row["interval"]], [at, at], color=color(i), alpha=0.45)
                axes.plot(100 * row["wer"], at, "o", color=color(i), markersize=5)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("WER (%)")
        axes.grid(axis="y", visible=False)

    height = 0.7 + 0.3 * len(names) + 0.06 * len(names) * (len(runs) - 1)
    drawn = chart(draw, 6, height, "Word error rates with 95 % intervals, by evaluation set")
    return f"<figure>{drawn}{legend(runs)}</figure>"


def legend(runs: Sequence[Run]) -> str:
    """Which colour is which run; nothing for one run."""
    if len(runs) == 1:
        return ""
    marks = " ".join(
        f"<span class='key'><i style='background:{color(i)}'></i>{esc(run.name)}</span>"
        for i, run in enumerate(runs)
    )
    return f"<figcaption>{marks}</figcaption>"


def curves(runs: Sequence[Run]) -> str:
    """A chart of every metric of CURVES against the step."""
    charts = []
    for key, caption in CURVES.items():
        if not any(row.get(key) is not None for run in runs for row in run.curve):
            continue

        def draw(figure: Figure, key=key, caption=caption) -> None:
            axes = figure.subplots()
            for i, run in enumerate(runs):
                points = [(row["step"], row[key]) for row in run.curve if row.get(key) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), color=color(i))
            axes.set_title(caption)
            axes.set_xlabel("step")
            axes.margins(x=0.02)

        charts.append(chart(draw, 3.6, 2.2, f"{caption} against the training step"))
    if not charts:
        return ""
    return f"<figure><div class='grid'>{''.join(charts)}</div>{legend(runs)}</figure>"


def plans(runs: Sequence[Run]) -> str:
    """The transport plans of every run, side by side."""
    if not any(run.plans for run in runs):
        return ""
    panels = []
    for example in range(max(len(run.plans) for run in runs)):
        for i, run in enumerate(runs):
            if example < len(run.plans):
                plan = run.plans[example]
                name = f"<span style='color:{color(i)}'>{esc(run.name)}</span>"
                caption = f"<figcaption>{name} · {esc(plan.set)} · {short(plan.id)}</figcaption>"
                panels.append(f"<figure>{caption}{plan_svg(plan)}</figure>")
    return (
        "<p>Above, the log-mel spectrogram; below, where each moment of speech sends its mass by "
        "the similarity of embeddings alone, one row a transcript token, the darker the more. "
        "A dark staircase from top left to bottom right is an alignment; an even tint says that "
        "the embeddings tell nothing apart. Between the two, if the manifest says when words are "
        "spoken: where align finds them, and where they are.</p>"
        f"<div class='grid {'' if len(runs) % 3 == 0 else 'wide'}'>{''.join(panels)}</div>"
    )


def short(utterance_id: str) -> str:
    """The id without the folders, where it is a path."""
    return esc(utterance_id.rsplit("/", 1)[-1])


def plan_svg(plan: Plan) -> str:
    """The plan under its spectrogram, and its words if they are timed, on one time axis, as inline
    SVG.

    Tokens are SVG text, so that the browser's fonts draw every script. A cell is the share of a
    speech position's mass, S · P_st in [0, 1].
    """
    left, width, mel_height, row, gap = 78, 290, 60, 13, 5
    speech_positions, num_tokens = plan.plan_ST.shape
    top = mel_height + gap + (2 * row + gap if plan.words else 0)
    height = top + row * num_tokens
    low, high = np.percentile(plan.mel_FM, [2, 99.5])
    mel = np.clip((plan.mel_FM.T[::-1] - low) / max(high - low, 1e-6), 0, 1)
    share = np.clip(plan.plan_ST.T * speech_positions, 0, 1)
    image = "<image x='{}' y='{}' width='{}' height='{}' preserveAspectRatio='none' href='{}' {}/>"
    parts = [
        image.format(left, 0, width, mel_height, png(matplotlib.colormaps["gray_r"](mel)), ""),
        image.format(
            left,
            top,
            width,
            row * num_tokens,
            png(PLAN_COLORS(share)),
            "style='image-rendering:pixelated'",
        ),
        f"<rect class='frame' x='{left}' y='{top}' width='{width}' height='{row * num_tokens}'/>",
        f"<rect class='frame' x='{left}' y='0' width='{width}' height='{mel_height}'/>",
    ]
    for i, name in enumerate(("align", "spoken") if plan.words else ()):
        y = mel_height + gap + row * i
        parts.append(f"<text class='token' x='{left - 5}' y='{y + 9.5}'>{name}</text>")
        for word, *times in plan.words:
            start, end = (left + width * t / plan.seconds for t in times[2 * i : 2 * i + 2])
            parts.append(_word_box(word, start, end, y, row - 1, (SPEECH_COLOR, "#6b6b6b")[i]))
    for t, token in enumerate(plan.tokens):
        y = top + row * (t + 0.5) + 3.5
        parts.append(f"<text class='token' x='{left - 5}' y='{y}'>{esc(_visible(token))}</text>")
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 1e9) if plan.seconds / s <= 8)
    for second in np.arange(0, plan.seconds, step):
        x = left + width * second / plan.seconds
        parts.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{height}' y2='{height + 4}'/>")
        parts.append(f"<text class='tick' x='{x:.1f}' y='{height + 14}'>{second:g}</text>")
    parts.append(f"<text class='tick' x='{left + width}' y='{height + 14}'>s</text>")
    label = f"Transport plan of {plan.id} under its spectrogram"
    return (
        f"<svg class='plan' viewBox='0 0 {left + width + 6} {height + 18}' role='img' "
        f"aria-label='{esc(label)}'>{''.join(parts)}</svg>"
    )


def _word_box(word: str, start: float, end: float, y: float, height: float, fill: str) -> str:
    """A word in a box as wide as it lasts; its letters are pressed together if they must."""
    room = max(end - start - 3, 1)
    squeezed = f"textLength='{room:.1f}' lengthAdjust='spacingAndGlyphs'"
    return (
        f"<rect class='word' x='{start:.1f}' y='{y}' width='{end - start:.1f}' height='{height}' "
        f"fill='{fill}'/><text class='said' x='{(start + end) / 2:.1f}' y='{y + 9}' "
        f"{squeezed if 5 * len(word) > room else ''}>{esc(word)}</text>"
    )


def _visible(token: str) -> str:
    token = token.replace("▁", " ").replace("Ġ", " ")  # SentencePiece's space, byte-level BPE's
    return (token if len(token) <= 12 else token[:11] + "…").replace(" ", "␣") or "∅"


def maps(runs: Sequence[Run]) -> str:
    """A map of speech and text embeddings a run."""
    shown = [run for run in runs if run.speech_ND is not None and len(run.speech_ND)]
    if not shown:
        return ""
    panels = []
    for run in shown:
        speech, text, explained = project(run.speech_ND, run.text_ND)

        def draw(figure: Figure, speech=speech, text=text, explained=explained) -> None:
            axes = figure.subplots()
            axes.scatter(*speech.T, s=5, color=SPEECH_COLOR, alpha=0.35, linewidths=0)
            axes.scatter(*text.T, s=14, color=TEXT_COLOR, alpha=0.8, linewidths=0)
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(f"first two principal directions, {explained:.0%} of the variance")
            axes.spines[:].set_visible(False)

        alt = f"Two-dimensional map of speech and text embeddings of {run.name}"
        drawn = chart(draw, 3.6, 3.2, alt)
        panels.append(f"<figure><figcaption>{esc(run.name)}</figcaption>{drawn}</figure>")
    key = "".join(
        f"<span class='key'><i style='background:{color}'></i>{name}</span> "
        for color, name in ((SPEECH_COLOR, "speech positions"), (TEXT_COLOR, "transcript tokens"))
    )
    return (
        "<p>Where the modality gap is closed, speech lies among the tokens and not in a cloud of "
        f"its own.</p><p>{key}</p><div class='grid'>{''.join(panels)}</div>"
    )


def project(speech_ND: np.ndarray, text_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Unit vectors of both sides on their two leading common principal directions.

    Returns speech [N, 2], text [M, 2] and the share of the variance the two directions hold.
    """
    both = np.concatenate([speech_ND, text_ND]).astype(np.float64)
    both /= np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-12)
    both -= both.mean(axis=0)
    _, singular, directions = np.linalg.svd(both, full_matrices=False)
    flat = both @ directions[:2].T
    explained = (singular[:2] ** 2).sum() / max((singular**2).sum(), 1e-12)
    return flat[: len(speech_ND)], flat[len(speech_ND) :], float(explained)
