"""Turns a corpus into sharded ArrayRecord files that train at disk speed.

    python -m otreg_jax.data.prepare --input=train.jsonl,more.jsonl --output=data/mine
    python -m otreg_jax.data.prepare --layout=librispeech --split=train-clean-100 \\
        --lower_case --input=LibriSpeech --output=data/librispeech
    python -m otreg_jax.train --config.data.train=data/mine ...

The output is a TFDS data set (16 kHz int16; `tfds.data_source` reads it). Beside it stand
SPLIT.jsonl (what every record holds, with all columns that a prompt can name), report-SPLIT.json
(hours by language, lengths, what was refused and how often), refused-SPLIT.jsonl (each refusal with
its reason) and SHA256SUMS
(`sha256sum -c SHA256SUMS`).
Run the same command again after an interruption: finished shards stay as they are. Several machines
with a common file system share the work with --machine=0/4 … --machine=3/4; the last one to finish
completes the data set. Or leave that to Apache Beam (pip install apache-beam; the workers need the
file system too), whose options then say where it runs:

    python -m otreg_jax.data.prepare ... --beam="--runner=DirectRunner --direct_num_workers=4 \\
        --direct_running_mode=multi_processing"
"""

import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tqdm

from otreg_jax import command, languages
from otreg_jax.data import audio, corpora, manifest, records, sources
from otreg_jax.data.utterances import BadAudio, Problem, Utterance, too_long


def read_corpus(
    layout: str, paths: str, split: str, lower_case: bool = False
) -> tuple[list[Utterance], list[Problem]]:
    """The utterances of manifests or of a corpus folder, and what is wrong with the others.

    lower_case: whether transcripts come in lower case, as their language has it.

    Raises:
      FileNotFoundError: there is no such manifest, corpus or split.
    """
    utterances, problems = [], []
    for path in paths.split(","):
        if layout == "manifest":
            found, wrong = _with_answers(*sources.scan(path.strip(), "", False, columns=None))
        else:
            lines = list(corpora.LAYOUTS[layout](Path(path.strip()).absolute(), split))
            if not lines:
                raise FileNotFoundError(f"{path}: no split {split!r} in the layout of {layout}")
            found, wrong = manifest.check_lines(lines, path, strict=False)
        utterances += map(_lower, found) if lower_case else found
        problems += wrong
    return utterances, problems


def _with_answers(
    utterances: Sequence[Utterance], problems: Sequence[Problem]
) -> tuple[list[Utterance], list[Problem]]:
    """Rows without a transcript are for other tasks: such a one names its task or its answer."""
    asks = lambda u: u.text or u.task or {*manifest.ANSWER_COLUMNS} & dict(u.fields).keys()
    silent = [u for u in utterances if not asks(u)]
    wrong = [Problem("empty_text", u.where, "no transcript, task or answer") for u in silent]
    return [u for u in utterances if asks(u)], [*problems, *wrong]


def _lower(utterance: Utterance) -> Utterance:
    lower = lambda text: languages.lower(text, languages.find(utterance.lang))
    words = tuple((lower(word), start, end) for word, start, end in utterance.words)
    return utterance._replace(text=lower(utterance.text), words=words)


def prepare(
    utterances: Sequence[Utterance],
    problems: Sequence[Problem],
    output: str | os.PathLike,
    split: str,
    *,
    max_duration: float = 30.0,
    shard_hours: float = 1.0,
    workers: int = 1,
    machine: tuple[int, int] = (0, 1),
    beam: Sequence[str] | None = None,
) -> dict | None:
    """Writes a split of a data set, going on where an interrupted call stopped.

    Args:
      utterances, problems: what `read_corpus` found.
      output: folder; splits written before stay in it.
      split: name of the split: letters, digits and underscores.
      max_duration: seconds; longer utterances are refused.
      shard_hours: hours of audio in a shard.
      workers: processes.
      machine: (index, count) of the machines that write this split, each its share of the shards.
      beam: options of the Apache Beam pipeline that writes the shards; None: processes here do.

    Returns:
      The report, as report-SPLIT.json holds it; None while shards of other machines are missing.

    Raises:
      ValueError: `output` holds the same split of other input, or nothing is left to write.
    """
    output = Path(output)
    kept, refused = [], list(problems)
    for utterance in utterances:
        if problem := too_long(utterance, max_duration):
            refused.append(problem)
        else:
            kept.append(utterance)
    if not kept:
        raise ValueError(f"nothing is left to write: {sources.count(refused)}")
    shards = _divide(kept, 3600 * shard_hours)
    output.mkdir(parents=True, exist_ok=True)
    _check_plan(output / f".plan-{split}", shards)

    names = [
        f"{records.NAME}-{split}.array_record-{i:05d}-of-{len(shards):05d}"
        for i in range(len(shards))
    ]
    index, count = machine
    jobs = dict(zip(names[index::count], shards[index::count], strict=True))
    finished = lambda name: _summary_path(output / name).exists()
    jobs = {name: jobs[name] for name in jobs if not finished(name)}
    if beam is None:
        _write_shards(output, jobs, workers)
    else:
        _write_shards_by_beam(output, jobs, beam)
    if not all(map(finished, names)):
        return None

    summaries = [json.loads(_summary_path(output / name).read_text()) for name in names]
    refused += [Problem(*problem) for summary in summaries for problem in summary["refused"]]
    lines = [line for summary in summaries for line in summary["lines"]]
    records.write_index(output / f"{split}.jsonl", lines)
    records.write_index(output / f"refused-{split}.jsonl", [p._asdict() for p in refused])
    odd = [found for summary in summaries for found in summary.get("odd", ())]
    report = _report(lines, refused, odd, len(shards))
    for line in audio.report(odd, len(lines)):
        print(line)
    (output / f"report-{split}.json").write_text(json.dumps(report, indent=2) + "\n")
    _write_metadata(output)
    return report


def _divide(utterances: Sequence[Utterance], seconds: float) -> list[list[Utterance]]:
    """Consecutive parts of about `seconds` each."""
    starts = np.cumsum([0.0, *(u.duration for u in utterances[:-1])])
    part = np.unique((starts // seconds).astype(int), return_inverse=True)[1]
    edges = np.searchsorted(part, np.arange(part[-1] + 2))
    return [list(utterances[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


def _check_plan(path: Path, shards: list[list[Utterance]]) -> None:
    key = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
    if path.exists() and path.read_text() != key:
        raise ValueError(
            f"{path.parent} holds this split already, made from other input or with other "
            "settings: remove it or choose another --output"
        )
    path.write_text(key)


def _summary_path(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.json")


def _write_shards(output: Path, jobs: dict[str, list[Utterance]], workers: int) -> None:
    if not jobs:
        return
    total = sum(len(shard) for shard in jobs.values())
    # Spawned, not forked: the caller may have threads.
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context) as pool,
        tqdm.tqdm(total=total, desc=f"writing {len(jobs)} shards", unit="utt") as progress,
    ):
        futures = {
            pool.submit(write_shard, output / name, shard): len(shard)
            for name, shard in jobs.items()
        }
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                progress.update(futures[future])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_shards_by_beam(output: Path, jobs: dict, options: Sequence[str]) -> None:
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ImportError("--beam needs Apache Beam: pip install apache-beam") from error
    # A retried or duplicated shard does no harm: it appears under its name once it is whole.
    with apache_beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        shards = pipeline | apache_beam.Create([(output / name, jobs[name]) for name in jobs])
        _ = shards | apache_beam.Reshuffle() | apache_beam.MapTuple(write_shard)


def write_shard(path: Path, utterances: Sequence[Utterance]) -> None:
    """Writes one shard, and then, as the sign that it is whole, the summary beside it."""
    from array_record.python.array_record_module import ArrayRecordWriter

    unfinished = path.with_name(f".{path.name}.unfinished")
    writer = ArrayRecordWriter(os.fspath(unfinished), "group_size:1")
    lines, refused, odd = [], [], []
    for utterance in utterances:
        try:
            sound = audio.listen(utterance)
        except BadAudio as error:
            refused.append(Problem(error.kind, utterance.where, error.reason))
            continue
        line = {key: getattr(utterance, key) for key in ("id", "text", "lang", "speaker")}
        line["duration"] = len(sound.samples) / audio.SAMPLE_RATE
        writer.write(records.encode(sound.samples, line))
        odd.append((utterance.where, sound.odd))
        lines.append(_index_line(utterance, line))
    writer.close()
    with open(unfinished, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    summary = {
        "sha256": checksum,
        "bytes": unfinished.stat().st_size,
        "lines": lines,
        "refused": refused,
        "odd": [(where, kinds) for where, kinds in odd if kinds],
    }
    unfinished.replace(path)
    unfinished = path.with_name(f".{path.name}.json.unfinished")
    unfinished.write_text(json.dumps(summary, ensure_ascii=False), encoding="utf-8")
    unfinished.replace(_summary_path(path))


def _index_line(utterance: Utterance, told: dict) -> dict:
    """What the index says of a record: what the record does, and its row's other columns."""
    line = told | dict(utterance.fields)
    if not utterance.text and ("text", "") not in utterance.fields:
        del line["text"]  # there and empty it would say that nothing is said
    return line | {k: x for k in ("task", "words") if (x := getattr(utterance, k))}


def _report(lines: list[dict], refused: list[Problem], odd: list, num_shards: int) -> dict:
    durations = np.array([line["duration"] for line in lines])
    hours = Counter()
    for line in lines:
        hours[line["lang"] or "unknown"] += line["duration"] / 3600
    return {
        "utterances": len(lines),
        "hours": round(float(durations.sum() / 3600), 4),
        "shards": num_shards,
        "hours_by_language": {lang: round(n, 4) for lang, n in sorted(hours.items())},
        "speakers": len({line["speaker"] for line in lines if line["speaker"]}),
        "seconds_at_percentile": {
            str(q): round(float(np.percentile(durations, q)), 2) for q in (0, 5, 50, 95, 100)
        }
        if lines
        else {},
        "characters": sum(len(line.get("text", "")) for line in lines),
        "refused": dict(Counter(problem.kind for problem in refused).most_common()),
        "odd": {kind: found for kind, found in audio.places(odd).items()},
    }


def _write_metadata(output: Path) -> None:
    """The TFDS description and the checksums of all splits in the folder."""
    splits, sums = {}, []
    for path in sorted(output.glob(f".{records.NAME}-*.array_record-*.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        name = path.name.removeprefix(".").removesuffix(".json")
        split = name.removeprefix(f"{records.NAME}-").rpartition(".array_record-")[0]
        splits.setdefault(split, []).append((len(summary["lines"]), summary["bytes"]))
        sums.append(f"{summary['sha256']}  {name}\n")
    records.write_metadata(output, splits)
    (output / "SHA256SUMS").write_text("".join(sums))


def define_flags(define) -> None:
    define.string("input", None, "Manifests separated by commas, or a corpus folder.")
    define.string("output", None, "Folder of the data set; made if missing.")
    layouts = ["manifest", *corpora.LAYOUTS]
    define.enum("layout", "manifest", layouts, "How the input is laid out.")
    define.string("split", "train", "Split of the corpus; in the output with _ for -.")
    define.bool("lower_case", False, "Transcripts in lower case, as the language has it.")
    define.float("max_duration", 30.0, "Seconds; longer audio is refused.", 0)
    define.float("shard_hours", 1.0, "Audio in a shard; an hour is 115 MB.", 0)
    define.string("machine", "0/1", "Which of how many machines this is.")
    define.string("beam", None, "Options of an Apache Beam pipeline to run as.")
    define.integer("workers", None, "Processes; by default one a core.", 1)


def _machine(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--machine={text} is not INDEX/COUNT, as in 0/4 … 3/4")
    return int(index), int(count)


def main(values, _) -> None:
    split = values.split.replace("-", "_")  # as TFDS names splits
    machine = _machine(values.machine)
    found = read_corpus(values.layout, values.input, values.split, values.lower_case)
    report = prepare(
        *found,
        values.output,
        split,
        max_duration=values.max_duration,
        shard_hours=values.shard_hours,
        workers=values.workers or os.cpu_count(),
        machine=machine,
        beam=None if values.beam is None else shlex.split(values.beam),
    )
    if report is None:
        print("this machine's shards are written; others are still missing")
        return
    print(json.dumps(report, indent=2))
    refused = sum(report["refused"].values())
    if refused:
        print(f"refused {refused} utterances: see {values.output}/refused-{split}.jsonl")


cli = functools.partial(command.run, main, define_flags, required=["input", "output"])

if __name__ == "__main__":
    sys.exit(cli())
