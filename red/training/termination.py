"""SIGTERM, as a scheduler or a cluster sends it before it takes a machine away: finish the step, save, stop."""

from __future__ import annotations

import contextlib
import signal
import threading

from transformers import TrainerCallback


class Termination(TrainerCallback):
    """Ends the training at the next step at which all ranks know of the signal.

    `requested` is this process' own; REDTrainer sums it over the ranks once per optimiser step, with what it sums there anyway, and sets `agreed`.
    A signal during an evaluation or a save is acted on one step later. Further signals are ignored: a launcher passes on what the system sent already.
    """

    def __init__(self):
        self.requested = self.agreed = False

    @contextlib.contextmanager
    def listening(self):
        """Catch SIGTERM inside; only where nobody else does, and in the main thread, where Python allows it."""
        self.requested = self.agreed = False
        ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if ours:
            signal.signal(signal.SIGTERM, self._request)
        try:
            yield
        finally:
            if ours:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _request(self, *_) -> None:
        self.requested = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed:
            control.should_save = control.should_training_stop = True
