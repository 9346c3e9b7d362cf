"""Writes the tables of docs/*.md from benchmarks/results/*.json, so that they cannot drift apart.

    python -m benchmarks.tables

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. docs/quickstart.md, docs/study.md
and docs/scaling.md are written by the benchmarks of these names.
"""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECOGNIZER = RESULTS / "laptop.jsonl"  # of benchmarks.laptop
ALL = "all"  # what a recognizer is trained on


def markdown(header: list[str], rows: list[list[str]], align: str = "---:") -> str:
    """A table: the first column is text, the others are figures, or text too with align="---"."""
    lines = [header, ["---"] + [align] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read(name: str):
    return json.loads((RESULTS / f"{name}.json").read_text())


def read_lines(path: Path) -> list[dict]:
    """The results of runs, a line each; none where none was made."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def versions(named: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in named.items())


def machine(result: dict) -> str:
    clock = "CPU time" if result.get("clock") == "cpu" else "wall clock"
    load = f"load average {result['load_average']:.1f}"
    host = f"{result['cores']} {result['processor']} core(s)"
    return f"{host} ({result['device']}), {clock}, {load}"


def sinkhorn() -> str:
    result = read("sinkhorn")
    e, s = result["environment"], result["settings"]
    columns = {
        "milliseconds": ("ms", lambda v: f"{v:.3g}" if v < 1000 else f"{v:.0f}"),
        "times_ours": ("× ours", "{:.2f}".format),
        "times_cost": ("× cost", "{:.2f}".format),
        "temporary_mib": ("temporary MiB", "{:.3g}".format),
        "plan_l1_error": ("plan L1 error", "{:.1e}".format),
        "excess_over_lp": ("excess over LP", "{:.2%}".format),
    }
    parts = [f"Measured on {machine(e | s)}, {s['repeats']} rounds; {versions(e['versions'])}."]
    for size, tables in result["sizes"].items():
        for part, rows in tables.items():
            names = list(next(iter(rows.values())))
            cell = lambda row, name: "–" if row[name] is None else columns[name][1](row[name])
            what = "solve" if part == "solve" else "forward + backward"
            parts.append(f"**{size.replace('x', ' ')}, {what}**")
            parts.append(
                markdown(
                    ["", *(columns[name][0] for name in names)],
                    [[key, *(cell(row, name) for name in names)] for key, row in rows.items()],
                )
            )
    return "\n\n".join(parts)


def step() -> str:
    result = read("step")
    rows = []
    for row in result["rows"]:
        on_paper = "seconds" not in row
        rows.append(
            [
                row["size"],
                "on paper" if on_paper else f"{row['batch_size']}",
                "" if on_paper else f"{row['frames'] / 100:g}",
                "" if on_paper else f"{1e3 * row['seconds']['otreg']:.0f}",
                *("" if on_paper else f"{row['share'][loss]:.1%}" for loss in ("otreg", "ctc")),
                f"{row['flops']:.3g}",
                *(f"{row['flops_share'][loss]:.2%}" for loss in ("otreg", "ctc")),
                "" if on_paper else f"{row['flops_per_sec'] / 1e9:.1f}",
            ]
        )
    header = ["size", "batch", "audio s", "ms", "OTReg's share of the time", "CTC's"]
    header += ["FLOPs", "OTReg's share", "CTC's"]
    return (
        f"Measured on {machine(result)}, {result['repeats']} rounds; "
        f"{versions(result['versions'])}.\n\n" + markdown([*header, "GFLOP/s"], rows)
    )


def peer_step() -> str:
    result = read("peer_step")
    rows = [
        [
            name,
            f"{1e3 * row['seconds']:.0f}",
            f"{row['utterances_per_sec']:.2f}",
            f"{row['ratio']:.2f}",
        ]
        for name, row in result["rows"].items()
    ]
    first = result["first_loss"]
    return (
        f"{result['encoder']} + {result['llm']}, batch {result['batch_size']} of "
        f"{result['seconds']:g} s; {machine(result)}, {result['repeats']} "
        f"rounds; {versions(result['versions'])}. First loss: ours {first['ours']:.5f}, torch's "
        f"{first['torch']:.5f}.\n\n"
        + markdown(["", "ms a step", "utterances/s", "ours is faster by"], rows)
    )


def epoch() -> str:
    result, rows = read("epoch"), []
    middle = lambda runs, key: statistics.median(run[key] for run in runs)
    ours = middle(result["runs"]["ours"], "seconds")
    for name, runs in result["runs"].items():
        figures = [f"{middle(runs, key):.0f}" for key in ("seconds", "to_the_first_step")]
        rates = ("utterances_per_sec", "after_the_first_step")
        figures += [f"{middle(runs, key):.2f}" for key in rates]
        memory = f"{middle(runs, 'peak_mib') / 1024:.1f}"
        rows.append([name, *figures, memory, f"{middle(runs, 'seconds') / ours:.2f}"])
    header = ["", "s", "s to the first step", "utterances/s", "the same after it", "GiB"]
    parts = {name: runs[0]["parts"] for name, runs in result["runs"].items() if "parts" in runs[0]}
    spent = [
        [name, *(f"{1e3 * x:.0f}" for x in of_part.values())] for name, of_part in parts.items()
    ]
    return (
        f"{result['utterances']} utterances, {result['batch_size']} a step, {result['encoder']} "
        f"and {result['llm']}; {machine(result)}; {versions(result['versions'])}.\n\n"
        + markdown([*header, "ours is faster by"], rows)
        + "\n\n"
        + markdown(["ms an utterance", *next(iter(parts.values()))], spent)
    )


def decode() -> str:
    result = read("decode")
    rows = []
    for size, model in result["models"].items():
        rates = model["utterances_per_sec"]
        ours = rates["otreg_jax, batched"]
        for name, values in rates.items():
            ratio = statistics.median([a / b for a, b in zip(ours, values, strict=True)])
            rows.append(
                [
                    f"{size}, {name}",
                    f"{statistics.median(values):.2f}",
                    f"{ratio:.2f}",
                    model["same_tokens_as_batched"][name],
                ]
            )
    table = markdown(["", "utterances/s", "ours, batched, is faster by", "same tokens"], rows)
    if seconds := result["models"].get("recognizer", {}).get("seconds"):
        rows = [[f"recognizer, {name}", f"{value:.2f}"] for name, value in seconds.items()]
        table += "\n\n" + markdown(["", "seconds a batch"], rows)
    return (
        f"Batch {result['batch_size']}, {result['tokens']} tokens each; {machine(result)}; "
        f"{versions(result['versions'])}.\n\n{table}"
    )


def data() -> str:
    result = read("data")
    rates = result["speed"]["audio_seconds_per_cpu_second"]
    torch = rates["batches_torch_manifest"]
    named = {
        "log-mel alone": "log_mel_80",
        "PyTorch's loader, Ogg files": "batches_torch_manifest",
        "ours, Ogg files": "batches_manifest",
        "PyTorch's loader, FLAC files": "batches_torch_flac",
        "ours, FLAC files": "batches_flac",
        "ours, ArrayRecord": "batches_array_record",
        "ours, ArrayRecord, log-mel in the step": "batches_array_record_features_in_step",
    }
    speed = [[name, f"{rates[key]}", f"{rates[key] / torch:.2f}"] for name, key in named.items()]
    padding = [
        [name.replace("_", " "), f"{100 * share:.1f}"]
        for name, share in result["padding"]["padding"].items()
    ]
    memory, machine = result["memory"], result["machine"]
    rss = list(memory["rss_mib"].values())
    hours = f"{result['speed']['hours']:.2f} hours of read speech"
    return "\n\n".join(
        [
            f"Of {hours}, batches of 16; {machine['processor']} ({machine['device']}), CPU time; "
            f"{versions(machine['versions'])}.",
            markdown(["", "audio seconds a second and core", "× PyTorch, Ogg"], speed),
            f"Over {memory['batches']} batches of {memory['batch_size']} the process held "
            f"{min(rss):.0f} to {max(rss):.0f} MiB; after the first tenth these were within "
            f"{memory['spread_after_the_first_tenth']:.1%}.",
            markdown(["batch shapes", "padding, % of the frames"], padding),
        ]
    )


def durations() -> str:
    result = read("data")["durations"]
    rows = [
        [
            f"{row['shapes']} shapes, "
            + (f"{row['batch_seconds']:g} s" if row["batch_seconds"] else "16 rows"),
            f"{100 * row['padding']:.1f}",
            f"{100 * row['padding_tokens']:.1f}",
            f"{100 * row['padding_positions']:.1f}",
            f"{100 * row['padding_packed']:.1f}",
            f"{row['steps']}",
            f"{row['audio_seconds_a_step']:.0f}",
            f"{row['longest_step_seconds']:.0f}",
            f"{row['longest_over_mean']:.2f}",
        ]
        for row in result["rows"]
    ]
    header = [
        "",
        "padding: frames, %",
        "tokens, %",
        "LLM positions, %",
        "packed, %",
        "steps an epoch",
        "audio s a step",
        "longest step, s",
        "over the mean",
    ]
    return (
        f"{result['utterances']} utterances, {result['hours']:.2f} h, of 0.8 to 20 s.\n\n"
        + markdown(header, rows)
    )


def recognizers(languages: bool = False) -> list[dict]:
    """The runs tested in one language, or those tested in several: their sets are named so."""
    return [
        line
        for line in read_lines(RECOGNIZER)
        if languages == any("-" in name for name in line["sets"])
    ]


def error_rates(lines: list[dict]) -> str:
    """WER of recognizers with its 95 % interval: a row a run, a column a test set."""
    names = list(dict.fromkeys(name for line in lines for name in line["sets"]))
    rows = []
    for line in lines:
        minutes = f"{line['minutes']:.0f}" if "minutes" in line else ""
        steps = f"{line['steps']} × {line['batch']}" if "steps" in line else ""
        cells = [line["trained_on"], line["arm"], steps, minutes]
        for name in names:
            row = line["sets"][name]
            wer, low, high = (100 * x for x in (row["wer"], *row["interval"]))
            cells.append(f"{wer:.1f} ({low:.1f} … {high:.1f})")
        rows.append(cells)
    return markdown(["trained on", "arm", "steps × utterances", "minutes", *names], rows)


def recognizer(languages: bool = False) -> str:
    lines = recognizers(languages)
    made_by = {}
    for line in lines:
        if "machine" in line:
            of = line["machine"]
            means = f"{of['cores']} {of['processor']} cores, {line['dtype']}; "
            means += versions(of["versions"])
            made_by.setdefault(means, []).append(_named(line))
    measured = [f"{means} ({', '.join(runs)})" for means, runs in made_by.items()]
    return f"{error_rates(lines)}\n\nMeasured on " + "; on ".join(measured) + "."


def _named(line: dict) -> str:
    return f"{line['trained_on']} by {line['arm']}"


def recognizer_languages() -> str:
    lines = recognizers(languages=True)
    names = lines[0]["sets"]
    rows = [
        [f"{line['trained_on']}, {figure.upper()}"]
        + [f"{100 * line['sets'][name][figure]:.1f}" for name in names]
        for line in lines
        for figure in ("wer", "cer")
    ]
    shown = [
        [name, *pair] for line in lines for name in names for pair in line["first_ten"][name][:3]
    ]
    said = markdown(["set", "said", "recognized"], shown, "---")
    return "\n\n".join([recognizer(languages=True), markdown(["", *names], rows), said])


def recognizer_course() -> str:
    rows = {}
    runs = [line for line in recognizers() if "course" in line]
    for i, line in enumerate(runs):
        for at in line["course"]:
            if at["step"] % 100 == 0:
                row = rows.setdefault(at["step"], ["–"] * len(runs))
                row[i] = f"CTC {at['ctc']:.2f}" if "ctc" in at else f"cross-entropy {at['ce']:.2f}"
    header = ["step", *map(_named, runs)]
    return markdown(header, [[str(step), *row] for step, row in sorted(rows.items())])


def recognizer_transcripts() -> str:
    line = next(line for line in recognizers() if line["trained_on"] == ALL)
    parts = []
    for name, pairs in line["first_ten"].items():
        parts.append(f"`{name}`:\n\n{markdown(['said', 'recognized'], pairs, '---')}")
    return "\n\n".join(parts)


def real_table() -> str:
    """A row a question to a loss, a column a model's embedding table."""
    result = read("real_table")
    models = result["models"]
    nats, share = "{:.2f}".format, "{:.0%}".format
    questions = [
        ("rows, of which the sentences use", lambda m: f"{m['rows']}, {m['rows_in_use']}"),
        ("mean cosine between rows in use", lambda m: nats(m["mean_cosine"])),
        ("CTC at the token's own row, all rows", lambda m: nats(m["ctc_nats"]["all"])),
        ("– all rows, centred", lambda m: nats(m["ctc_nats"]["all_centred"])),
        ("– rows in use", lambda m: nats(m["ctc_nats"]["in_use"])),
        ("OTReg's plan on the right token", lambda m: share(m["plan_share_raw"])),
        ("– centred", lambda m: share(m["plan_share_centred"])),
        ("nearest row in use is the right one", lambda m: share(m["nearest_raw"])),
        ("– centred", lambda m: share(m["nearest_centred"])),
        ("InfoNCE where speech is the text", lambda m: nats(m["infonce_at_text_raw"])),
        ("– at its lowest", lambda m: nats(m["infonce_lowest_raw"])),
        ("– cosine to the text there", lambda m: nats(m["infonce_cosine_raw"])),
        ("InfoNCE where speech is the text, centred", lambda m: nats(m["infonce_at_text_centred"])),
        ("– cosine to the text at its lowest", lambda m: nats(m["infonce_cosine_centred"])),
    ]
    rows = [[name, *(of(model) for model in models.values())] for name, of in questions]
    return markdown(["", *models], rows)


def prompted() -> str:
    """A row a language that is heard, a column a language that is asked for."""
    result = read("prompted")
    names = {"en": "English", "de": "German", "fr": "French"}
    rows = [
        [names[heard], *(f"{100 * row[asked]:.0f}" for asked in names)]
        for heard, row in result["by_language"].items()
    ]
    bleu = ", ".join(f"{result['bleu'][to]:.1f} into {names[to]}" for to in names)
    shown = [
        [row["said"], *(row.get(asked, "–") for asked in names)] for row in result["shown"].values()
    ]
    align, steps = result["steps"]
    machine = result["machine"]
    return "\n\n".join(
        [
            markdown(["heard \\ asked for, % obeyed", *names.values()], rows),
            f"{100 * result['obeyed']:.1f} % of {result['answers']} answers are in the language "
            f"asked for; of {100 * result['all_three']:.1f} % of the recordings all three are. "
            f"{100 * result['exact']:.1f} % are right to the letter; BLEU {bleu}.",
            markdown(["said", *names.values()], shown, "---"),
            f"{align} steps of aligning and {steps} through the LLM, {result['batch']} recordings "
            f"each, one seed; {result['minutes']:.0f} minutes, with other work and pauses, on "
            f"{machine['cores']} {machine['processor']} cores; {versions(machine['versions'])}.",
        ]
    )


def attention() -> str:
    result = read("attention")
    rows = []
    for size, kernels in result["sizes"].items():
        for name, found in kernels.items():
            times, memory = (
                found[key] / kernels["xla"][key] for key in ("milliseconds", "temporary_mib")
            )
            figures = f"{found['milliseconds']:.1f}", f"{found['temporary_mib']:.0f}"
            rows.append([size, name, *figures, f"{times:.2f}", f"{memory:.2f}"])
    header = ["", "kernel", "ms", "temporary MiB", "× xla's time", "× xla's memory"]
    return (
        f"{result['rows']} utterances, {result['dtype']}; {machine(result)}; "
        f"{versions(result['versions'])}.\n\n" + markdown(header, rows)
    )


def startup() -> str:
    result = read("data")["startup"]
    names = {"first": "the first start, which makes the index", "from_the_index": "from the index"}
    rows = []
    for name, run in ((name, result[name]) for name in names if name in result):
        parts = run["seconds"].values()
        figures = run["whole_seconds"], *parts, run["cpu_seconds"]
        memory = run["peak_mib"], run["own_mib"]
        rows.append([names[name], *(f"{x:.1f}" for x in figures), *map(str, memory)])
    header = ["", "whole, s", "data, s", "plan, first batch, s", "CPU, s", "peak MiB", "own MiB"]
    load = result["from_the_index"]["load_average"]
    where = f"load average {load:.0f} on {read('data')['machine']['cores']} cores"
    return (
        f"{result['utterances']:,} utterances, an index of {result['index_mib']} MiB; {where}.\n\n"
        + markdown(header, rows)
    )


TABLES = {
    "startup": startup,
    "prompted": prompted,
    "real_table": real_table,
    "recognizer": recognizer,
    "recognizer_course": recognizer_course,
    "recognizer_languages": recognizer_languages,
    "recognizer_transcripts": recognizer_transcripts,
    "durations": durations,
    "data": data,
    "sinkhorn": sinkhorn,
    "step": step,
    "peer_step": peer_step,
    "epoch": epoch,
    "decode": decode,
    "attention": attention,
}
MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.S)


def render(text: str) -> str:
    """The document with its tables made anew."""
    return MARKED.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n\n{m[4]}", text)


def main() -> None:
    for path in sorted((ROOT / "docs").glob("*.md")):
        before = path.read_text()
        after = render(before)
        if after != before:
            path.write_text(after)
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
