"""The modules of otreg_jax and who imports whom, read from the source; and a picture of it.

    python -m benchmarks.structure        # docs/structure.png

tests/test_structure.py holds the package to LAYERS: imports go down, never up or round.
"""

import ast
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parent.parent
PACKAGE = "otreg_jax"
PICTURE = ROOT / "docs" / "structure.png"

# From the top down. A module imports its own layer, without a circle, and the layers below.
# "data/" stands for all modules of that folder.
LAYERS = {
    "the command otreg": ("cli",),
    "commands": (
        "train",
        "evaluate",
        "transcribe",
        "align",
        "export",
        "aot",
        "data.prepare",
        "sweep",
    ),
    "parts of commands": (
        "pretrain_llm",
        "preflight",
        "agreement",
        "encode_once",
        "tracking",
        "writers",
        "stopping",
        "recognition",
        "decoding",
        "alignment",
        "report/",
        "subtitles",
    ),
    "assembly": ("build", "checkpoint"),
    "the step": ("optim", "train_step", "losses/"),
    "configuration": ("config", "settings", "rules", "allowed", "stages"),
    "models": ("models/", "pretrained/"),
    "data": ("data/",),
    "tools and the method": (
        "command",
        "rundir",
        "cluster",
        "flops",
        "compiler",
        "sharding",
        "packing",
        "otreg",
        "priors",
        "fused",
        "sinkhorn/",
        "metrics",
        "task_scores",
        "normalize",
        "languages",
        "open_asr",
        "metric_names",
    ),
}
COMMANDS = LAYERS["commands"]
# Who reads these four has read a training step.
STEP = ("train", "train_step", "losses/", "otreg")
ON_DEMAND = ("otreg", "sinkhorn/")  # loaded by name, when a configuration asks for it


def modules() -> dict[str, Path]:
    """{"data.text": its file, ...}; a package's own file has the package's name."""
    folder = ROOT / PACKAGE
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(parts)] = path
    found.pop("")  # the package itself
    return found


def imports() -> dict[str, set[str]]:
    """{module: the modules of this package that it imports, anywhere in its file}, but for what it
    does as a program of its own."""
    known = modules()
    found = {}
    for name, path in known.items():
        targets, tree = set(), ast.parse(path.read_text())
        is_main = lambda s: isinstance(s, ast.If) and "'__main__'" in ast.dump(s.test)
        tree.body = [statement for statement in tree.body if not is_main(statement)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # `from package import module`, or a name of the module `package`.
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                named = {full for full in inner if full.removeprefix(f"{PACKAGE}.") in known}
                targets |= named if len(named) == len(inner) else named | {node.module}
        local = {target.removeprefix(f"{PACKAGE}.") for target in targets}
        found[name] = (local & known.keys()) - {name}
    return found


def box_of(module: str) -> str:
    """The entry of LAYERS that a module belongs to. Raises KeyError if there is none."""
    entries = [entry for layer in LAYERS.values() for entry in layer]
    folder = module.partition(".")[0] + "/"
    for entry in (module, folder):
        if entry in entries:
            return entry
    raise KeyError(
        f"{PACKAGE}.{module} stands in no layer: add it to LAYERS of benchmarks/structure.py"
    )


def layer_of(module: str) -> int:
    """0 for the top."""
    return next(i for i, layer in enumerate(LAYERS.values()) if box_of(module) in layer)


def problems() -> list[str]:
    """Lines about imports that go up, round, or from a command to a command."""
    graph = imports()
    lines = [
        f"{module} imports {target}, which stands above it"
        for module, targets in graph.items()
        for target in sorted(targets)
        if layer_of(target) < layer_of(module)
    ]
    lines += [
        f"{module} imports the command {target}"
        for module, targets in graph.items()
        for target in sorted(targets & set(COMMANDS))
    ]
    return lines + [" -> ".join(circle) for circle in circles(graph)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """A path from a module back to itself for every module at which a depth-first walk meets one
    that it has not left."""
    found, done = [], set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(graph[module]):
                walk(target, [*path, module])
            done.add(module)

    for module in graph:
        walk(module, [])
    return found


# The picture ------------------------------------------------------------------------------------


def boxes_and_arrows() -> tuple[dict[str, list[str]], set[tuple[str, str]]]:
    """{box: its modules} and (from, to) between boxes, without what other arrows imply."""
    graph, boxes, arrows = imports(), {}, {}
    for module in graph:
        boxes.setdefault(box_of(module), []).append(module)
    for module, targets in graph.items():
        arrows.setdefault(box_of(module), set()).update(map(box_of, targets))
    arrows = {box: targets - {box} for box, targets in arrows.items()}

    def reached(box: str) -> set[str]:
        return set().union(*({target} | reached(target) for target in arrows[box]))

    implied = {
        (box, far) for box, targets in arrows.items() for near in targets for far in reached(near)
    }
    return boxes, {(box, target) for box in arrows for target in arrows[box]} - implied


def draw(path: Path) -> None:
    """Draws LAYERS as rows of boxes, with arrows to what is imported, and STEP marked."""
    boxes, arrows = boxes_and_arrows()
    figure = Figure(figsize=(13, 1.28 * len(LAYERS)), layout="constrained")
    axes = figure.subplots()
    places = {}
    for row, (title, entries) in enumerate(LAYERS.items()):
        y = -row
        axes.text(-0.02, y, title, ha="right", va="center", fontsize=10, color="#5d6a72")
        labels = {entry: _label(entry, boxes.get(entry, [])) for entry in entries}
        widths = [max(map(len, label.split("\n"))) + 2.5 for label in labels.values()]
        at = (150 - sum(widths)) / (len(widths) + 1)
        gap, x = at, at
        for (entry, label), width in zip(labels.items(), widths, strict=True):
            places[entry] = (x / 150, y, width / 150, 0.2 + 0.15 * label.count("\n"))
            x += width + gap
            _draw_box(axes, places[entry], entry, label)
    for box, target in sorted({*arrows, ON_DEMAND}):
        style = ":" if (box, target) == ON_DEMAND else "-"
        _draw_arrow(axes, places[box], places[target], style)
    axes.set(xlim=(-0.17, 1.01), ylim=(-len(LAYERS) + 0.5, 0.5))
    axes.axis("off")
    names = " ".join(sorted(imports()))  # what tells whether the picture is of this package
    figure.savefig(path, dpi=100, metadata={"Description": names})


def _label(entry: str, members: list[str]) -> str:
    """A module's name, or a folder's over those of its modules, some in a line."""
    if not entry.endswith("/"):
        return entry.replace("data.", "data/")
    lines, names = [entry], [name.partition(".")[2] for name in members if "." in name]
    for name in names:
        if len(lines) == 1 or len(lines[-1]) + len(name) > (28 if len(names) < 9 else 62):
            lines.append(name)
        else:
            lines[-1] += f"  {name}"
    return "\n".join(lines)


def _draw_box(axes, place, entry: str, label: str) -> None:
    x, y, width, height = place
    is_step = entry in STEP
    style = {"facecolor": "#dcebf5" if is_step else "#f7f9fa", "zorder": 3}
    axes.add_patch(
        FancyBboxPatch(
            (x, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0.004,rounding_size=0.008",
            edgecolor="#1f5f8b" if is_step else "#9aa5ab",
            linewidth=1.8 if is_step else 0.8,
            mutation_aspect=6,
            **style,
        )
    )
    axes.text(
        x + width / 2,
        y,
        label,
        ha="center",
        va="center",
        fontsize=8,
        linespacing=1.25,
        zorder=4,
        weight="bold" if is_step and "\n" not in label else "normal",
    )


def _draw_arrow(axes, place, target, linestyle: str) -> None:
    x, y, width, height = place
    to_x, to_y, to_width, to_height = target
    same = y == to_y
    start = (x + width / 2, y - height / 2 - 0.03)
    stop = (to_x + to_width / 2, to_y + (-to_height / 2 - 0.03 if same else to_height / 2 + 0.04))
    axes.add_patch(
        FancyArrowPatch(
            start,
            stop,
            arrowstyle="-|>",
            mutation_scale=7,
            color="#6d7b83",
            linewidth=0.7,
            alpha=0.75,
            zorder=1,
            shrinkA=0,
            shrinkB=0,
            linestyle=linestyle,
            connectionstyle=f"arc3,rad={0.35 if x < to_x else -0.35}" if same else "arc3,rad=0",
        )
    )


def main() -> None:
    found = problems()
    if found:
        sys.exit("\n".join(found))
    draw(PICTURE)
    print(f"{len(modules())} modules: {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
