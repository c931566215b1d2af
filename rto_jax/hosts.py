"""Several processes: how they meet, how they end together, and how one that is lost ends the others.

`join` starts jax.distributed, and beside it a connection of every process with process 0. A process that ends in an
error says so on it; one that is killed breaks it. Either way all the others end at once, with one sentence and a
status that is not 0. JAX alone ends them too, but after its time-outs (100 s without heartbeat, 300 s where the lost
one left by itself), and with a stack trace that does not name the cause. A machine that vanishes without closing its
connections shows by TCP's keep-alive; JAX's heartbeats stay for a process that hangs.

Environment:
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID   host:port of process 0, how many there are, which this is
  RTO_DISTRIBUTED=1    ask the machine instead (TPU VMs); so do Slurm and Open MPI, without it
  RTO_START_TIMEOUT    seconds within which all processes must have started (300)
  RTO_LOST_TIMEOUT     seconds of silence after which a process is lost (100)
"""

import atexit
import contextlib
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from rto_jax.errors import UserError

_GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_watch: "_Watch | None" = None


def join() -> None:
    """Meet the other processes, if the environment says that there are any; a second call does nothing.

    Raises UserError where it says it incompletely. If they are not all here in time, ends the process with a sentence.
    """
    global _watch
    given = [os.environ.get(name, "") for name in _GIVEN]
    known = any(int(os.environ.get(name) or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    known = known or bool(os.environ.get("RTO_DISTRIBUTED"))
    if jax.distributed.is_initialized() or given[1] == "1" or not (known or any(given)):
        return
    start, lost = (_seconds(f"RTO_{name}_TIMEOUT", default) for name, default in (("START", 300), ("LOST", 100)))
    options = {"initialization_timeout": start + 60, "heartbeat_timeout_seconds": lost}  # ours comes first
    where, host = "each other", ""
    if given[1] or not known:
        address, count, index = _given(given)
        host = address.rpartition(":")[0]
        options |= {"coordinator_address": address, "num_processes": count, "process_id": index}
        options |= {"cluster_detection_method": "deactivate", "coordinator_bind_address": _bind(address)}
        where = f"process 0 at {address}"
        if index == 0:
            _check_free(address)

    late = f"not all processes reached {where} within {start} s (RTO_START_TIMEOUT): one did not start, or ended "
    late += "before it got here (see its output), or cannot be reached from this machine."
    timer = threading.Timer(start, _leave, (late,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:  # the machine does not know
        raise UserError(
            f"The environment speaks of several processes, but not which of them this is ({error}): start them with "
            f"srun, or set {', '.join(_GIVEN)}."
        ) from None
    finally:
        if not jax.distributed.is_initialized():
            timer.cancel()
    if jax.process_count() > 1:
        _watch = _Watch(jax.process_index(), jax.process_count(), host, lost)
        atexit.register(_watch.tell, "bye")
    timer.cancel()


def _leave(text: str) -> NoReturn:
    os.write(2, f"error: {text}\n".encode())
    os._exit(1)


def _given(values: list[str]) -> tuple[str, int, int]:
    address, count, index = values
    try:
        found = address, int(count), int(index)
        if re.fullmatch(r".+:\d+", address) and 0 <= found[2] < found[1]:
            return found
    except ValueError:
        pass
    said = ", ".join(f"{name}={value}" for name, value in zip(_GIVEN, values, strict=True))
    raise UserError(f"These must be host:port of process 0, how many processes there are, and which this is: {said}.")


def _seconds(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"{name} must be a number of seconds, not {value}.")
    return int(value)


def _check_free(address: str) -> None:
    """Raises UserError where JAX would end with a segmentation fault."""
    host, _, port = address.rpartition(":")
    try:
        _server(host, int(port)).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: process 0 cannot listen there ({error}).") from None


def _bind(address: str) -> str:
    """Where process 0 listens: on all interfaces, but for a loop-back address."""
    host, _, port = address.rpartition(":")
    return address if _is_loopback(host) else f"[::]:{port}"


def _server(host: str, port: int = 0) -> socket.socket:
    """Listens there in the same way."""
    if _is_loopback(host):
        return socket.create_server(("127.0.0.1", port), backlog=4096)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=4096, dualstack_ipv6=both)


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("rto_jax")


def check_shared(directory: Path, flag: str) -> None:
    """Raises UserError, on every process, unless all see the same directory. They all wait for each other here."""
    if jax.process_count() == 1:
        return
    number = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
    mark = directory / f".seen-by-all-{number:08x}"
    if jax.process_index() == 0:
        mark.touch()
    wait_for_all()
    seen = multihost_utils.process_allgather(np.bool_(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        raise UserError(
            f"{flag} {directory} is not the same directory for all processes (process {np.argmin(seen)} does not see "
            "what process 0 writes): it must be on a file system that they share."
        )


def stop(status: int, text: str, cause: str, error: Exception | None = None) -> NoReturn:
    """Ends this process with `text` on stderr and with `status`, and the others with the cause.

    With `error` the text is its traceback, unless a process turns out to be lost, which shows as all sorts of errors.
    """
    if _watch is None:
        if error:
            raise error
        print(text, file=sys.stderr)
        raise SystemExit(status)
    if error:
        time.sleep(3)
        text = "".join(traceback.format_exception(error)).rstrip()
    _watch.end(status, text, f"process {_watch.index} of {_watch.count} stopped: {cause}")


class _Watch:
    """A star of TCP connections around process 0; a line on one is "bye", or a status and a sentence."""

    def __init__(self, index: int, count: int, host: str, lost: int):
        """`host`: process 0's, as the user named it, if so; `lost`: seconds, as RTO_LOST_TIMEOUT."""
        self.index, self.count, self._lost = index, count, lost
        self._ending = threading.Lock()
        self._links: list[socket.socket] = []
        door = np.zeros(256, np.uint8)
        if index == 0:
            host = host or _own_address()
            server = _server(host)
            text = f"{host} {server.getsockname()[1]} {secrets.token_hex(8)}".encode()
            door[: len(text)] = np.frombuffer(text, np.uint8)
        host, port, token = bytes(multihost_utils.broadcast_one_to_all(door)).rstrip(b"\0").decode().split()
        if index:
            try:
                link = socket.create_connection((host.strip("[]"), int(port)))
            except OSError as error:
                _leave(f"process {index} of {count} cannot reach process 0 at {host}:{port} ({error}).")
            link.sendall(f"{token} {index}\n".encode())
            self._add(link, link.makefile("r", errors="replace"), 0)
            return
        while len(self._links) < count - 1:
            link, _ = server.accept()
            link.settimeout(10)
            lines = link.makefile("r", errors="replace")
            try:
                said, peer = lines.readline().split()
            except (OSError, ValueError):
                said = None
            if said == token:
                self._add(link, lines, int(peer))
            else:  # a stranger
                link.close()
        server.close()

    def _add(self, link: socket.socket, lines: TextIO, peer: int) -> None:
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Three quarters of the time, so that JAX's heartbeats come second.
        for name, value in (("IDLE", self._lost // 4), ("INTVL", self._lost // 8), ("CNT", 4)):
            if option := getattr(socket, f"TCP_KEEP{name}", None):
                link.setsockopt(socket.IPPROTO_TCP, option, max(1, value))
        self._links.append(link)
        threading.Thread(target=self._listen, args=(lines, peer), daemon=True).start()

    def _listen(self, lines: TextIO, peer: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in lines:
                if line == "bye\n":
                    return
                status, _, cause = line.rstrip("\n").partition(" ")
                self.end(int(status), f"error: {cause}", cause)
        cause = f"process {peer} of {self.count} was lost (killed, or its machine is gone); "
        cause += "--resume continues from the last checkpoint."
        self.end(1, f"error: {cause}", cause)

    def end(self, status: int, text: str, cause: str) -> NoReturn:
        self._ending.acquire()  # and never released: who comes second waits here for the end
        os.write(2, f"{text}\n".encode())
        self.tell(f"{status} {cause}")
        if self.index == 0:
            time.sleep(1)  # JAX ends the others without a sentence as soon as process 0 is gone
        os._exit(status)  # the ordinary exit would wait for processes that are no more

    def tell(self, line: str) -> None:
        for link in self._links:
            with contextlib.suppress(OSError):
                link.sendall(" ".join(line.split()).encode() + b"\n")


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.")


def _own_address() -> str:
    """This machine's address in its network. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()
