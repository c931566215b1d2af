"""SIGTERM, which a cluster sends some time before it takes the machine away: the run stops, saved, with status 0.

Between a run's first step and its last, the loop asks after every step and stops there. Anywhere else (reading data,
the first compilation, the evaluation at the end) all that can be saved is saved: a thread ends the process at once, for
a compilation would not let Python's own handler run. A second signal ends it at once anywhere. Several processes leave
it to JAX, whose service lets all stop after the same step whichever of them was told.
"""

import contextlib
import os
import shlex
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

EXIT_AT_ONCE = 128 + signal.SIGTERM


class Preemption:
    def __init__(self):
        self.command: list[str] = []  # what resumes the run
        self._lock = threading.Lock()
        self._asked = self._looping = False
        self._count = 0

    @contextlib.contextmanager
    def caught(self, command: list[str]) -> Iterator[None]:
        """Listens for the signal, in the main thread only."""
        self.command, self._asked, self._looping = command, False, False
        if jax.distributed.is_initialized() or threading.current_thread() is not threading.main_thread():
            yield
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        handler = signal.signal(signal.SIGTERM, lambda *_: None)
        before = signal.set_wakeup_fd(write)  # written to by C code, whatever Python is in the middle of
        watch = threading.Thread(target=self._watch, args=(read,), daemon=True)
        watch.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            signal.signal(signal.SIGTERM, handler)
            os.close(write)
            watch.join()
            os.close(read)

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; called after every one."""
        if jax.distributed.is_initialized():
            self._count += 1  # not `step`, which begins again with every stage of the quickstart
            return multihost_utils.reached_preemption_sync_point(self._count)
        with self._lock:
            self._looping = True
            return self._asked

    def left(self) -> None:
        """The loop is over, and asks no more."""
        with self._lock:
            self._looping = False
            if self._asked:
                self._exit(0)

    def line(self, where: str = "") -> str:
        """What the user is told."""
        return f"stopped by SIGTERM{where}; continue with: {shlex.join(self.command)}"

    def _watch(self, read: int) -> None:
        while numbers := os.read(read, 64):
            for _ in range(numbers.count(signal.SIGTERM)):
                with self._lock:
                    if self._asked or not self._looping:
                        self._exit(EXIT_AT_ONCE if self._asked else 0)
                    self._asked = True

    def _exit(self, status: int) -> None:
        os.write(2, f"{self.line()}\n".encode())
        os._exit(status)


PREEMPTION = Preemption()
