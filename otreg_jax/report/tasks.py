"""What the report shows of other tasks than transcription, and of words that a context lists."""

from collections.abc import Sequence
from typing import Any

from otreg_jax import languages, task_scores
from otreg_jax.report.data import Run
from otreg_jax.report.drawings import color, esc

NAMES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "accuracy": "accuracy, %",
    "wer": "WER, %",
    "f1": "token F1, %",
    "exact_match": "exact match, %",
}
MOST_LANGUAGES = 30  # rows and columns of a confusion table


def section(runs: Sequence[Run]) -> str:
    """A table of every figure of every set and run, then what was heard for which language."""
    if not runs[0].tasks:
        return ""
    compared = " A difference is this run minus the other, paired; bold where it excludes zero."
    head = "".join(
        f"<th class='num' style='color:{color(i)}'>{esc(run.name)}</th>"
        + ("<th class='num'>difference</th>" if i else "")
        for i, run in enumerate(runs)
    )
    rows = [
        _row(runs, name, key) for name, row in runs[0].tasks.items() for key in row["intervals"]
    ]
    signatures = {
        f"{key}: {text}"
        for row in runs[0].tasks.values()
        for key, text in row.get("signatures", {}).items()
    }
    return (
        f"<p>With 95 % bootstrap intervals over utterances.{compared if len(runs) > 1 else ''}</p>"
        "<div class='scroll'><table><thead><tr><th>set</th><th>figure</th><th class='num'>n</th>"
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        + "".join(f"<p class='where'>{esc(text)}</p>" for text in sorted(signatures))
        + "".join(
            _confusion(name, row["confusion"])
            for name, row in runs[0].tasks.items()
            if row.get("confusion")
        )
    )


def _row(runs: Sequence[Run], name: str, figure: str) -> str:
    main = task_scores.main_figure(runs[0].tasks[name]["task"])
    found = [run.tasks.get(name, {}) for run in runs]
    known = [row[figure] for row in found if figure in row]
    best = min(known) if figure == "wer" else max(known)
    cells = []
    for i, (run, row) in enumerate(zip(runs, found, strict=True)):
        cells.append(_value(row, figure, best if len(runs) > 1 else None))
        if i:
            paired = (run.differences or {}).get(name) if figure == main else None
            cells.append(_difference(paired, figure))
    label = f"<th>{esc(name)}</th><td>{NAMES.get(figure, figure)}</td>"
    return f"<tr>{label}<td class='num'>{runs[0].tasks[name]['n']}</td>{''.join(cells)}</tr>"


def _value(row: dict[str, Any], figure: str, best: float | None) -> str:
    if figure not in row:
        return "<td class='num'>–</td>"
    scale = task_scores.scale(figure)
    value, low, high = (f"{scale * x:.1f}" for x in (row[figure], *row["intervals"][figure]))
    value = f"<b>{value}</b>" if row[figure] == best else value
    return f"<td class='num'>{value}<small>{low} … {high}</small></td>"


def _difference(paired: dict[str, Any] | None, figure: str) -> str:
    if paired is None:
        return "<td class='num'>–</td>"
    scale = task_scores.scale(figure)
    low, high = paired["interval"]
    text = f"{scale * paired['difference']:+.1f}"
    text = f"<b>{text}</b>" if low > 0 or high < 0 else text
    cell = f"<td class='num'>{text}<small>{scale * low:+.1f} … {scale * high:+.1f}</small></td>"
    return cell.replace("-", "\N{MINUS SIGN}")


def _confusion(name: str, table: dict[str, dict[str, int]]) -> str:
    heard = sorted({language for row in table.values() for language in row})
    said = sorted(table)
    left_out = max(len(heard), len(said)) - MOST_LANGUAGES
    note = f"<p>The first {MOST_LANGUAGES} languages.</p>" if left_out > 0 else ""
    heard, said = heard[:MOST_LANGUAGES], said[:MOST_LANGUAGES]
    shown = lambda code: esc(languages.name(code)) if code else "no tag"
    head = "".join(f"<th class='num'>{shown(code)}</th>" for code in heard)

    def cell(row, code):
        count = table[row].get(code, 0)
        return f"<td class='num'>{f'<b>{count}</b>' if code == row else count or ''}</td>"

    rows = "".join(
        f"<tr><th>{shown(row)}</th>{''.join(cell(row, code) for code in heard)}</tr>"
        for row in said
    )
    return (
        f"<p>{esc(name)}: rows are the languages spoken, columns those that were heard.</p>{note}"
        f"<div class='scroll'><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody>"
        "</table></div>"
    )


def context_table(runs: Sequence[Run]) -> str:
    """Word error rates of the words that contexts list, and of all others."""
    rows = []
    for name in runs[0].sets:
        for i, run in enumerate(runs):
            if found := run.sets.get(name, {}).get("context"):
                label = f"<i style='background:{color(i)}'></i>" if len(runs) > 1 else ""
                cells = [
                    f"<td class='num'>{100 * found[key]:.1f}<small>"
                    + " … ".join(f"{100 * x:.1f}" for x in found["intervals"][key])
                    + "</small></td>"
                    for key in ("biased_wer", "unbiased_wer")
                ]
                rows.append(f"<tr><th>{label}{esc(name)}</th>{''.join(cells)}</tr>")
    if not rows:
        return ""
    return (
        "<p>Where utterances list words in their context: the word error rate of these words, and "
        "that of all others, in percent.</p><div class='scroll'><table><thead><tr><th>set</th>"
        "<th class='num'>listed words</th><th class='num'>others</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def cards(run: Run) -> str:
    """The main figure of every set in the summary."""
    shown = []
    for name, row in run.tasks.items():
        figure = task_scores.main_figure(row["task"])
        value, unit = task_scores.scale(figure) * row[figure], NAMES.get(figure, figure)
        percent = "<small> %</small>" if unit.endswith(", %") else ""
        label = f"{unit.removesuffix(', %')}, {esc(name)}"
        shown.append(f"<div class='card'><b>{value:.1f}{percent}</b><span>{label}</span></div>")
    return "".join(shown)
