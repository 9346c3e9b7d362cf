"""Evaluates a run: error rates, figures of other tasks, alignment figures and a report.

    python -m otreg_jax.evaluate --workdir=runs/quickstart
    python -m otreg_jax.evaluate --workdir=runs/mine --sets="calls=calls.jsonl,news=news.jsonl"
    python -m otreg_jax.evaluate --workdir=runs/otreg --compare=runs/ce --compare=runs/position

The sets are those of the run's configuration unless --sets names others. Writes DIR/eval/:
results.json, hypotheses.jsonl (a line an utterance), figures.npz and report.html.
"""

import functools
import hashlib
import io
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from otreg_jax import (
    alignment,
    build,
    checkpoint,
    cluster,
    command,
    decoding,
    metrics,
    normalize,
    recognition,
    report,
    rundir,
    task_scores,
    tracking,
)
from otreg_jax import config as config_lib
from otreg_jax.data import prompts, sets, sources

GREEDY = decoding.Settings(0)


def evaluate(
    workdir: str | os.PathLike,
    *,
    which: str = checkpoint.NEWEST,
    compare: Sequence[str | os.PathLike] = (),
    manifests: str = "",
    in_domain: Sequence[str] = ("dev",),
    batch_size: int = 32,
    decode: decoding.Settings = GREEDY,
    normalizer: str = "whisper",
) -> dict[str, Any]:
    """Evaluates a run directory, and others beside it, and writes `workdir`/eval.

    A compared run is evaluated on the same utterances; what its own eval directory holds is used
    where it comes from the same checkpoint, utterances and settings.

    Args:
      which: the checkpoint of every run: "newest", "best" or a step.
      manifests: "name=manifest,..."; "" for the sets of the run's configuration.
      in_domain: names of the sets that count as in-domain.
      decode: how to; of max_tokens, 0 is `decode.max_tokens` of the run or, by default, half more
        than the longest transcript.
      normalizer: the style in which texts are compared, one of `normalize.STYLES`.
      others: see the flags.

    Returns:
      What results.json holds.

    Raises:
      FileNotFoundError, ValueError: no run, no checkpoint, no evaluation set.
    """
    decoding.check(decode)
    run = build.load_run(workdir, which)
    with cluster.process_0_first():
        utterances, problems = sets.load_eval(run.config, workdir, manifests)
    normalize.check(normalizer, {u.lang for found in utterances.values() for u in found})
    files = rundir.of(workdir)
    if jax.process_index() == 0:
        files.eval_skipped.unlink(missing_ok=True)
        sources.record_skipped(problems, files.eval_skipped)
    known = {*utterances, *map(_whole_set, utterances)}
    unknown = [name for name in in_domain if name not in known and list(in_domain) != ["dev"]]
    if unknown:
        raise ValueError(
            f"--in_domain: no set {', '.join(unknown)}; there are {', '.join(utterances)}"
        )
    prompter = prompts.make(run.config, run.tokenizer)
    answers = (prompts.answer(prompter, u) for found in utterances.values() for u in found)
    longest = max(len(run.tokenizer.encode(answer)) for answer in answers)
    max_tokens = decode.max_tokens or run.config.decode.max_tokens or 3 * longest // 2 + 8
    decode = decode._replace(max_tokens=max_tokens)
    layer = run.config.otreg.layer
    settings = {
        "decode": decode._asdict(),
        "layer": layer,
        "in_domain": list(in_domain),
        "normalizer": {"style": normalizer, "version": normalize.STYLES[normalizer].version},
        "utterances": _fingerprint(utterances),
    }
    results, rows, figures = _evaluate_run(run, workdir, utterances, decode, settings, batch_size)

    runs = [_column(files, run.config, results, rows, figures)]
    results["compare"] = {}
    for other in compare:
        stored = _stored(other, settings, which)
        if stored is None:
            their_run = build.load_run(other, which)
            stored = _evaluate_run(their_run, other, utterances, decode, settings, batch_size)
        their_files = rundir.of(other)
        their_config = config_lib.load(their_files.config)
        differences = compare_rows(rows, stored[1], normalizer)
        results["compare"][str(other)] = differences
        column = _column(their_files, their_config, *stored)
        runs.append(column._replace(differences=differences))

    if jax.process_index() == 0:
        rundir.write_json(files.results, results)
        notes = report.notes(results, rundir.read_lines(files.eval_skipped, "delete it"))
        page = report.page(runs, versions=_versions(), notes=notes)
        rundir.write_text(files.report, page)
    return results


def _evaluate_run(run, workdir, utterances: sets.Sets, decode, settings, batch_size):
    """Decodes and measures; writes hypotheses.jsonl, figures.npz and results.json.

    Returns (results, rows of hypotheses.jsonl, figures as report wants them).
    """
    files = rundir.of(workdir)
    style = settings["normalizer"]["style"]
    with recognition.Partial(files.partial, settings | {"step": run.step}) as partial:
        rows, samples = recognition.decode_sets(
            run,
            utterances,
            decode,
            settings["layer"],
            batch_size,
            files.eval_skipped,
            f"evaluating {workdir}",
            partial,
            style,
        )
    if not rows:
        raise ValueError(f"{workdir}: no utterance could be evaluated, see {files.eval_skipped}")
    results = {
        "workdir": str(workdir),
        "step": run.step,
        **settings,
        "sets": score_rows(rows, settings["in_domain"], style),
        "tasks": score_tasks(rows, settings["in_domain"], style),
        "versions": _versions(),
    }
    plans = []
    for name, found in alignment.measure(samples).items():
        kind = "sets" if name in results["sets"] else "tasks"
        results[kind][name]["alignment"] = found["figures"]
        plans.append((name, found["example"], found["plan_ST"], found["words"]))
    figures = report.arrays(plans, samples, run.tokenizer)
    if jax.process_index() == 0:
        rundir.write_lines(files.hypotheses, rows)
        packed = io.BytesIO()
        np.savez_compressed(packed, **figures)
        rundir.write_bytes(files.figures, packed.getvalue())
        rundir.write_json(files.results, results)
        files.partial.unlink(missing_ok=True)
    return results, rows, figures


def score_rows(
    rows: Sequence[dict], in_domain: Sequence[str], style: str = "whisper"
) -> dict[str, dict[str, Any]]:
    """`metrics.score` of every set of transcripts, in the order of the rows; `context` where rows
    list words."""
    scores = {}
    for name, mine in _of_sets(rows).items():
        if _task_of(mine) != prompts.TRANSCRIBE:
            continue
        scores[name] = metrics.score(
            [row["reference"] for row in mine],
            [row["hypothesis"] for row in mine],
            [row["lang"] for row in mine],
            style,
            [row["unfinished"] for row in mine],
        )
        if biased := task_scores.biased(mine, style):
            scores[name]["context"] = {key: figure.value for key, figure in biased.items()}
            intervals = {key: task_scores.interval(figure) for key, figure in biased.items()}
            scores[name]["context"]["intervals"] = intervals
        scores[name]["in_domain"] = _is_in(name, in_domain)
    return scores


def score_tasks(
    rows: Sequence[dict], in_domain: Sequence[str], style: str = "whisper"
) -> dict[str, dict[str, Any]]:
    """`task_scores.score` of every set of another task, in the order of the rows."""
    return {
        name: task_scores.score(task, mine, style) | {"in_domain": _is_in(name, in_domain)}
        for name, mine in _of_sets(rows).items()
        if (task := _task_of(mine)) != prompts.TRANSCRIBE
    }


def _of_sets(rows: Sequence[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["set"], []).append(row)
    return found


def _task_of(rows: Sequence[dict]) -> str:
    return rows[0].get("task", prompts.TRANSCRIBE)


def _whole_set(name: str) -> str:
    """The set that one of a single task, "name/task", is a part of."""
    return name.rpartition("/")[0] or name


def _is_in(name: str, in_domain: Sequence[str]) -> bool:
    return name in in_domain or _whole_set(name) in in_domain


def compare_rows(
    ours: Sequence[dict], theirs: Sequence[dict], style: str = "whisper"
) -> dict[str, dict[str, Any]]:
    """The paired difference of every set over the utterances that both have: of word error rates,
    or of the main figure of another task."""
    key = lambda row: (row["set"], row["id"])
    others = {key(row): row for row in theirs}
    differences = {}
    for name, mine in _of_sets(ours).items():
        pairs = [(row, others[key(row)]) for row in mine if key(row) in others]
        task = _task_of([row for row, _ in pairs]) if pairs else prompts.TRANSCRIBE
        if task != prompts.TRANSCRIBE:
            sides = [task_scores.statistics(task, side, style) for side in zip(*pairs, strict=True)]
            figure = task_scores.main_figure(task)
            differences[name] = task_scores.paired_difference(*(side[figure] for side in sides))
            continue
        counts = [
            metrics.normalized_counts(
                [row["reference"] for row in side],
                [row["hypothesis"] for row in side],
                [row["lang"] for row in side],
                style,
            )[0]
            for side in zip(*pairs, strict=True)
        ]
        if counts:
            differences[name] = metrics.paired_difference(*counts)
    return differences


# Files -----------------------------------------------------------------------------------------


def _column(files: rundir.Files, config, results, rows, figures) -> report.Run:
    flat, curve = config_lib.flatten(config), tracking.read(files)
    return report.column(files.root.name, flat, results, rows, curve, figures)


def _stored(workdir, settings, which: str):
    """(results, rows, figures) of an earlier evaluation, if it answers the same question."""
    files = rundir.of(workdir)
    if not all(path.exists() for path in (files.results, files.hypotheses, files.figures)):
        return None
    remedy = f"delete {files.eval} to evaluate again"
    results = rundir.read_json(files.results, remedy)
    steps = rundir.checkpoint_steps(files)
    if which != checkpoint.NEWEST:
        steps = [step for step in steps if str(step) == which]  # which is best, only loading tells
    asked = settings | {"step": max(steps, default=None)}
    if any(results.get(key) != value for key, value in asked.items()):
        return None
    rows = rundir.read_lines(files.hypotheses, remedy)
    try:
        figures = dict(np.load(io.BytesIO(rundir.read_bytes(files.figures))))
    except Exception as error:  # of zip files, of zlib, of numpy
        raise ValueError(f"{files.figures}: damaged ({error}); {remedy}") from error
    print(f"{workdir}: using its evaluation of step {results['step']}")
    return results, rows, figures


def _fingerprint(utterances: sets.Sets) -> str:
    asked = [
        (name, u.id, u.text, u.duration, *([u.task, u.fields] if u.task else []))
        for name, found in utterances.items()
        for u in found
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} {device.device_kind}",
    }


def table(results: dict[str, Any]) -> str:
    """The scores as text, one line a set; those of other tasks than transcription follow."""
    lines = _table_of_sets(results) if results["sets"] else []
    return "\n".join([*lines, *_table_of_tasks(results)])


def _table_of_tasks(results: dict[str, Any]) -> list[str]:
    if not results["tasks"]:
        return []
    width = max(map(len, results["tasks"]))
    lines = [f"{'set':{width}}  domain    n  figures  (95 %)"]
    for other in results["compare"]:
        lines[0] += f"   - {epath.Path(other).name}"
    for name, row in results["tasks"].items():
        shown = []
        for figure, (low, high) in row["intervals"].items():
            scale = task_scores.scale(figure)
            value, low, high = (scale * x for x in (row[figure], low, high))
            shown.append(f"{figure} {value:.1f} ({low:.1f} … {high:.1f})")
        figure = task_scores.main_figure(row["task"])
        for differences in results["compare"].values():
            if name in differences:
                scaled = task_scores.scale(figure) * differences[name]["difference"]
                shown.append(f"{figure} {scaled:+.1f}")
        domain = "in " if row["in_domain"] else "out"
        lines.append(f"{name:{width}}  {domain} {row['n']:7d}  {'  '.join(shown)}")
    return lines


def _table_of_sets(results: dict[str, Any]) -> list[str]:
    width = max(len(name) for name in results["sets"])
    lines = [f"{'set':{width}}  domain    n     WER  (95 %)          CER   raw WER   del / ins"]
    for other in results["compare"]:
        lines[0] += f"   - {epath.Path(other).name}"
    for name, row in results["sets"].items():
        low, high = row["interval"]
        line = (
            f"{name:{width}}  {'in ' if row['in_domain'] else 'out'} {row['n']:7d}  "
            f"{100 * row['wer']:6.1f}  ({100 * low:5.1f} … {100 * high:5.1f})  "
            f"{100 * row['cer']:5.1f}  {100 * row['wer_raw']:7.1f}"
            f"  {100 * row['deletion_rate']:5.1f} /{100 * row['insertion_rate']:5.1f}"
        )
        for other, differences in results["compare"].items():
            if name in differences:
                text = f"{100 * differences[name]['difference']:+.1f}"
                line += f"  {text:>{3 + len(epath.Path(other).name)}}"
        if context := row.get("context"):
            listed, others = (100 * context[key] for key in ("biased_wer", "unbiased_wer"))
            line += f"  listed words {listed:.1f}, others {others:.1f}"
        lines.append(line)
    return lines


def define_flags(define) -> None:
    command.define_run(define)
    define.multi_string("compare", [], "Directory of a run to compare; repeatable.")
    define.string("sets", "", "name=manifest,...: instead of the configuration's sets.")
    define.list("in_domain", ["dev"], "Names of the in-domain sets.")
    define.integer("batch_size", 32, "Utterances decoded at once.", 1)
    decoding.define_flags(define)
    define.enum("normalizer", "whisper", list(normalize.STYLES), "What counts as the same text.")


def main(values, _):
    with cluster.membership():
        results = evaluate(
            values.workdir,
            which=values.checkpoint,
            compare=values.compare,
            manifests=values.sets,
            in_domain=values.in_domain,
            batch_size=values.batch_size,
            decode=decoding.settings_of(values),
            normalizer=values.normalizer,
        )
    if jax.process_index() == 0:
        print(table(results))
        print(f"report: {rundir.of(values.workdir).report}")


cli = functools.partial(command.run, main, define_flags, required=["workdir"])

if __name__ == "__main__":
    sys.exit(cli())
