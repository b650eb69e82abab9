"""A Ray cluster: join one, or say in one sentence why that cannot be. The one module that starts Ray."""

import os
import signal
import socket
import warnings
from contextlib import suppress
from typing import Any

from rapidindex.errors import ResourceError, UsageError

_SECONDS_TO_CONNECT = 5.0
_STORE_BYTES = 80 * 2**20
"""The object store of a cluster that is started here: just above Ray's minimum, since containers often have 64 MB of
/dev/shm. What does not fit, as the map of a large model, lies in a file that all actors map."""
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_worker_niceness": "0",
}
"""What is set where the user has not: no statistics, notices and merged logs, and actors with the priority of other
processes. Ray's own, nice 15, leaves them next to nothing on a machine that does anything else."""


def import_ray() -> Any:
    """Return the module. UsageError where Ray is not installed."""
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
    except ImportError:
        raise UsageError("--ray needs Ray, which is not installed.", hint="pip install 'rapidindex[ray]'") from None
    return ray


def connect(address: str) -> bool:
    """Join the Ray cluster at HOST:PORT, the one that this machine has joined (`auto`), or start one (`local`).

    It ends with the process, or by `ray.shutdown`. Return whether there was none before. UsageError where Ray
    is not installed or `address` is none, ResourceError where there is no such cluster.
    """
    ray = import_ray()
    if ray.is_initialized():
        return False
    _refuse_unreachable(address)
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False, "namespace": "rapidindex"}
    where = {"address": address}
    if address == "local":
        where |= {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    terminate = signal.getsignal(signal.SIGTERM)  # Ray would exit without an end to what is under way
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(**where, **quiet)
        ray._private.worker._worker_logs_enabled = False  # Ray prints deaths of actors to stdout, where results go
    except (ConnectionError, OSError, RuntimeError, ValueError, AssertionError) as error:
        raise _no_cluster(address, str(error).strip().partition("\n")[0].partition(". ")[0]) from error
    finally:
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, terminate)
    return True


def _refuse_unreachable(address: str) -> None:
    """Raise UsageError where `address` is none, and ResourceError where nobody answers there within seconds."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise UsageError(
            f"--ray {address} is no address.", hint="Give HOST:PORT as `ray start --head` prints it, auto, or local."
        )
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, getattr(error, "strerror", None) or str(error)) from error


def _no_cluster(address: str, why: str) -> ResourceError:
    place = "on this machine" if address == "auto" else f"at {address}"
    return ResourceError(
        f"There is no Ray cluster {place} that this machine has joined: {why.rstrip('.')}.",
        hint="Type `ray start --head` on one machine and `ray start --address=HOST:6379` on the others.",
    )
