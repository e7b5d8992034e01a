"""Replicas come and go: what the autoscaler wants, carried out on the slices that there are.

Every `interval` each model with a rule is looked at (`autoscaler.Autoscaler` decides how many replicas there should
be). More: those that were just asked to stop stay, then those that stand by are started, in order of the deployment
and each only where no other replica is. Fewer: the one with the least to do stops, but never the last that serves while
another starts; it finishes what it runs, and what waits for it waits for another. A request for a model that has been
scaled to zero starts one at once, if one could hold it, and waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpuplan.policy.autoscaler import Autoscaler, Observation
from gpuplan.policy.state import ModelState, ReplicaState, Sequence
from gpuplan.policy.vocabulary import Action, Scale, StartReplica, StopReplica
from gpuplan.scenario.deployment import CPU, Deployment


class Scaling:
    """The autoscalers of a deployment. `next_look_s` is when they look next, None where there is none."""

    def __init__(self, deployment: Deployment, models: Mapping[str, ModelState]) -> None:
        spec = deployment.autoscale
        self._models = models
        self._cold_start_s, self._interval_s = spec.cold_start, spec.interval
        self._scaled = {
            name: _Scaled(models[name], Autoscaler(rule, spec.cold_start)) for name, rule in spec.models.items()
        }
        self._may_be_none = {name for name, rule in spec.models.items() if rule.min_replicas == 0}
        self.next_look_s: float | None = 0.0 if self._scaled else None

    def may_be_none(self, model: str) -> bool:
        """Whether the model may be without a replica and serve all the same, after a cold start."""
        return model in self._may_be_none

    def arrived(self, s: Sequence) -> None:
        if self._scaled and (scaled := self._scaled.get(s.model.name)) is not None:
            scaled.arrived_work_s += s.work_s

    def left(self, s: Sequence) -> None:
        if self._scaled and (scaled := self._scaled.get(s.model.name)) is not None:
            scaled.served_work_s += s.work_s

    def asked_for(self, s: Sequence, now_s: float, actions: list[Action]) -> None:
        """A request has come: if nobody is there to take it, somebody who could is started."""
        model = s.model
        if model.name in self._may_be_none and not any(r.available for r in model.replicas):
            able = [r for r in self._startable(model) if r.could_hold(s)]
            if able:
                actions.append(Scale(model.name, 1, "a request, and no replica"))
                self._start(model, able[:1], now_s, actions)

    def look(self, now_s: float, actions: list[Action]) -> list[ReplicaState]:
        """Has the autoscalers look, if it is time; gives the replicas that are to stop."""
        if self.next_look_s is None or now_s < self.next_look_s:
            return []
        self.next_look_s = now_s + self._interval_s
        stopping: list[ReplicaState] = []
        for scaled in self._scaled.values():
            model = scaled.model
            if any(r.phase == "version" or (r.retiring and r.phase != "stopping") for r in model.replicas):
                continue  # its replicas are being swapped
            startable = self._startable(model)
            seen = scaled.observed(len(startable))
            wanted = scaled.autoscaler.look(seen, now_s=now_s)
            more = wanted.replicas - seen.ready - seen.starting
            start, stop = startable[: max(more, 0)], self._stoppable(model)[: max(-more, 0)]
            if start or stop:
                actions.append(Scale(model.name, wanted.replicas, wanted.reason))
            self._start(model, start, now_s, actions)
            self._stop(model, stop)
            stopping += stop
        return stopping

    def stopped(self, replica: ReplicaState) -> StopReplica | None:
        """The action for a replica on which nothing runs any more, if it was told to stop."""
        return StopReplica(replica.replica_id) if replica.phase == "stopping" else None

    def gone(self, replica: ReplicaState) -> None:
        """A replica is down: one that was told to stop, and had nothing left, stands by again."""
        if replica.phase == "stopping" and replica.unloaded:
            replica.phase = "standby"
            replica.retiring = replica.unloaded = False

    def _start(self, model: ModelState, replicas: list[ReplicaState], now_s: float, actions: list[Action]) -> None:
        for replica in replicas:
            if replica.phase == "stopping":
                replica.phase, replica.retiring = "serving", False
                model.retiring -= 1
            else:
                replica.phase, replica.returning = "starting", True
                replica.ready_s = now_s + self._cold_start_s
                actions.append(StartReplica(replica.replica_id))

    def _stop(self, model: ModelState, replicas: list[ReplicaState]) -> None:
        for replica in replicas:
            replica.phase, replica.retiring = "stopping", True
            model.retiring += 1

    def _startable(self, model: ModelState) -> list[ReplicaState]:
        """Replicas that were told to stop and still run something, then those that stand by on slices of which nobody
        else has any."""
        taken = {r.spec.slice.id for m in self._models.values() for r in m.replicas if r.phase != "standby"} - {CPU}
        startable = [r for r in model.replicas if r.phase == "stopping" and not r.unloaded]
        for replica in model.replicas:
            if replica.phase == "standby" and replica.spec.slice.id not in taken:
                taken |= {replica.spec.slice.id} - {CPU}
                startable.append(replica)
        return startable

    def _stoppable(self, model: ModelState) -> list[ReplicaState]:
        """Replicas in the order in which they would be stopped. What starts cannot be, and may yet fail to: until it is
        up, the last of the others serves."""
        serving = [r for r in model.replicas if r.phase == "serving" and not r.retiring]
        serving.sort(key=lambda r: (r.up, r.running + len(r.line), -r.order))
        starting = any(r.phase == "starting" for r in model.replicas)
        return serving[:-1] if starting else serving


class _Scaled:
    """One model's autoscaler, and the work that has come and gone since it last looked."""

    def __init__(self, model: ModelState, autoscaler: Autoscaler) -> None:
        self.model, self.autoscaler = model, autoscaler
        self.arrived_work_s = self.served_work_s = 0.0

    def observed(self, free_slices: int) -> Observation:
        there = [r for r in self.model.replicas if r.phase in ("serving", "starting") and not r.retiring]
        ready = [r for r in there if r.up]
        kv_tokens = sum(r.kv_tokens_max or 0 for r in ready)
        seen = Observation(
            ready=len(ready),
            starting=len(there) - len(ready),
            waiting=self.model.waiting,
            in_flight=self.model.waiting + sum(r.running for r in self.model.replicas),
            kv_utilization=sum(r.kv_reserved for r in ready) / kv_tokens if kv_tokens else 0.0,
            arrived_work_s=self.arrived_work_s,
            served_work_s=self.served_work_s,
            free_slices=free_slices,
        )
        self.arrived_work_s = self.served_work_s = 0.0
        return seen
