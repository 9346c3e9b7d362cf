"""Evaluates a run: error rates, alignment figures and a report.

    python -m otreg_jax.evaluate --workdir=runs/quickstart
    python -m otreg_jax.evaluate --workdir=runs/mine --sets="calls=calls.jsonl,news=news.jsonl"
    python -m otreg_jax.evaluate --workdir=runs/otreg --compare=runs/ce --compare=runs/position

The sets are those of the run's configuration unless --sets names others. Writes DIR/eval/:
results.json, hypotheses.jsonl (a line an utterance), figures.npz and report.html.
"""

import functools
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from jax.experimental import multihost_utils

from otreg_jax import build, checkpoint, cluster, decoding, metrics, otreg, report, sharding
from otreg_jax import config as config_lib
from otreg_jax.data import pipeline, sets, sources
from otreg_jax.models import slm as slm_lib
from otreg_jax.models.layers import length_mask

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", checkpoint.NEWEST, "newest, best (the lowest dev loss) or a step."
)
_COMPARE = flags.DEFINE_multi_string("compare", [], "Directory of a run to compare; repeatable.")
_SETS = flags.DEFINE_string("sets", "", "name=manifest,...: instead of the configuration's sets.")
_IN_DOMAIN = flags.DEFINE_list("in_domain", ["dev"], "Names of the in-domain sets.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Utterances decoded at once.", 1)
_BEAM = flags.DEFINE_integer("beam_width", 1, "Hypotheses kept by beam search; 1: greedy.", 1)
_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "Exponent of the length in beam scores.")
_NGRAM = flags.DEFINE_integer("no_repeat_ngram", 0, "Forbid repeated n-grams; 0: allow them.", 0)

NUM_MEASURED = 32  # utterances of each set that the alignment figures are computed on
# The plan of the figures is the same for every run, however it was trained: similarity alone, no
# position prior, enough iterations to converge.
MEASURED_PLAN = dict(text_set="sequence", position_weight=0.0, epsilon=0.05, num_iters=200)

Sets = dict[str, list[sources.Utterance]]


class Sample(NamedTuple):
    """What the alignment figures need of one utterance; no padding."""

    id: str
    mel_FM: np.ndarray
    speech_SD: np.ndarray
    text_TD: np.ndarray
    ids_T: np.ndarray
    spoken_T2: np.ndarray  # start and end of each token's word, relative to the length; or NaN


def evaluate(
    workdir: str | os.PathLike,
    *,
    which: str = checkpoint.NEWEST,
    compare: Sequence[str | os.PathLike] = (),
    manifests: str = "",
    in_domain: Sequence[str] = ("dev",),
    batch_size: int = 32,
    beam_width: int = 1,
    length_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
) -> dict[str, Any]:
    """Evaluates a run directory, and others beside it, and writes `workdir`/eval.

    A compared run is evaluated on the same utterances; what its own eval directory holds is used
    where it comes from the same checkpoint, utterances and settings.

    Args:
      which: the checkpoint of every run: "newest", "best" or a step.
      manifests: "name=manifest,..."; "" for the sets of the run's configuration.
      in_domain: names of the sets that count as in-domain.
      others: see the flags.

    Returns:
      What results.json holds.

    Raises:
      FileNotFoundError, ValueError: no run, no checkpoint, no evaluation set.
    """
    run = build.load_run(workdir, which)
    with cluster.process_0_first():
        utterances, problems = load_sets(run.config, workdir, manifests)
    out = Path(workdir) / "eval"
    skipped_path = out / "skipped.jsonl"
    if jax.process_index() == 0:
        skipped_path.unlink(missing_ok=True)
        sources.record_skipped(problems, skipped_path)
    unknown = [name for name in in_domain if name not in utterances and list(in_domain) != ["dev"]]
    if unknown:
        raise ValueError(
            f"--in_domain: no set {', '.join(unknown)}; there are {', '.join(utterances)}"
        )
    longest = max(len(run.tokenizer.encode(u.text)) for us in utterances.values() for u in us)
    max_tokens = run.config.decode.max_tokens or 3 * longest // 2 + 8
    decode = decoding.Settings(max_tokens, beam_width, length_penalty, no_repeat_ngram)
    layer = run.config.otreg.layer
    settings = {
        "decode": decode._asdict(),
        "layer": layer,
        "in_domain": list(in_domain),
        "utterances": _fingerprint(utterances),
    }
    results, rows, figures = _evaluate_run(run, workdir, utterances, decode, settings, batch_size)

    runs = [_column(workdir, run.config, results, rows, figures)]
    results["compare"] = {}
    for other in compare:
        stored = _stored(other, settings, which)
        if stored is None:
            their_run = build.load_run(other, which)
            stored = _evaluate_run(their_run, other, utterances, decode, settings, batch_size)
        their_config = config_lib.load(Path(other) / "config.json")
        differences = compare_rows(rows, stored[1])
        results["compare"][str(other)] = differences
        runs.append(_column(other, their_config, *stored)._replace(differences=differences))

    if jax.process_index() == 0:
        _write_json(out / "results.json", results)
        notes = _notes(results, skipped_path)
        page = report.page(runs, versions=_versions(), notes=notes)
        (out / "report.html").write_text(page, encoding="utf-8")
    return results


def load_sets(config, workdir, manifests: str = "") -> tuple[Sets, list[sources.Problem]]:
    """The evaluation sets, and the lines of their manifests that cannot be used.

    An empty transcript is allowed: whatever is recognised there is inserted.
    """
    if manifests or not config.synthetic.num_train:
        paths = {"dev": config.data.dev} if config.data.dev else {}
        paths |= sets.named_manifests(config.data.test)
        if manifests:
            paths = sets.named_manifests(manifests)
        scans = {
            name: sources.scan(path, config.data.data_root, require_text=False)
            for name, path in paths.items()
        }
        utterances = {name: found for name, (found, _) in scans.items() if found}
        problems = [problem for _, bad in scans.values() for problem in bad]
    else:
        utterances = sets.load_synthetic(config, workdir)
        utterances.pop("train")
        problems = []
    longest = sets.max_seconds(config)
    for name, found in utterances.items():
        problems += [
            sources.Problem("too_long", u.where, f"{u.id} is {u.duration:.1f} s, over {longest:g}")
            for u in found
            if u.duration > longest
        ]
        utterances[name] = [u for u in found if u.duration <= longest]
    utterances = {name: found for name, found in utterances.items() if found}
    if not utterances:
        why = f": {sources.count(problems)}" if problems else ""
        raise ValueError(
            f"{workdir}: nothing to evaluate{why}; set data.dev or data.test when training, or "
            "give --sets=name=manifest.jsonl"
        )
    return utterances, problems


def _evaluate_run(run, workdir, utterances: Sets, decode, settings, batch_size):
    """Decodes and measures; writes hypotheses.jsonl, figures.npz and results.json.

    Returns (results, rows of hypotheses.jsonl, figures as report wants them).
    """
    out = Path(workdir) / "eval"
    with Partial(out / "partial.jsonl", settings | {"step": run.step}) as partial:
        rows, samples = decode_sets(
            run, utterances, decode, settings["layer"], batch_size, out / "skipped.jsonl",
            f"evaluating {workdir}", partial,
        )  # fmt: skip
    if not rows:
        raise ValueError(f"{workdir}: no utterance could be evaluated, see {out}/skipped.jsonl")
    results = {
        "workdir": str(workdir),
        "step": run.step,
        **settings,
        "sets": score_rows(rows, settings["in_domain"]),
        "versions": _versions(),
    }
    plans = []
    for name, found in measure(samples).items():
        results["sets"][name]["alignment"] = found["figures"]
        plans.append((name, found["example"], found["plan_ST"]))
    figures = _figures(plans, samples, run.tokenizer)
    if jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "hypotheses.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        np.savez_compressed(out / "figures.npz", **figures)
        _write_json(out / "results.json", results)
        (out / "partial.jsonl").unlink()
    return results, rows, figures


class Partial:
    """What an interrupted evaluation has decoded so far, kept in a JSON-lines file.

    The first line says of what; another checkpoint or other settings start afresh.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings

    def __enter__(self) -> "Partial":
        lines = from_process_0(self.path.read_text("utf-8") if self.path.exists() else "")
        lines = lines.splitlines()
        complete = [json.loads(line) for line in lines if line.endswith("}")]
        self.rows = complete[1:] if complete[:1] == [self.settings] else []
        self.file = open(os.devnull, "w")
        if jax.process_index() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "w", encoding="utf-8")
        self.add([self.settings, *self.rows])
        return self

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        self.file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.file.flush()

    def __exit__(self, *_) -> None:
        self.file.close()


# Decoding --------------------------------------------------------------------------------------


def decode_sets(
    run,
    utterances: Sets,
    settings: decoding.Settings,
    layer: int,
    batch_size: int,
    skipped_path: str | os.PathLike,
    label: str,
    partial: Partial,
) -> tuple[list[dict[str, Any]], dict[str, list[Sample]]]:
    """Decodes all sets in one pass over few batch shapes.

    Returns:
      rows: {"set", "id", "reference", "hypothesis", "errors", "words", "score", "lang"} in the
        order of the sets; utterances whose audio cannot be read are missing.
      samples: the first NUM_MEASURED utterances of each set.
    """
    everything = [(name, u) for name, found in utterances.items() for u in found]
    ends = np.cumsum([len(found) for found in utterances.values()])
    sampled = {
        i
        for end, found in zip(ends.tolist(), utterances.values(), strict=True)
        for i in range(end - len(found), end)[:NUM_MEASURED]
    }
    known = {(row["set"], row["id"]): row for row in partial.rows}
    rows = {i: known[name, u.id] for i, (name, u) in enumerate(everything) if (name, u.id) in known}
    pending = [i for i in range(len(everything)) if i not in rows or i in sampled]
    samples = {name: {} for name in utterances}
    selected = [everything[i][1] for i in pending]
    for batch in batches(run, selected, batch_size, label, skipped_path):
        decoded, compared = _recognize_and_embed(run.slm, run.params, batch, settings, layer)
        tokens_BN, length_B, score_B, index_B = to_host((*decoded, batch["index"]))
        # Negative: filler, or unreadable audio.
        found = [(b, pending[i]) for b, i in enumerate(index_B.tolist()) if i >= 0]
        if any(i in sampled for _, i in found):
            batch, compared = to_host((batch, compared))
        for b, i in found:
            name, utterance = everything[i]
            hypothesis = run.tokenizer.decode(tokens_BN[b, : length_B[b]].tolist()).strip()
            rows[i] = _row(name, utterance, hypothesis, float(score_B[b]))
            if i in sampled:
                samples[name][i] = _sample(utterance, run.tokenizer, batch, compared, b)
        partial.add([rows[i] for _, i in found])
    in_order = {
        name: [found[i] for i in sorted(found) if len(found[i].ids_T)]
        for name, found in samples.items()
    }
    return [rows[i] for i in sorted(rows)], in_order


def batches(
    run, utterances: Sequence[sources.Utterance], batch_size: int, label: str, skipped_path=None
) -> Iterator[dict[str, jax.Array]]:
    """The utterances as global batches on the run's mesh, under a progress bar named `label`.

    Audio that cannot be read is left out and listed in `skipped_path`.
    """
    data_config = run.config.data.copy_and_resolve_references()
    with data_config.unlocked():
        data_config.update(on_bad_audio="skip", max_tokens=0, features="host")
        # A batch shape must be worth its compilation.
        data_config.num_buckets = min(data_config.num_buckets, 1 + len(utterances) // 512)
    batch_size = -(-batch_size // jax.device_count()) * jax.device_count()
    host_index, host_count = cluster.batch_share(run.mesh)
    host_batches = pipeline.eval_batches(
        utterances, run.tokenizer, data_config, batch_size=batch_size,
        host_index=host_index, host_count=host_count,
        skipped_path=skipped_path and str(skipped_path),
    )  # fmt: skip
    total = -(-len(utterances) // batch_size)
    for host_batch in tqdm.tqdm(host_batches, desc=label, total=total, unit="batch"):
        yield sharding.to_global(host_batch, run.mesh)


@functools.partial(jax.jit, static_argnames=("slm", "settings", "layer"))
def _recognize_and_embed(slm, params, batch, settings, layer: int):
    """Hypotheses, and the embeddings that OTReg at `layer` compares; the encoder runs once."""
    out = slm_lib.forward(slm, params, batch, layer)
    decoded = decoding.recognize(slm, params, batch["mel"], batch["mel_length"], settings)
    return decoded, (out.speech_BSD, out.speech_length_B, out.text_BTD)


def to_host(tree):
    """Global arrays -> numpy, on every host."""
    return multihost_utils.process_allgather(tree, tiled=True)


def from_process_0(text: str) -> str:
    """The text that process 0 has, on every process: they must agree on what is left to do."""
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    if not size:
        return ""
    data = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes().decode()


def _row(name, utterance, hypothesis: str, score: float) -> dict[str, Any]:
    words, _ = metrics.normalized_counts([utterance.text], [hypothesis], [utterance.lang])
    return {
        "set": name, "id": utterance.id, "reference": utterance.text, "hypothesis": hypothesis,
        "errors": int(words.errors[0]), "words": int(words.lengths[0]),
        "score": score, "lang": utterance.lang,
    }  # fmt: skip


def _sample(utterance, tokenizer, batch, compared, b: int) -> Sample:
    speech_BSD, length_B, text_BTD = compared
    ids_T = batch["tokens"][b, : batch["token_length"][b]]
    return Sample(
        utterance.id,
        batch["mel"][b, : batch["mel_length"][b]],
        speech_BSD[b, : length_B[b]].astype(np.float32),
        text_BTD[b, : len(ids_T)].astype(np.float32),
        ids_T,
        spoken_times(utterance, word_index(tokenizer, ids_T.tolist())),
    )


def word_index(tokenizer, ids: Sequence[int]) -> list[int]:
    """Which word of the text (by whitespace) each token belongs to."""
    # The word in which the text up to here ends.
    return [max(len(tokenizer.decode(ids[: t + 1]).split()) - 1, 0) for t in range(len(ids))]


def spoken_times(utterance: sources.Utterance, index_T: Sequence[int]) -> np.ndarray:
    """[T, 2]: when each token's word begins and ends, relative to the utterance's length.

    NaN where the manifest does not time the words, or times other words than the transcript's.
    """
    # An entry may hold several words that were timed together.
    times = [(start, end) for word, start, end in utterance.words for _ in word.split()]
    if len(times) != len(utterance.text.split()) or max(index_T, default=0) >= len(times):
        return np.full((len(index_T), 2), np.nan, np.float32)
    return np.array([times[i] for i in index_T], np.float32).reshape(-1, 2) / utterance.duration


def score_rows(rows: Sequence[dict], in_domain: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`metrics.score` of every set, in the order of the rows."""
    scores = {}
    for name in dict.fromkeys(row["set"] for row in rows):
        mine = [row for row in rows if row["set"] == name]
        scores[name] = metrics.score(
            [row["reference"] for row in mine],
            [row["hypothesis"] for row in mine],
            [row["lang"] for row in mine],
        )
        scores[name]["in_domain"] = name in in_domain
    return scores


def compare_rows(ours: Sequence[dict], theirs: Sequence[dict]) -> dict[str, dict[str, Any]]:
    """`metrics.paired_difference` of every set over the utterances that both have."""
    key = lambda row: (row["set"], row["id"])
    others = {key(row): row for row in theirs}
    differences = {}
    for name in dict.fromkeys(row["set"] for row in ours):
        pairs = [
            (row, others[key(row)]) for row in ours if row["set"] == name and key(row) in others
        ]
        counts = [
            metrics.normalized_counts(
                [row["reference"] for row in side],
                [row["hypothesis"] for row in side],
                [row["lang"] for row in side],
            )[0]
            for side in zip(*pairs, strict=True)
        ]
        if counts:
            differences[name] = metrics.paired_difference(*counts)
    return differences


# Alignment -------------------------------------------------------------------------------------


def measure(samples: dict[str, list[Sample]]) -> dict[str, dict[str, Any]]:
    """Alignment figures of every set, on the plan MEASURED_PLAN, mean-centred by the set's text.

    Returns for each set `figures` (see docs/evaluation.md), and the `plan_ST` of the utterance
    `example`, the one of median transcript length.
    """
    everything = [sample for found in samples.values() for sample in found]
    if not everything:
        return {}
    num_speech = max(len(sample.speech_SD) for sample in everything)
    num_text = max(len(sample.ids_T) for sample in everything)
    measured = {}
    for name, found in samples.items():
        if not found:
            continue
        pad = lambda x, size: np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)])
        # One shape for all sets: one compilation.
        stack = lambda field, size, found=found, pad=pad: pad(
            np.stack([pad(getattr(sample, field), size) for sample in found]), NUM_MEASURED
        )
        lengths = [[len(s.speech_SD) for s in found], [len(s.ids_T) for s in found]]
        figures, plan_BST = alignment(
            stack("speech_SD", num_speech), stack("text_TD", num_text), stack("ids_T", num_text),
            stack("spoken_T2", num_text),
            *(pad(np.array(length, np.int32), NUM_MEASURED) for length in lengths),
        )  # fmt: skip
        example = int(np.argsort(lengths[1], kind="stable")[len(found) // 2])
        plan_ST = np.asarray(plan_BST[example, : lengths[0][example], : lengths[1][example]])
        measured[name] = {
            # A figure without its data (word times) is not a number, and left out.
            "figures": {k: float(v) for k, v in figures.items() if np.isfinite(v)},
            "example": found[example],
            "plan_ST": plan_ST,
        }
    return measured


@jax.jit
def alignment(speech_BSD, text_BTD, ids_BT, spoken_BT2, speech_length_B, text_length_B):
    """Alignment figures of a padded batch of utterances, and their transport plans [B, S, T].

    The definitions are in docs/evaluation.md. spoken_BT2: see `spoken_times`.
    """
    speech_mask_BS = length_mask(speech_length_B, speech_BSD.shape[1])
    text_mask_BT = length_mask(text_length_B, text_BTD.shape[1])
    center = otreg.text_centering(text_BTD, text_mask_BT, "mean")
    out = otreg.regularizer(
        speech_BSD, text_BTD, speech_mask_BS, text_mask_BT, center=center, **MEASURED_PLAN
    )
    plan_BST = out.plan
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)

    # Token retrieval: the barycentre of a token's speech looks for its nearest transcript token.
    speech = otreg.remove_common(speech_BSD, speech_mask_BS, center)
    text = otreg.remove_common(text_BTD, text_mask_BT, center)
    barycentre_ND = unit(jnp.einsum("bst,bsd->btd", plan_BST, speech)).reshape(-1, text.shape[-1])
    candidate_ND = unit(text).reshape(-1, text.shape[-1])
    valid_N, ids_N = text_mask_BT.reshape(-1), ids_BT.reshape(-1)
    similarity_NN = jnp.where(valid_N, barycentre_ND @ candidate_ND.T, -jnp.inf)
    retrieved_N = ids_N[similarity_NN.argmax(axis=1)] == ids_N
    num_tokens = jnp.maximum(valid_N.sum(), 1)

    # Monotonicity: correlation of s and t when (s, t) is drawn from the plan.
    mass_BST = plan_BST / jnp.maximum(plan_BST.sum(axis=(1, 2), keepdims=True), 1e-12)
    s_BS = jnp.where(speech_mask_BS, jnp.arange(speech_BSD.shape[1], dtype=jnp.float32), 0)
    t_BT = jnp.where(text_mask_BT, jnp.arange(text_BTD.shape[1], dtype=jnp.float32), 0)
    over_s, over_t = mass_BST.sum(axis=2), mass_BST.sum(axis=1)
    s_BS -= (over_s * s_BS).sum(axis=1, keepdims=True)
    t_BT -= (over_t * t_BT).sum(axis=1, keepdims=True)
    covariance_B = jnp.einsum("bst,bs,bt->b", mass_BST, s_BS, t_BT)
    variance_B = (over_s * s_BS**2).sum(axis=1) * (over_t * t_BT**2).sum(axis=1)
    defined_B = (speech_length_B > 1) & (text_length_B > 1)
    correlation_B = covariance_B / jnp.sqrt(jnp.maximum(variance_B, 1e-12))

    def mean_unit(x_BND, mask_BN):
        total_D = jnp.where(mask_BN[..., None], unit(x_BND), 0).sum(axis=(0, 1))
        return total_D / jnp.maximum(mask_BN.sum(), 1)

    # Mass on the word spoken at the time, by the plan and by tokens spread evenly over the time.
    time_BS = (jnp.arange(speech_BSD.shape[1]) + 0.5) / jnp.maximum(speech_length_B, 1)[:, None]
    start_BT, end_BT = spoken_BT2[..., 0], spoken_BT2[..., 1]
    heard_BST = (time_BS[..., None] >= start_BT[:, None]) & (time_BS[..., None] < end_BT[:, None])
    timed_B = (text_length_B > 0) & ~jnp.isnan(start_BT).any(axis=1, where=text_mask_BT)
    even_BS = (time_BS * text_length_B[:, None]).astype(jnp.int32)
    even_BST = (even_BS[..., None] == jnp.arange(text_BTD.shape[1])) & speech_mask_BS[..., None]
    even_BST = even_BST / jnp.maximum(speech_length_B, 1)[:, None, None]
    on_spoken = lambda plan: (
        jnp.sum(jnp.sum(plan * heard_BST, axis=(1, 2)), where=timed_B) / timed_B.sum()
    )

    gap_D = mean_unit(speech_BSD, speech_mask_BS) - mean_unit(text_BTD, text_mask_BT)
    figures = out.metrics | {
        "retrieval_accuracy": (retrieved_N & valid_N).sum() / num_tokens,
        "monotonicity": jnp.sum(correlation_B, where=defined_B) / jnp.maximum(defined_B.sum(), 1),
        "centroid_distance": jnp.linalg.norm(gap_D),
        "spoken_mass": on_spoken(mass_BST),
        "spoken_mass_even": on_spoken(even_BST),
    }
    return figures, plan_BST


# Files -----------------------------------------------------------------------------------------


def _figures(plans, samples, tokenizer) -> dict[str, np.ndarray]:
    """The arrays of figures.npz: plans of the first and the last set, points of the map."""
    arrays = {}
    for i, (name, sample, plan_ST) in enumerate(plans[:1] + plans[1:][-1:]):
        arrays |= {
            f"set{i}": np.array(name),
            f"id{i}": np.array(sample.id),
            f"mel{i}": sample.mel_FM.astype(np.float16),
            f"plan{i}": plan_ST,
            f"tokens{i}": np.array(tokenizer.tokens(sample.ids_T.tolist())),
        }
    first = next(iter(samples.values()), [])
    if first:
        arrays["speech"] = np.concatenate([s.speech_SD for s in first])[:600].astype(np.float16)
        arrays["text"] = np.concatenate([s.text_TD for s in first])[:300].astype(np.float16)
    return arrays


def _column(workdir, config, results, rows, figures) -> report.Run:
    plans = [
        report.Plan(
            str(figures[f"set{i}"]), str(figures[f"id{i}"]), len(figures[f"mel{i}"]) / 100,
            figures[f"mel{i}"].astype(np.float32), figures[f"plan{i}"], list(figures[f"tokens{i}"]),
        )
        for i in range(2)
        if f"id{i}" in figures
    ]  # fmt: skip
    curve_path = Path(workdir) / "metrics.jsonl"
    lines = curve_path.read_text().splitlines() if curve_path.exists() else []
    return report.Run(
        name=Path(workdir).name, sets=results["sets"], hypotheses=rows,
        curve=[json.loads(line) for line in lines], config=config_lib.flatten(config), plans=plans,
        speech_ND=figures.get("speech"), text_ND=figures.get("text"),
    )  # fmt: skip


def _stored(workdir, settings, which: str):
    """(results, rows, figures) of an earlier evaluation, if it answers the same question."""
    out = Path(workdir) / "eval"
    names = ("results.json", "hypotheses.jsonl", "figures.npz")
    if not all((out / name).exists() for name in names):
        return None
    results = json.loads((out / "results.json").read_text())
    steps = [int(p.name) for p in (Path(workdir) / "checkpoints").glob("[0-9]*") if p.is_dir()]
    if which != checkpoint.NEWEST:
        steps = [step for step in steps if str(step) == which]  # which is best, only loading tells
    asked = settings | {"step": max(steps, default=None)}
    if any(results.get(key) != value for key, value in asked.items()):
        return None
    lines = (out / "hypotheses.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    print(f"{workdir}: using its evaluation of step {results['step']}")
    return results, rows, dict(np.load(out / "figures.npz"))


def _fingerprint(utterances: Sets) -> str:
    asked = [(name, u.id, u.text, u.duration) for name, found in utterances.items() for u in found]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _notes(results, skipped_path) -> list[str]:
    notes = []
    if skipped_path.exists():
        problems = [json.loads(line) for line in skipped_path.read_text().splitlines()]
        shown = [f"Not evaluated: {p['where']}: {p['message']}" for p in problems]
        notes += shown[:8] + ([f"… and {len(shown) - 8} more"] if len(shown) > 8 else [])
    for name, row in results["sets"].items():
        if row["empty_references"]:
            notes.append(
                f"{name}: {row['empty_references']} references are empty, "
                f"{row['empty_answered']} of them were answered with words."
            )
    return notes


def _versions() -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} {device.device_kind}",
    }


def _write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """The scores as text, one line a set."""
    width = max(len(name) for name in results["sets"])
    lines = [f"{'set':{width}}  domain    n     WER  (95 %)          CER   raw WER"]
    for other in results["compare"]:
        lines[0] += f"   - {Path(other).name}"
    for name, row in results["sets"].items():
        low, high = row["interval"]
        line = (
            f"{name:{width}}  {'in ' if row['in_domain'] else 'out'} {row['n']:7d}  "
            f"{100 * row['wer']:6.1f}  ({100 * low:5.1f} … {100 * high:5.1f})  "
            f"{100 * row['cer']:5.1f}  {100 * row['wer_raw']:7.1f}"
        )
        for other, differences in results["compare"].items():
            if name in differences:
                text = f"{100 * differences[name]['difference']:+.1f}"
                line += f"  {text:>{3 + len(Path(other).name)}}"
        lines.append(line)
    return "\n".join(lines)


def main(argv):
    del argv
    with cluster.membership():
        results = evaluate(
            _WORKDIR.value, which=_CHECKPOINT.value, compare=_COMPARE.value, manifests=_SETS.value,
            in_domain=_IN_DOMAIN.value, batch_size=_BATCH_SIZE.value, beam_width=_BEAM.value,
            length_penalty=_PENALTY.value, no_repeat_ngram=_NGRAM.value,
        )  # fmt: skip
    if jax.process_index() == 0:
        print(table(results))
        print(f"report: {Path(_WORKDIR.value) / 'eval' / 'report.html'}")


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    config_lib.run(main)
