"""What the study asks: arms, worlds and seeds; and where its results are."""

import json
import runpy
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
RECIPE = runpy.run_path(str(ROOT / "configs" / "study.py"))
RESULTS = ROOT / "benchmarks" / "results" / "study.jsonl"
COURSE_RESULTS = RESULTS.with_name("study_courses.jsonl")

# Kinds of shift, and the test sets of each.
SHIFTS = {
    "in-domain": ("dev",),
    "other sound": ("voices", "unheard", "fast", "reverb", "noise", "silence"),
    "new text": ("domain", "domain_voices"),
}
LANGUAGES = {"English (trained on)": ("dev",), "German": ("de",), "Dutch": ("nl",)}


class Question(NamedTuple):
    """Arms compared in one world over the same seeds."""

    title: str
    world: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    shifts: dict[str, tuple[str, ...]] = SHIFTS

    def runs(self) -> list[str]:
        return [f"{self.world},{arm},{seed}" for seed in self.seeds for arm in self.arms]


FRESH = (1, 2, 3, 4, 5)  # no screening run had these
# In the order they are run.
QUESTIONS = (
    Question(
        "Trimmed speech, frozen LLM",
        "trimmed",
        (
            "ce",
            "ctc",
            "layer1_prior",
            "position1",
            "layer1_prior_ctc",
            "paper",
            "position0",
            "layer1_faint_ctc",
        ),
        FRESH,
    ),
    Question(
        "Untrimmed speech, frozen LLM",
        "untrimmed",
        ("ce", "ctc", "layer1_relaxed_ctc", "position1_ctc", "layer1_relaxed_faint_ctc"),
        FRESH,
    ),
    Question(
        "Screening: every arm, other voices and texts",
        "trimmed+screen",
        tuple(RECIPE["ARMS"]),
        (101, 102),
    ),
    Question(
        "Trimmed speech, LoRA",
        "trimmed+lora",
        ("ce", "layer1_prior", "position1", "ctc", "layer1_prior_ctc"),
        FRESH,
    ),
    Question(
        "Trimmed speech, the encoder learns at a tenth of the rate",
        "trimmed+tuned",
        ("ce", "layer1_prior", "position1", "ctc", "layer1_prior_ctc"),
        FRESH,
    ),
    Question(
        "Human speech, frozen LLM: characters wrong",
        "human",
        ("untrained", "ce", "ctc", "layer1_prior", "position1", "layer1_prior_ctc"),
        FRESH[:3],
        LANGUAGES,
    ),
)
# Arms whose plans are watched from step 0 to the end, every so many steps.
COURSES = (
    Question(
        "Trimmed speech",
        "trimmed",
        ("ce", "ctc", "paper", "position1", "layer1_prior", "layer1_prior_ctc"),
        FRESH[:3],
    ),
    Question(
        "Untrimmed speech",
        "untrimmed",
        ("ce", "ctc", "position1_ctc", "layer1_relaxed_ctc"),
        FRESH[:3],
    ),
)
COURSE_EVERY = 50


def read_results(path: Path = RESULTS) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
