"""How long a step takes, for a simulation: a roofline, corrected by what was measured where something was.

`ServiceTimes.timer(replica)` gives a function from a step's load to seconds. Four bases, named in every plan:
`fitted` (measured on this very slice), `measured elsewhere` (by a table that the scenario names), `scaled` (measured on
another slice of the same model and card, carried over by the roofline's ratio, or by the slices' speeds), `roofline`
(nothing was measured). A model without a shape, or on a CPU, has no roofline: it has to be measured first.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from gpuplan.errors import RunError
from gpuplan.hardware import mig, slices
from gpuplan.hardware.engines import TIMES
from gpuplan.hardware.roofline import StepCosts, StepLoad, band
from gpuplan.policy.cost import step_costs
from gpuplan.scenario.deployment import CPU, Deployment, Replica, shape_of

Basis = Literal["fitted", "measured elsewhere", "scaled", "roofline"]
WHOLE_SLICES = 0
"""In place of a number of GPU slices: an uncut card."""
Timer = Callable[[StepLoad], float]


@dataclass(frozen=True, slots=True)
class Fit:
    """`seconds = fixed_s + roofline_factor * roofline + per_token_s * prefill tokens + per_sample_s * samples`.

    No coefficient is negative, so time never falls as work grows. `ratios` are measured / fitted at evenly spaced
    ranks: the spread a simulation draws from. `error` is the mean absolute error, as a share of the fitted time.
    """

    fixed_s: float
    roofline_factor: float
    per_token_s: float
    per_sample_s: float
    ratios: tuple[float, ...]
    steps: int
    error: float

    def seconds(self, load: StepLoad, roofline_s: float) -> float:
        return (
            self.fixed_s
            + self.roofline_factor * roofline_s
            + self.per_token_s * load.prefill_tokens
            + self.per_sample_s * load.samples
        )


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of a step by batch size, rising, measured elsewhere."""

    batch_sizes: tuple[int, ...]
    step_s: tuple[float, ...]

    def seconds(self, load: StepLoad) -> float:
        """On straight lines through the points: level before the first, beyond the last as from the last two."""
        sizes, times, size = self.batch_sizes, self.step_s, load.samples
        if size <= sizes[0]:
            return times[0]
        if len(sizes) == 1:
            return times[0] * size / sizes[0]
        i = min(bisect.bisect_left(sizes, size), len(sizes) - 1)
        slope = (times[i] - times[i - 1]) / (sizes[i] - sizes[i - 1])
        return times[i - 1] + slope * (size - sizes[i - 1])


@dataclass(frozen=True, slots=True)
class ServiceTimes:
    """`fits` by (model, slice name); `measured` by (model, number of GPU slices, processes on the slice), for models of
    one step a request. `uplink_s` and `downlink_s` are what passes between client and core outside the
    steps (network, parsing, waking up): values at evenly spaced ranks, to draw from."""

    fits: Mapping[tuple[str, str], Fit]
    uplink_s: tuple[float, ...] = (0.0,)
    downlink_s: tuple[float, ...] = (0.0,)
    measured: Mapping[tuple[str, int, int], Curve] = field(default_factory=dict)

    def basis(self, replica: Replica) -> Basis:
        """What the times of this replica rest on."""
        if (replica.model, replica.slice.name) in self.fits:
            return "fitted"
        if self._curve(replica) is not None:
            return "measured elsewhere"
        on_gpu = any(model == replica.model and name != CPU for model, name in self.fits)
        return "scaled" if on_gpu and replica.slice.profile else "roofline"

    def uplinks_s(self, deployment: Deployment) -> tuple[float, ...]:
        """`uplink_s` where it was measured; elsewhere what the deployment's engine takes for a request."""
        return self.uplink_s if any(self.uplink_s) else (TIMES[deployment.engine.name].request_s,)

    def notes(self, deployment: Deployment) -> list[str]:
        """How far step times are to be trusted that were not measured on their slice."""
        found = {}
        for replica in deployment.replicas:
            card, part = deployment.gpu, replica.slice.profile
            basis = self.basis(replica)
            if basis == "measured elsewhere":
                found[replica.model] = f"{replica.model}: step times of a table that was measured elsewhere"
            elif card is not None and part is not None and basis != "fitted":
                about = f"{replica.model} on {part.name}"
                model = shape_of(deployment.models[replica.model])
                found[about] = f"{about}: emulated steps: {band(card, part, model).of_steps}"
        return list(found.values())

    def timer(self, deployment: Deployment, replica: Replica) -> Timer:
        """Mean seconds of a step on this replica.

        Raises RunError for a replica that was not measured and has no roofline, or is an ONNX file: how near that
        runs to its shape's roofline nobody knows.
        """
        curve = self._curve(replica)
        if curve is not None and (replica.model, replica.slice.name) not in self.fits:
            return curve.seconds
        costs = step_costs(deployment, replica)
        fit = self._fit(deployment, replica, costs)
        if fit is None and (costs is None or deployment.models[replica.model].onnx is not None):
            raise RunError(
                f"no service times for {replica.model} on {replica.slice.name}: measure it first "
                "(gpuplan bench), then simulate or plan from that run"
            )
        base = costs.step_s if costs else _nothing
        return base if fit is None else _fitted(fit, base)

    def ratios(self, deployment: Deployment, replica: Replica) -> tuple[float, ...]:
        """How the steps on this replica are spread around their mean; empty where nothing was measured."""
        if self.basis(replica) == "measured elsewhere":
            return ()
        fit = self._fit(deployment, replica, step_costs(deployment, replica))
        return fit.ratios if fit is not None else ()

    def _curve(self, replica: Replica) -> Curve | None:
        part = replica.slice.profile
        if part is None or replica.role == "decoder":
            return None
        return self.measured.get((replica.model, part.slices, replica.processes))

    def _fit(self, deployment: Deployment, replica: Replica, costs: StepCosts | None) -> Fit | None:
        return self.fits.get((replica.model, replica.slice.name)) or self._neighbour(deployment, replica, costs)

    def _neighbour(self, deployment: Deployment, replica: Replica, costs: StepCosts | None) -> Fit | None:
        """The fit of the same model on another slice of a GPU: the one with most steps behind it. What grows with the
        work is carried over by the roofline, or, for a model without one, by the speed of the slices."""
        card, here = deployment.gpu, replica.slice.profile
        others = [key for key in sorted(self.fits) if key[0] == replica.model and key[1] != CPU]
        if card is None or here is None or not others:
            return None
        best = max(others, key=lambda key: self.fits[key].steps)
        fit = self.fits[best]
        if costs is not None:
            return fit
        there = mig.part(card, best[1])
        slower = slices.speed(card, there) / slices.speed(card, here)
        return replace(fit, per_token_s=fit.per_token_s * slower, per_sample_s=fit.per_sample_s * slower)


def _fitted(fit: Fit, base: Timer) -> Timer:
    return lambda load: fit.seconds(load, base(load))


def _nothing(load: StepLoad) -> float:
    return 0.0
