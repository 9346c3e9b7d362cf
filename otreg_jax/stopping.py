"""Being told to stop: the signals that end a run after the step under way, with a save."""

import os
import signal
import threading

import jax
import tqdm
from jax.experimental import multihost_utils


class StopSignals:
    """Listens for what tells a run to stop: SIGTERM (preemption), SIGHUP (a closed terminal) and
    Ctrl-C, of which a second one ends the process at once.

    Several processes agree on the step to stop after, by jax, which listens for SIGTERM: the other
    signals are handed on to it as such. A signal that is ignored (nohup) stays so.
    """

    def __init__(self):
        self.received, self.before = [], {}
        self.is_alone = jax.process_count() == 1
        if threading.current_thread() is threading.main_thread():  # no other gets signals
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                is_handled = number == signal.SIGTERM and not self.is_alone
                if not is_handled and signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._receive)

    def _receive(self, number, _) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.write(2, b"\nstopping after this step, with a save; Ctrl-C again ends at once\n")
        self.received.append(number)
        if not self.is_alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def told_to_stop(self, step: int) -> bool:
        """Whether the run must stop after `step`."""
        if self.is_alone:
            stop = bool(self.received)
        else:
            stop = multihost_utils.reached_preemption_sync_point(step)
        if stop:
            tqdm.tqdm.write(f"told to stop: saving step {step + 1}; start again to resume")
        return stop

    def close(self) -> None:
        """Ends the listening. Raises KeyboardInterrupt for a Ctrl-C."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if signal.SIGINT in self.received:
            raise KeyboardInterrupt
