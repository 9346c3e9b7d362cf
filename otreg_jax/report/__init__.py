"""One self-contained HTML page about one run, or several side by side."""

from otreg_jax.report.data import Plan, Run, arrays, column, notes
from otreg_jax.report.page import page

__all__ = ["Plan", "Run", "arrays", "column", "notes", "page"]
