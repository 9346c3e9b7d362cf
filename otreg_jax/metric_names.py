"""The metrics of training: every name that a line of metrics.jsonl may have, its unit, its meaning.

python -m otreg_jax.metric_names > docs/metrics.md
"""

from typing import NamedTuple


class Metric(NamedTuple):
    """unit: "" for a count or a plain number. when: where not every line has it."""

    name: str
    unit: str
    meaning: str
    when: str = ""


EVALUATED, OTREG, CTC = "a line after an evaluation", "`otreg.weight` > 0", "`ctc.weight` > 0"
SPEED = "from the second line on: the first holds the compilation"
GROUPS = {
    "Where the run is": (
        Metric("step", "steps", "steps done"),
        Metric("time", "s", "Unix time"),
        Metric("elapsed", "s", "since the run first started, pauses included"),
        Metric("goodput", "fraction", "of `elapsed` that led to steps which were kept"),
    ),
    "Losses": (
        Metric("loss", "nats", "the sum that is minimized"),
        Metric("ce", "nats a token", "cross-entropy of the transcript", "`ce.weight` > 0"),
        Metric("token_accuracy", "fraction", "of transcript tokens predicted", "`ce.weight` > 0"),
        Metric("dev_ce", "nats a token", "`ce` on the dev set", EVALUATED),
        Metric("otreg", "cost", "⟨plan, cost⟩; for cosines from 0 to 2, averaged", OTREG),
        Metric("ctc", "nats a token", "CTC of the adapter's outputs", CTC),
        Metric("ctc_infeasible", "utterances", "too few positions for their tokens; left out", CTC),
        Metric("infonce", "nats", "the contrastive rival", "`infonce.weight` > 0"),
        Metric("kl", "nats a token", "to the LLM's own reading of the text", "`kl.weight` > 0"),
    ),
    "The transport plan": (
        Metric("marginal_error", "mass", "how far Sinkhorn is from converged (L1)", OTREG),
        Metric("entropy", "nats", "of the plan; small: sharp", OTREG),
        Metric("nearest_cosine", "cosine", "of each position to its nearest token, mean", OTREG),
        Metric("otreg_weight", "", "λ of the step", OTREG),
        Metric("position_weight", "", "γ of the step", OTREG),
    ),
    "The optimizer": (
        Metric("learning_rate", "", "of the step"),
        Metric("grad_norm", "", "global L2 norm of the gradient, before clipping"),
        Metric("skipped", "ids", "utterances of a step that was not finite", "a skipped step"),
    ),
    "Speed": (
        Metric("steps_per_sec", "1/s", "steps", SPEED),
        Metric("audio_sec_per_sec", "s/s", "audio without padding, all devices", SPEED),
        Metric("tokens_per_sec", "1/s", "transcript tokens, all devices", SPEED),
        Metric("flops_per_sec", "FLOP/s", "what the model needs, no recomputation", SPEED),
        Metric(
            "mfu", "fraction", "`flops_per_sec` of what the chips can do", "chips that are known"
        ),
    ),
}
TABLE = {metric.name: metric for group in GROUPS.values() for metric in group}


def as_markdown() -> str:
    """docs/metrics.md."""
    parts = ["# Metrics", INTRODUCTION]
    for title, metrics in GROUPS.items():
        rows = [f"| `{m.name}` | {m.unit} | {m.meaning} | {m.when} |" for m in metrics]
        head = ["| name | unit | meaning | only |", "| --- | --- | --- | --- |"]
        parts += [f"## {title}", "\n".join([*head, *rows])]
    return "\n\n".join(parts)


INTRODUCTION = """\
Made from otreg_jax/metric_names.py by `python -m otreg_jax.metric_names > docs/metrics.md`.

`WORKDIR/metrics.jsonl` has one JSON object a line, every `log_every` steps. A value is the mean
over these steps. A value that was not finite is null. What evaluation measures afterwards, error
rates above all, is in [evaluation](evaluation.md).

The setting `log_to` says where the same values go as well, for example
`--config.log_to=tensorboard,wandb`:

- `tensorboard` is the default. `tensorboard --logdir WORKDIR` shows it. In a bucket the events are
  written with each checkpoint.
- `wandb` is Weights & Biases: `pip install "otreg_jax[wandb]"`. The project is `otreg_jax`, or that
  of `WANDB_PROJECT`. With `WANDB_MODE=offline` all stays on this machine.
- `mlflow` is MLflow: `pip install "otreg_jax[mlflow]"`. The server is that of
  `MLFLOW_TRACKING_URI`, the experiment `otreg_jax` or that of `MLFLOW_EXPERIMENT_NAME`.

A run that is resumed goes on under the same id there (`WORKDIR/wandb-run.txt`, `mlflow-run.txt`).
A service that does not answer is one warning. It never stops a run."""


if __name__ == "__main__":
    print(as_markdown())
