"""The report's page: tables, sentences and where each drawing stands.

Everything comes in as plain dicts and numpy arrays; nothing is read from disk or the network. Every
piece of text is escaped, and charts enter as `<img>` data, so a transcript cannot become markup.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from otreg_jax import metrics
from otreg_jax.normalize import normalize
from otreg_jax.report import drawings, tasks
from otreg_jax.report.data import Run
from otreg_jax.report.drawings import color, esc, legend, short

NUM_WORST = 12
# Figure of results.json["sets"][name]["alignment"] → (heading, digits).
ALIGNMENT = {
    "transport_cost": ("Transport cost", 3),
    "entropy": ("Plan entropy", 2),
    "marginal_error": ("Marginal error", 4),
    "nearest_cosine": ("Nearest cosine", 3),
    "spoken_mass": ("On spoken word", 3),
    "spoken_mass_even": ("(even spacing)", 3),
    "word_time_error_ms": ("Word edges off, ms", 0),
    "word_times_close": ("Within 100 ms", 2),
    "retrieval_accuracy": ("Retrieval", 3),
    "monotonicity": ("Monotonicity", 3),
    "centroid_distance": ("Centroid distance", 3),
}


def page(runs: Sequence[Run], *, versions: dict[str, str], notes: Sequence[str] = ()) -> str:
    """The whole HTML document. The first run is the one reported on, the others are compared.

    `notes` are sentences shown at the top (a file that could not be read, for example).
    """
    sections = [
        ("Error rates", _error_rates(runs) if runs[0].sets else ""),
        ("Other tasks", tasks.section(runs)),
        ("Training", drawings.curves(runs)),
        ("Transport plans", drawings.plans(runs)),
        ("Speech and text embeddings", drawings.maps(runs)),
        ("Alignment figures", _alignment_table(runs)),
        ("Worst utterances", _worst(runs[0])),
        ("Configuration and versions", _configuration(runs, versions)),
    ]
    body = "".join(f"<section><h2>{name}</h2>{text}</section>" for name, text in sections if text)
    warning = "".join(f"<li>{esc(note)}</li>" for note in notes)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<link rel='icon' href='data:,'>"
        f"<title>{esc(runs[0].name)} · OTReg evaluation</title><style>{_STYLE}</style></head><body>"
        f"<header><p class='kind'>OTReg evaluation</p><h1>{esc(runs[0].name)}</h1>{_summary(runs)}"
        f"{f'<ul class=notes>{warning}</ul>' if warning else ''}</header><main>{body}</main>"
        f"<footer>{esc(' · '.join(f'{k} {v}' for k, v in versions.items()))}</footer></body></html>"
    )


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def _macro(sets: dict[str, dict[str, Any]], in_domain: bool) -> float | None:
    rates = [row["wer"] for row in sets.values() if row["in_domain"] == in_domain]
    return float(np.mean(rates)) if rates else None


def _summary(runs: Sequence[Run]) -> str:
    cards = []
    for in_domain, name in ((True, "in domain"), (False, "out of domain")):
        ours = _macro(runs[0].sets, in_domain)
        if ours is None:
            continue
        count = sum(row["in_domain"] == in_domain for row in runs[0].sets.values())
        against = "".join(
            f"<br>{esc(run.name)}: {_percent(theirs)} %"
            for run in runs[1:]
            if (theirs := _macro(run.sets, in_domain)) is not None
        )
        sets = f"mean of {count} sets" if count > 1 else "1 set"
        cards.append(
            f"<div class='card'><b>{_percent(ours)}<small> %</small></b>"
            f"<span>WER {name}, {sets}{against}</span></div>"
        )
    return f"<div class='cards'>{''.join(cards)}{tasks.cards(runs[0])}</div>"


def _error_rates(runs: Sequence[Run]) -> str:
    ours = runs[0]
    head = "".join(
        f"<th class='num' style='color:{color(i)}'>{esc(run.name)}</th>"
        + ("<th class='num'>difference</th>" if i else "")
        for i, run in enumerate(runs)
    )
    rows = []
    for name in sorted(ours.sets, key=lambda name: not ours.sets[name]["in_domain"]):
        row = ours.sets[name]
        domain = "in domain" if row["in_domain"] else "out of domain"
        best = min(run.sets[name]["wer"] for run in runs if name in run.sets)
        cells = []
        for i, run in enumerate(runs):
            cells.append(_rate_cell(run.sets.get(name), best if len(runs) > 1 else None))
            if i:
                cells.append(_difference_cell((run.differences or {}).get(name)))
        mark = f"<span class='{domain.split()[0]}'>{domain}</span>"
        cells.insert(0, f"<td class='num'>{row['n']}</td>")
        rows.append(f"<tr><th>{esc(name)} {mark}</th>{''.join(cells)}</tr>")
    compared = (
        " A difference is this run minus the other on the same utterances, with its paired "
        "interval; bold where that excludes zero."
    )
    return (
        f"<p>Word error rate in percent on text normalised by the style {ours.style}, with its "
        "95 % bootstrap interval."
        f"{compared if len(runs) > 1 else ''}</p><div class='scroll'><table><thead><tr><th>set</th>"
        f"<th class='num'>n</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{drawings.forest(runs)}{tasks.context_table(runs)}{_details_table(runs)}"
    )


def _rate_cell(row: dict[str, Any] | None, best: float | None) -> str:
    if row is None:
        return "<td class='num'>–</td>"
    low, high = row["interval"]
    rate = _percent(row["wer"])
    rate = f"<b>{rate}</b>" if row["wer"] == best else rate
    return f"<td class='num'>{rate}<small>{_percent(low)} … {_percent(high)}</small></td>"


def _difference_cell(paired: dict[str, Any] | None) -> str:
    if paired is None:
        return "<td class='num'>–</td>"
    low, high = paired["interval"]
    text = f"{100 * paired['difference']:+.1f}"
    text = f"<b>{text}</b>" if low > 0 or high < 0 else text
    cell = f"<td class='num'>{text}<small>{100 * low:+.1f} … {100 * high:+.1f}</small></td>"
    return cell.replace("-", "\N{MINUS SIGN}")


def _details_table(runs: Sequence[Run]) -> str:
    rows = []
    for name in runs[0].sets:
        for i, run in enumerate(runs):
            if (row := run.sets.get(name)) is None:
                continue
            counts = (row["substitutions"], row["deletions"], row["insertions"], row["words"])
            rates = (row["cer"], row["wer_raw"], row["cer_raw"])
            odd = (row["empty_hypotheses"], row["unfinished"], row["empty_words"])
            values = [*map(_percent, rates), *counts, *odd]
            cells = "".join(f"<td class='num'>{cell}</td>" for cell in values)
            label = f"<i style='background:{color(i)}'></i>" if len(runs) > 1 else ""
            rows.append(f"<tr><th>{label}{esc(name)}</th>{cells}</tr>")
    return (
        "<details><summary>Characters, raw text and kinds of error</summary><div class='scroll'>"
        "<table><thead><tr><th>set</th><th class='num'>CER</th><th class='num'>raw WER</th>"
        "<th class='num'>raw CER</th><th class='num'>substituted</th><th class='num'>deleted</th>"
        "<th class='num'>inserted</th><th class='num'>words</th>"
        "<th class='num'>empty hypotheses</th><th class='num'>unfinished</th>"
        "<th class='num'>words on silence</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _alignment_table(runs: Sequence[Run]) -> str:
    rows = [
        (i, name, row["alignment"])
        for name in runs[0].sets
        for i, run in enumerate(runs)
        if (row := run.sets.get(name)) and row.get("alignment")
    ]
    if not rows:
        return ""
    keys = [key for key in ALIGNMENT if any(key in figures for _, _, figures in rows)]
    head = "".join(f"<th class='num'>{ALIGNMENT[key][0]}</th>" for key in keys)
    body = []
    for i, name, figures in rows:
        label = f"<i style='background:{color(i)}'></i>" if len(runs) > 1 else ""
        cells = "".join(
            f"<td class='num'>{figures[key]:.{ALIGNMENT[key][1]}f}</td>"
            if figures.get(key) is not None
            else "<td class='num'>–</td>"
            for key in keys
        )
        body.append(f"<tr><th>{label}{esc(name)}</th>{cells}</tr>")
    return (
        "<p>On spoken word: the share of the plan's mass on the word spoken at the time, and what "
        "tokens spread evenly over the utterance would reach. Word edges: how far the starts and "
        "ends that align gives are from the true ones (the median), and the share of them within "
        "100 ms. Retrieval: the mean of the speech that the plan sends to a token is closest to "
        "that very token among all transcript tokens. Monotonicity: the correlation of speech and "
        "token positions under the plan. The cosine to the nearest token rises in runs that learn "
        "nothing useful as well: it is no evidence of alignment.</p>"
        f"<div class='scroll'><table><thead><tr><th>set</th>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>{legend(runs).replace('figcaption', 'p')}"
    )


def _worst(run: Run) -> str:
    rows = [row for row in run.hypotheses if row["errors"] and row["set"] in run.sets]
    if not rows:
        return "<p>Every utterance is right.</p>" if run.hypotheses and run.sets else ""
    rows = sorted(rows, key=lambda row: (-row["errors"], row["id"]))[:NUM_WORST]
    items = []
    for row in rows:
        words = "".join(
            {
                "equal": f"<span>{esc(said)}</span> ",
                "delete": f"<del>{esc(said)}</del> ",
                "insert": f"<ins>{esc(heard)}</ins> ",
                "substitute": f"<del>{esc(said)}</del> <ins>{esc(heard)}</ins> ",
            }[operation]
            for operation, said, heard in metrics.word_diff(
                normalize(row["reference"], row.get("lang"), run.style),
                normalize(row["hypothesis"], row.get("lang"), run.style),
            )
        )
        count = f"{row['errors']} error{'s' if row['errors'] > 1 else ''}"
        items.append(
            f"<li><p class='where'>{esc(row['set'])} · {short(row['id'])} · {count}</p>"
            f"<p dir='auto'>{words}</p></li>"
        )
    return (
        "<p><del>Struck out</del>: in the reference, not recognised. <ins>Underlined</ins>: "
        f"recognised, not in the reference.</p><ol class='worst'>{''.join(items)}</ol>"
    )


def _configuration(runs: Sequence[Run], versions: dict[str, str]) -> str:
    parts = []
    configs = [run.config or {} for run in runs]
    if len(runs) > 1:
        keys = sorted(
            key
            for key in set().union(*configs)
            if any(_setting(config, key) != _setting(configs[0], key) for config in configs)
        )
        head = "".join(
            f"<th style='color:{color(i)}'>{esc(run.name)}</th>" for i, run in enumerate(runs)
        )
        rows = "".join(
            f"<tr><th>{esc(key)}</th>"
            + "".join(f"<td>{esc(_setting(config, key))}</td>" for config in configs)
            + "</tr>"
            for key in keys
        )
        parts.append(
            "<p>Settings that differ between the runs.</p><div class='scroll'><table><thead><tr>"
            f"<th>key</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
    for title, table in (("All settings", configs[0]), ("Versions", versions)):
        rows = "".join(
            f"<tr><th>{esc(key)}</th><td>{esc(_setting(table, key))}</td></tr>" for key in table
        )
        if rows:
            parts.append(
                f"<details><summary>{title}</summary><div class='scroll'><table class='plain'>"
                f"<tbody>{rows}</tbody></table></div></details>"
            )
    return "".join(parts)


def _setting(config: dict[str, Any], key: str) -> str:
    value = config.get(key, "–")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


_STYLE = """
:root { color-scheme: light; --ink: #1c2328; --soft: #5d6a72; --line: #e2e6e8; --accent: #1f5f8b; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 3rem; color: var(--ink);
  background: #fff; font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  -webkit-text-size-adjust: 100%; }
header { border-bottom: 1px solid var(--line); padding-bottom: 1.5rem; }
h1 { font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.2; margin: 0 0 1.25rem; font-weight: 650;
  overflow-wrap: anywhere; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; font-weight: 650; }
p { max-width: 44rem; margin: .5rem 0 .75rem; }
.kind { color: var(--soft); font-size: .85rem; letter-spacing: .04em; margin: 0 0 .25rem; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem 3rem; }
.card b { display: block; font-size: 2.4rem; font-weight: 600; line-height: 1.1;
  color: var(--accent); font-variant-numeric: tabular-nums; }
.card b small { font-size: 1.2rem; font-weight: 400; }
section > p { color: #3a454c; }
.card { max-width: 22rem; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: .9rem; }
.notes { margin: 1.25rem 0 0; padding: .75rem 1rem .75rem 2rem; background: #fdf6ec;
  border-left: 3px solid #d79a45; font-size: .9rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; min-width: min(100%, 34rem); }
th, td { text-align: left; vertical-align: top; padding: .45rem .9rem .45rem 0;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; border-bottom: 1px solid #b9c2c7;
  vertical-align: bottom; }
thead .num { white-space: normal; }
tbody th { font-weight: 500; min-width: 6em; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { display: block; color: var(--soft); font-size: .78rem; }
td b { font-weight: 650; }
.in, .out { font-size: .72rem; font-weight: 500; border-radius: 1rem; padding: .05rem .5rem;
  margin-left: .3rem; white-space: nowrap; border: 1px solid; }
.in { color: #3f6f52; border-color: #bcd5c5; } .out { color: #8a5a1c; border-color: #e4cba6; }
figure { margin: 1rem 0; min-width: 0; }
figcaption { overflow-wrap: anywhere; color: var(--soft); font-size: .88rem; margin: .3rem 0; }
img { display: block; max-width: 100%; height: auto; }
.grid { display: grid; gap: 1.25rem 1.75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
.grid figure { margin: 0; } .grid img { width: 100%; }
.plan { width: 100%; max-width: 34rem; height: auto; display: block; }
.plan text { font-size: 10px; fill: var(--ink); } .plan .token { text-anchor: end; }
.plan .tick { text-anchor: middle; fill: var(--soft); font-size: 9px; }
.plan .word { stroke: #fff; } .plan .said { text-anchor: middle; fill: #fff; font-size: 9px; }
.plan line { stroke: #999; } .plan .frame { fill: none; stroke: #cfd6da; }
i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
.key { margin-right: 1rem; overflow-wrap: anywhere; }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--accent); font-size: .92rem; }
.worst { padding-left: 1.4rem; } .worst li { margin-bottom: .9rem; } .worst p { margin: 0; }
.where { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
del { color: #a33a24; text-decoration: line-through; }
ins { color: #1d6b43; text-decoration: underline; text-underline-offset: 2px; }
.plain { min-width: 0; } .plain td, .plain th { font: .8rem/1.4 ui-monospace, Menlo, monospace;
  overflow-wrap: anywhere; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .8rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 2rem; } h2 { margin-top: 2.25rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; } @page { margin: 16mm; }
  figure, tr, .worst li, .cards { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll { overflow: visible; } details:not([open]) { display: none; } }
"""
