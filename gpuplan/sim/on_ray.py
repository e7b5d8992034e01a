"""Simulations on a Ray cluster: the same bytes in and out as `processes`, sent by Ray.

Ray is an extra (`pip install 'gpuplan[ray]'`), imported only when it is asked for; gpuplan has to be installed on every
node. Ray carries calls in a serialisation of its own, so use a cluster that you trust; what is in them is msgpack.
"""

from __future__ import annotations

from typing import Any

from gpuplan.errors import InputError, RunError
from gpuplan.sim.candidate import answer


class Ray:
    """The cluster at an address (`auto` is one that this machine belongs to, `local` one of this machine's own)."""

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise InputError(
                "Ray is not installed", key="ray", value=address, allowed="pip install 'gpuplan[ray]', or no ray"
            ) from None
        self._ray = ray
        self._mine = not ray.is_initialized()
        if self._mine:
            try:
                ray.init(address=address, log_to_driver=False)
            except Exception as error:
                raise RunError(f"no Ray cluster at {address}: {error}") from None
        self._answer = ray.remote(max_retries=0)(answer)
        self._running: set[Any] = set()
        self.count = max(int(ray.cluster_resources().get("CPU", 1)), 1)

    def ask(self, name: str, work: bytes) -> bytes:
        """As `Processes.ask`."""
        task = self._answer.remote(work)
        self._running.add(task)
        try:
            answered: bytes = self._ray.get(task)
        except Exception as error:
            raise RunError(f"{name}: its simulation was lost: {error}") from None
        finally:
            self._running.discard(task)
        return answered

    def close(self) -> None:
        """Cancels what runs, and leaves a cluster that was joined here."""
        for task in list(self._running):
            self._ray.cancel(task, force=True)
        if self._mine:
            self._ray.shutdown()
