"""Paths that a user writes: local ones, file://, and buckets that answer."""

import logging
import os
import threading
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

from etils import epath

SCHEMES = ("gs",)  # that are read where they are
PATIENCE = 10  # seconds that a bucket has to answer


def localize(path: str) -> str:
    """The path, file:// taken off.

    Raises:
      ValueError: it is of a scheme that cannot be read here.
    """
    scheme, found, _ = path.partition("://")
    if not found or scheme.lower() in SCHEMES:
        return path
    if scheme.lower() == "file":
        url = urllib.parse.urlsplit(path)
        if url.netloc in ("", "localhost"):
            return urllib.parse.unquote(url.path)
        raise ValueError(f"{path}: a file:// path starts with three slashes: file:///data/a.wav")
    raise ValueError(f"{path}: {scheme}:// is not read: fetch the files, or put them on gs://")


def check(paths: Iterable[str], what: str) -> None:
    """Raises OSError if a bucket that one of the paths lies in does not answer. Each is asked once.

    Left to itself, a client without credentials or network tries again for minutes.
    """
    buckets = {}
    for path in paths:
        if "://" in path:
            buckets.setdefault("/".join(path.split("/", 3)[:3]), path)
    for bucket, path in buckets.items():
        reason = _no_answer(path)
        if reason:
            raise OSError(f"{bucket} cannot be read ({reason}); {what}")


def _no_answer(path: str) -> str:
    """Why the bucket that holds this path does not say whether it is there; "" if it does."""
    # The client's own log would tell of every attempt, with a trace.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)
    outcome = []

    def ask() -> None:
        try:
            epath.Path(path).exists()
            outcome.append("")
        except Exception as error:  # of whatever client is installed
            outcome.append(f"{type(error).__name__}: {error}".partition("\n")[0][:200])

    # A daemon, since a client that waits cannot be stopped, and must not keep the process alive.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if outcome:
        return outcome[0]
    hint = "" if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") else ", credentials missing?"
    return f"no answer within {PATIENCE} s: no network{hint}"


def user_cache() -> Path:
    """Where what can be made again is kept on this machine's disk."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "otreg_jax"
