"""The engines of a server: they are loaded, looked after, and taken over from by new versions.

`Fleet` tells the core what has come and gone through `feed`; it decides nothing about requests. An engine that is lost
is loaded again, after a pause that doubles from one loss to the next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from gpuplan.errors import GpuplanError, RunError
from gpuplan.policy.vocabulary import Event, ReplicaDown, ReplicaUp, Swap, VersionAdded, VersionDropped
from gpuplan.scenario.deployment import VERSION_MARK, Deployment, Replica, place_of
from gpuplan.serve.engines import Engine

RESTART_S_MIN, RESTART_S_MAX = 0.1, 30.0
"""The pause before a lost engine is loaded again: it doubles each time, from the first to the second."""
CALM_S = 60.0
"""An engine that has lived so long starts with the shortest pause again."""
PROBE = ("The quick brown fox", "naïve café 東京 🙂", "x = {'a': [1, 2]}\n\n\treturn")
"""Two models whose tokens differ on these are not two versions of one."""


class Fleet:
    """Engines by replica, those that stand by among them. `serving` names those that take a model's new requests."""

    def __init__(self, deployment: Deployment, engines: Mapping[str, Engine], feed: Callable[[Event], object]) -> None:
        self.engines = dict(engines)
        self.serving = {name: [r.id for r in deployment.replicas_of(name)] for name in deployment.models}
        self._deployment = deployment
        self._replicas = {r.id: r for r in deployment.every_replica()}
        self._models = {r.id: r.model for r in deployment.every_replica()}
        self._feed = feed
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._leaving: dict[str, asyncio.Event] = {}  # those taken over from: set when nothing runs there any more
        self._retiring: dict[str, asyncio.Task[None]] = {}
        self._swapping: dict[str, asyncio.Event] = {}  # models, and the word that the swap is over
        self._stopping: set[asyncio.Task[None]] = set()
        self._versions = 1

    async def start(self) -> None:
        """Loads every engine, one after the other; a replica serves as soon as its own is warm."""
        for replica in self._deployment.replicas:
            await self.engines[replica.id].load()
            self._feed(ReplicaUp(replica.id))
            self._look_after(replica.id)

    async def close(self) -> None:
        """Frees them all."""
        tasks = [*self._keepers.values(), *self._retiring.values(), *self._stopping]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in self.engines.values():
            await engine.close()

    def engine_of(self, model: str) -> Engine:
        """An engine of the model, loaded or not: all of them count tokens alike."""
        serving = self.serving[model]
        return self.engines[serving[0] if serving else next(r for r in self.engines if self._model(r) == model)]

    def start_replica(self, replica_id: str) -> None:
        """Loads a replica that stands by. It is tried until it succeeds."""
        self._keepers[replica_id] = asyncio.get_running_loop().create_task(self._start_and_keep(replica_id))

    def stop_replica(self, replica_id: str) -> None:
        """Frees a replica on which nothing runs; it stands by."""
        self.serving[self._model(replica_id)].remove(replica_id)
        if keeper := self._keepers.pop(replica_id, None):
            keeper.cancel()
        task = asyncio.get_running_loop().create_task(self._stop(replica_id, self.engines[replica_id]))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    async def _start_and_keep(self, replica_id: str) -> None:
        model = self._model(replica_id)
        if self.engines[replica_id].provenance == "emulated":  # what it emulates would take so long
            await asyncio.sleep(self._deployment.autoscale.cold_start)
        while True:
            engine, _ = await self._load_until_up(replica_id, RESTART_S_MIN)
            while model in self._swapping:
                await self._swapping[model].wait()
            if engine is self.engines[replica_id]:
                break
            await engine.close()  # the swap has put another version in its place
        self.serving[model].append(replica_id)
        self._feed(ReplicaUp(replica_id))
        await self._keep(replica_id)

    async def _stop(self, replica_id: str, engine: Engine) -> None:
        await engine.close()
        self._feed(ReplicaDown(replica_id, "scaled down"))

    def _runs(self, replica_id: str) -> bool:
        """It serves, or ends what it has before it goes."""
        return replica_id in self.serving[self._model(replica_id)] or replica_id in self._leaving

    def _model(self, replica_id: str) -> str:
        return self._models[place_of(replica_id)]

    def nothing_runs_on(self, replica_id: str) -> None:
        """The core's word that a version which was taken over from may go."""
        self._leaving[replica_id].set()

    async def swap(
        self, model: str, make: Callable[[Replica], Engine], *, has_room: Callable[[str], bool], beside: bool = True
    ) -> None:
        """Puts new versions, one of `make` for each of the model's replicas, into the places of those that serve.

        `beside` loads them while the old ones serve on, which takes memory for both (`has_room` tells whether there is
        any in a replica's place); otherwise the old ones finish what they run and are unloaded first, and what comes
        meanwhile waits. When a new version cannot be loaded, the old ones go on serving. Raises RunError for that, for
        a place without memory, for another tokenizer, and while another swap of the model is under way.
        """
        if model in self._swapping:
            raise RunError(f"{model} is being swapped already")
        if not self.serving[model]:
            raise RunError(f"{model} has no replica now: there is nothing to swap")
        over = self._swapping[model] = asyncio.Event()
        try:
            old = tuple(self.serving[model])
            self._versions += 1
            places = [self._replicas[place_of(replica_id)] for replica_id in old]
            new = {f"{r.id}{VERSION_MARK}{self._versions}": make(r) for r in places}
            self._same_tokens(model, self.engines[old[0]], next(iter(new.values())))
            for replica_id in new:
                self._feed(VersionAdded(replica_id, place_of(replica_id), returns=not beside))
            try:
                await (self._load_beside(model, old, new, has_room) if beside else self._load_after(model, old, new))
            except BaseException:
                for replica_id, engine in new.items():
                    await engine.close()
                    self._feed(VersionDropped(replica_id))
                raise
            for replica_id in self.engines:  # those that stand by, or are being started, become the new version, too
                if self._model(replica_id) == model and not self._runs(replica_id):
                    self.engines[replica_id] = make(self._replicas[place_of(replica_id)])
        finally:
            del self._swapping[model]
            over.set()

    async def _load_beside(
        self, model: str, old: Sequence[str], new: Mapping[str, Engine], has_room: Callable[[str], bool]
    ) -> None:
        # A version of an earlier swap that still runs makes room by itself.
        places = {place_of(replica_id) for replica_id in old}
        retiring = [task for replica_id, task in self._retiring.items() if place_of(replica_id) in places]
        if retiring and not all(map(has_room, old)):
            await asyncio.wait(retiring)
        if not all(map(has_room, old)):
            raise RunError(f"no memory to load {model} beside the version that serves: let that one drain first")
        for engine in new.values():
            await engine.load()
        kept = dict(new)
        for replica_id, version_id in zip(old, new, strict=True):
            if replica_id not in self.serving[model]:  # it was scaled down meanwhile
                await kept.pop(version_id).close()
                self._feed(VersionDropped(version_id))
        self._take_over(model, [r for r in old if r in self.serving[model]], kept)

    async def _load_after(self, model: str, old: Sequence[str], new: Mapping[str, Engine]) -> None:
        for replica_id in old:
            self._leaving[replica_id] = asyncio.Event()
        self._feed(Swap(model, old=tuple(old)))
        for replica_id in old:
            await self._leaving[replica_id].wait()
            self._keepers.pop(replica_id).cancel()
            await self.engines[replica_id].close()
        try:
            for engine in new.values():
                await engine.load()
        except BaseException:
            for engine in new.values():
                await engine.close()
            for replica_id in old:
                await self.engines[replica_id].load()
                self._look_after(replica_id)
                del self._leaving[replica_id]
            self._feed(Swap(model, new=tuple(old)))
            raise
        self._take_over(model, old, new)

    def _take_over(self, model: str, old: Sequence[str], new: Mapping[str, Engine]) -> None:
        """From here on the new versions take what is not yet running; the old ones are freed when they are done."""
        self.engines.update(new)
        self.serving[model] = list(new)
        leaving = tuple(replica_id for replica_id in old if replica_id not in self._leaving)
        self._leaving.update({replica_id: asyncio.Event() for replica_id in leaving})
        self._feed(Swap(model, tuple(new), leaving))
        for replica_id in new:
            self._look_after(replica_id)
        for replica_id in old:
            self._retiring[replica_id] = asyncio.get_running_loop().create_task(self._retire(replica_id))

    async def _retire(self, replica_id: str) -> None:
        await self._leaving[replica_id].wait()
        if keeper := self._keepers.pop(replica_id, None):
            keeper.cancel()
        await self.engines[replica_id].close()
        self._feed(VersionDropped(replica_id))
        del self.engines[replica_id], self._leaving[replica_id], self._retiring[replica_id]

    def _same_tokens(self, model: str, old: Engine, new: Engine) -> None:
        """What waits has been tokenised for the old version."""
        if any(list(old.tokenize(text)) != list(new.tokenize(text)) for text in PROBE):
            raise RunError(f"the new version of {model} has another tokenizer: it is another model, not a version")

    def _look_after(self, replica_id: str) -> None:
        self._keepers[replica_id] = asyncio.get_running_loop().create_task(self._keep(replica_id))

    async def _keep(self, replica_id: str) -> None:
        """Loads an engine again whenever it is lost. Until its first try has failed, its requests wait for it."""
        engine, pause_s = self.engines[replica_id], RESTART_S_MIN
        while True:
            loaded_s = time.monotonic()
            why = await engine.gone()
            if replica_id in self._leaving:  # nobody needs it any more
                self._feed(ReplicaDown(replica_id, why))
                return
            self._feed(ReplicaDown(replica_id, why, returns=True))
            if time.monotonic() - loaded_s > CALM_S:
                pause_s = RESTART_S_MIN
            await asyncio.sleep(pause_s)
            _, pause_s = await self._load_until_up(replica_id, min(pause_s * 2, RESTART_S_MAX))
            self._feed(ReplicaUp(replica_id))

    async def _load_until_up(self, replica_id: str, pause_s: float) -> tuple[Engine, float]:
        """Tries until it is loaded; gives what is, and the pause that would have come next."""
        while True:
            engine = self.engines[replica_id]
            try:
                await engine.load()
                return engine, pause_s
            except GpuplanError as error:
                self._feed(ReplicaDown(replica_id, str(error)))
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, RESTART_S_MAX)
