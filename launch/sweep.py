"""`otreg sweep`, where the launch scripts stand: python launch/sweep.py --help."""

import sys

from otreg_jax import sweep

if __name__ == "__main__":
    sys.exit(sweep.cli())
