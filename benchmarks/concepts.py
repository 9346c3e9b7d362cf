"""The pictures of docs/method.md, data-path.md, step.md and sharding.md.

python -m benchmarks.concepts        # docs/method.png, data-path.png, step.png, sharding.png
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from otreg_jax import otreg

DOCS = Path(__file__).parent.parent / "docs"
INK, EDGE, PLAIN, TRAINED, FROZEN = "#24323a", "#7d8a91", "#f7f9fa", "#dcebf5", "#eceff1"


def canvas(width: float, height: float):
    """(figure, axes) in inches, both axes from 0 to these sizes."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, title, note="", color=PLAIN, height=0.8):
    """A box whose left edge and middle are at (x, y); returns (left, right, y)."""
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(
        FancyBboxPatch(
            (x, y - height / 2), width, height, boxstyle=style, facecolor=color, edgecolor=EDGE
        )
    )
    up = 0.13 * (note.count("\n") + 1) if note else 0
    middle = x + width / 2
    axes.text(
        middle, y + up, title, ha="center", va="center", fontsize=10, color=INK, weight="bold"
    )
    if note:
        axes.text(middle, y - 0.16, note, ha="center", va="center", fontsize=8, color=INK)
    return x, x + width, y


def arrow(axes, start, stop, label="", bend=0.0, color=EDGE):
    """An arrow from point to point, with a word above its middle."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            stop,
            arrowstyle="-|>",
            mutation_scale=11,
            color=color,
            connectionstyle=f"arc3,rad={bend}",
            shrinkA=2,
            shrinkB=2,
        )
    )
    if label:
        x, y = (start[0] + stop[0]) / 2, (start[1] + stop[1]) / 2
        axes.text(x, y + 0.09, label, ha="center", fontsize=8, color=INK)


def chain(axes, y, boxes, gap=0.35, x=0.3, height=0.8):
    """Boxes (width, title, note, color) in a row with arrows between them; returns their places."""
    places = []
    for width, title, note, color in boxes:
        places.append(box(axes, x, y, width, title, note, color, height))
        if len(places) > 1:
            arrow(axes, (places[-2][1], y), (x, y))
        x += width + gap
    return places


def method() -> Figure:
    """Cost and plan of one made-up utterance, by the method itself."""
    rng = np.random.default_rng(0)
    words = "<s> turn on the light in the hall".split()[1:]
    frames_of = [3, 2, 2, 5, 2, 2, 4]
    text_TD = rng.normal(size=(len(words), 32))
    text_TD[5] = text_TD[2]  # the same token twice
    owner_S = np.repeat(np.arange(len(words)), frames_of)
    speech_SD = text_TD[owner_S] + 1.1 * rng.normal(size=(len(owner_S), 32))
    masks = np.ones((1, len(owner_S)), bool), np.ones((1, len(words)), bool)
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    cost = 1 - unit(speech_SD) @ unit(text_TD).T
    shown = [("cost 1 − cos(speech, token)", cost)]
    for title, gamma in (("plan, γ = 0", 0.0), ("plan, γ = 1", 1.0)):
        out = otreg.regularizer(
            speech_SD[None], text_TD[None], *masks, epsilon=0.1, position_weight=gamma
        )
        shown.append((f"{title}: loss {float(out.loss):.2f}", np.asarray(out.plan[0])))
    for panel, (title, values) in zip(panels, shown, strict=True):
        panel.imshow(values.T, aspect="auto", cmap="Blues" if "plan" in title else "Greys_r")
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("speech position s")
        panel.set_yticks(range(len(words)), words)
    return figure


def data_path() -> Figure:
    figure, axes = canvas(11.2, 4.3)
    read = chain(
        axes,
        3.6,
        [
            (1.75, "sources", "manifests, ArrayRecord,\nspoken text", PLAIN),
            (1.75, "checks", "every bad line named,\nlong audio left out", PLAIN),
            (1.75, "epoch", "a permutation that\nthe seed decides", PLAIN),
            (1.75, "buckets", "a few shapes of\nframes × tokens", PLAIN),
            (1.75, "host's rows", "fixed before\nhosts divide them", PLAIN),
        ],
    )
    made = chain(
        axes,
        1.9,
        [
            (1.75, "audio", "16 kHz, mono,\nnoise, speed", PLAIN),
            (1.75, "log-mel", "100 frames a second\nmel [B, F, M]", PLAIN),
            (1.75, "tokens", "the LLM's tokenizer\ntokens [B, T]", PLAIN),
            (1.75, "batch", "one shape,\npadding at the end", PLAIN),
            (1.75, "SpecAugment", "in the step, keyed\nby seed and step", TRAINED),
        ],
    )
    x = (read[-1][0] + read[-1][1]) / 2
    axes.plot([x, x, 1.17, 1.17], [3.2, 2.75, 2.75, 2.6], color=EDGE)
    arrow(axes, (1.17, 2.62), (1.17, 2.3))
    sequence(axes, 0.5)
    arrow(axes, ((made[-2][0] + made[-2][1]) / 2, 1.5), (7.6, 0.85))
    return figure


def sequence(axes, y):
    """What the LLM reads: prompt, speech, prompt, transcript, padding."""
    x = 0.3
    for width, label, color in (
        (1.5, "prompt", FROZEN),
        (3.6, "speech [B, S, D], from the adapter", TRAINED),
        (1.0, "prompt", FROZEN),
        (2.6, "transcript [B, T], then end", "#fdf1dc"),
        (1.7, "padding", "white"),
    ):
        axes.add_patch(Rectangle((x, y - 0.25), width, 0.5, facecolor=color, edgecolor=EDGE))
        axes.text(x + width / 2, y, label, ha="center", va="center", fontsize=8.5, color=INK)
        x += width
    axes.text(0.3, y + 0.33, "the sequence of the LLM", fontsize=8, color=INK)


def step() -> Figure:
    figure, axes = canvas(11.2, 4.6)
    top = chain(
        axes,
        3.8,
        [
            (1.5, "mel", "[B, F, M]", PLAIN),
            (1.9, "speech encoder", "frozen", FROZEN),
            (1.7, "adapter", "trained", TRAINED),
            (2.3, "LLM", "frozen, LoRA trained", FROZEN),
            (1.7, "cross-entropy", "of the transcript", "#fdf1dc"),
        ],
    )
    box(axes, 0.3, 1.9, 1.9, "transcript", "tokens [B, T]")
    box(axes, 2.9, 1.9, 2.1, "embedding table", "or the first k layers,\nno gradient", FROZEN)
    box(axes, 5.75, 1.9, 2.6, "OTReg", "cost, plan by Sinkhorn,\n⟨plan, cost⟩", "#fdf1dc")
    box(axes, 9.05, 1.9, 1.85, "loss", "CE + λ·OTReg\n+ w·CTC", "#fdf1dc")
    arrow(axes, (2.2, 1.9), (2.9, 1.9))
    arrow(axes, (5.0, 1.9), (5.75, 1.9), "[B, T, D]")
    arrow(axes, (8.35, 1.9), (9.05, 1.9))
    speech = (top[2][0] + top[2][1]) / 2
    arrow(axes, (speech, 3.4), (6.6, 2.3), "")
    axes.text(4.85, 2.75, "speech [B, S, D]", fontsize=8, color=INK)
    arrow(axes, ((top[4][0] + top[4][1]) / 2, 3.4), (9.98, 2.3))
    box(axes, 5.75, 0.55, 2.6, "gradient, AdamW", "skipped if it is not finite", TRAINED, 0.7)
    box(axes, 1.9, 0.55, 2.6, "state", "step, weights, moments", TRAINED, 0.7)
    arrow(axes, (9.98, 1.5), (8.35, 0.55), bend=-0.3)
    arrow(axes, (5.75, 0.55), (4.5, 0.55))
    return figure


def sharding() -> Figure:
    figure, axes = canvas(11.2, 4.4)
    axes.text(0.4, 4.1, "mesh.data = 2, mesh.fsdp = 2, mesh.tensor = 2: eight devices", fontsize=10)
    colors = ["#dcebf5", "#c5dcec", "#fdf1dc", "#f7e2b8"]
    for data in range(2):
        for fsdp in range(2):
            for tensor in range(2):
                x, y = 0.4 + 1.75 * (2 * data + fsdp), 2.9 - 1.25 * tensor
                row = 2 * data + fsdp
                axes.add_patch(
                    Rectangle((x, y - 0.5), 1.55, 1.0, facecolor=colors[row], edgecolor=EDGE)
                )
                text = f"device {4 * data + 2 * fsdp + tensor}\nrows {row + 1}/4 of the batch"
                text += f"\nweights: part {fsdp + 1}, {'AB'[tensor]}"
                axes.text(x + 0.775, y, text, ha="center", va="center", fontsize=8, color=INK)
    for data in range(2):
        axes.text(2.05 + 3.5 * data, 3.55, f"data {data}", ha="center", fontsize=9, color=INK)
    axes.text(7.5, 3.3, "data", weight="bold", fontsize=9, color=INK)
    axes.text(7.5, 2.85, "rows of the batch. Between slices\nonly gradients cross.", fontsize=9)
    axes.text(7.5, 2.45, "fsdp", weight="bold", fontsize=9, color=INK)
    axes.text(
        7.5,
        1.8,
        "rows of the batch, and a part of\nevery weight: gathered for its\nlayer, then dropped.",
        fontsize=9,
    )
    axes.text(7.5, 1.4, "tensor", weight="bold", fontsize=9, color=INK)
    axes.text(7.5, 0.95, "the same rows, a part of every\nmatrix (heads, widths).", fontsize=9)
    note = "Every loss is a sum over the rows divided by a global count, whatever the mesh."
    axes.text(0.4, 0.45, note, fontsize=9, color=INK)
    return figure


def main() -> None:
    pictures = {
        "method": method,
        "data-path": data_path,
        "step": step,
        "sharding": sharding,
    }
    for name, draw in pictures.items():
        draw().savefig(DOCS / f"{name}.png", dpi=110)
        print(f"docs/{name}.png")


if __name__ == "__main__":
    main()
