"""Mutated inputs of every kind, and how often each ended how.

python tests/fuzz/run.py                     # 4,000 inputs, an hour
python tests/fuzz/run.py --share=0.02        # a minute
python tests/fuzz/run.py --only=manifests --seed=1234 --share=0.0005   # one input again
"""

import argparse
import sys
import tempfile

import harness

NUMBERS = {
    "manifests": 2000,
    "audio_files": 1000,
    "model_directories": 500,
    "configurations": 300,
    "run_directories": 200,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the number of inputs")
    parser.add_argument("--seed", type=int, default=0, help="of the first input of every kind")
    parser.add_argument("--only", default=",".join(NUMBERS), help="kinds, separated by commas")
    given = parser.parse_args()
    if unknown := set(given.only.split(",")) - set(NUMBERS):
        parser.error(f"no such kinds: {', '.join(sorted(unknown))}; there are {', '.join(NUMBERS)}")
    kinds = {kind: max(1, round(NUMBERS[kind] * given.share)) for kind in given.only.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        counts, failures = harness.run(kinds, folder, given.seed)
    for failure in failures:
        print(f"\n{failure.how}: {failure.kind}, seed {failure.seed}\n{failure.details}")
    print(harness.table(counts))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
