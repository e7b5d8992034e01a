"""What a request costs, in seconds on a given replica.

A `Pace` knows how long steps take there: a straight line through the roofline (so much for the step itself, for a
prompt's token, for a sequence that decodes, for a token of context), times `drift`, the ratio of the measured to the
expected seconds of late. A model without a roofline (on the CPU) has a line through guesses, which only say how a
step's time divides among its parts; then the drift is what measures, and until a step has run nothing is known.

`Outputs` learns how much of what they may generate the requests of a class really do.
"""

from __future__ import annotations

from functools import lru_cache

from gpuplan.hardware.catalog import Gpu
from gpuplan.hardware.engines import EngineName, step_overhead_s
from gpuplan.hardware.profiles import Profile
from gpuplan.hardware.roofline import StepCosts, StepLoad
from gpuplan.hardware.shapes import ModelShape
from gpuplan.scenario.deployment import Deployment, Replica, shape_of

DECAY = 0.95
"""A step's weight in the drift falls by so much with each that follows: about twenty of them count."""
PRIOR_STEPS = 5.0
"""What the roofline said counts as much as so many steps."""
OUTLIER = 3.0
"""A step counts at most as so many times what was expected of it: a hiccup of the host is no change of pace, and a real
change shows in the next steps too."""


class StepLine:
    """Seconds of a step: fixed, and for each prompt token, each decoding sequence, and each token of their context."""

    __slots__ = ("context_token", "decode", "fixed", "prompt_token")

    def __init__(self, fixed: float, prompt_token: float, decode: float, context_token: float) -> None:
        self.fixed = fixed
        self.prompt_token = prompt_token
        self.decode = decode
        self.context_token = context_token


GUESS = StepLine(8.0, 1.0, 4.0, 0.0)
"""Not seconds but parts of a step, where nothing better is known: reading the weights once costs what eight prompt
tokens do, and a decoded token, alone in its row of the attention, what four do."""


class Pace:
    """How fast one replica is. `known`: by a roofline, or by a step that has run."""

    __slots__ = ("_expected_s", "_line", "_measured_s", "by_roofline", "drift", "known")

    def __init__(self, line: StepLine | None) -> None:
        self._line = line or GUESS
        self.by_roofline = line is not None
        self.forget()

    def forget(self) -> None:
        """Back to what was known before any step ran."""
        self.known = self.by_roofline
        self._expected_s = self._measured_s = PRIOR_STEPS * self._line.fixed if self.by_roofline else 0.0
        self.drift = 1.0 if self.by_roofline else 0.0

    def step_s(self, load: StepLoad) -> float:
        """Seconds that a step should take."""
        return self.drift * self.undrifted_s(load)

    def decode_step_s(self, sequences: int, context_tokens: int) -> float:
        """Seconds of a step in which so many sequences get a token."""
        line = self._line
        return self.drift * (line.fixed + line.decode * sequences + line.context_token * context_tokens)

    def prompt_s(self, tokens: float) -> float:
        """Seconds that so many prompt tokens add to steps."""
        return self.drift * self._line.prompt_token * tokens

    def alone_s(self, prompt_tokens: int) -> float:
        """Seconds of a step that reads this prompt and nothing else."""
        return self.drift * (self._line.fixed + self._line.prompt_token * prompt_tokens)

    def work_s(self, prompt_tokens: int, output_tokens: float, batch: float) -> float:
        """Seconds of the replica that a request takes for itself, in company of `batch` sequences a step: these share
        the fixed part."""
        line = self._line
        steps = max(output_tokens, 1.0)
        context = line.context_token * (prompt_tokens + output_tokens / 2)
        decoding = output_tokens * (line.decode + context)
        return self.drift * (line.fixed * steps / batch + line.prompt_token * prompt_tokens + decoding)

    def ran(self, load: StepLoad, seconds: float, steps: int = 1) -> float:
        """A step, or each of several in a row, has taken so long; gives how long it would have taken without drift.
        `load` is of the first: with each that follows, the context grows by a token for every sequence."""
        expected_s = self.undrifted_s(load) + self._line.context_token * load.decodes * (steps - 1) / 2
        if self.known:
            seconds = min(seconds, OUTLIER * self.drift * expected_s)
        kept, counts = DECAY, 1.0
        if steps > 1:
            kept = DECAY**steps
            counts = (1.0 - kept) / (1.0 - DECAY)
        self._expected_s = self._expected_s * kept + expected_s * counts
        self._measured_s = self._measured_s * kept + seconds * counts
        self.drift = self._measured_s / self._expected_s
        self.known = True
        return expected_s

    def undrifted_s(self, load: StepLoad) -> float:
        """Seconds of a step by the line alone."""
        line = self._line
        return (
            line.fixed
            + line.prompt_token * load.prefill_tokens
            + line.decode * load.decodes
            + line.context_token * load.context_tokens
        )


class Outputs:
    """The share of their limits that a class's requests generate; 1 until one has ended."""

    __slots__ = ("_generated", "_limits")

    def __init__(self) -> None:
        self._generated = self._limits = 0.0

    def expected(self, limit: int) -> float:
        """Tokens to expect of a request that may have `limit`."""
        return limit * self._generated / self._limits if self._limits else float(limit)

    def ended(self, generated: int, limit: int) -> None:
        self._generated = self._generated * DECAY + generated
        self._limits = self._limits * DECAY + limit


def pace_of(deployment: Deployment, replica: Replica) -> Pace:
    """A new pace for the replica, as its model's roofline has it. (How near an ONNX file runs to its shape's roofline
    nobody knows.)"""
    costs = step_costs(deployment, replica)
    if costs is None or deployment.models[replica.model].onnx is not None:
        return Pace(None)
    return Pace(_line_of(costs, replica.role == "decoder"))


def step_costs(deployment: Deployment, replica: Replica) -> StepCosts | None:
    """The roofline of the replica's model on its slice, or None where there is none."""
    shape = shape_of(deployment.models[replica.model])
    return None if shape is None else costs_of(shape, deployment, replica)


def costs_of(shape: ModelShape, deployment: Deployment, replica: Replica) -> StepCosts | None:
    """The same for a model of this shape in the replica's place."""
    card, part = deployment.gpu, replica.slice.profile
    if card is None or part is None:
        return None
    return _costs_of(shape, card, part, replica.processes, replica.tensor_parallel, deployment.engine.name)


@lru_cache(maxsize=1024)
def _costs_of(shape: ModelShape, card: Gpu, part: Profile, processes: int, ways: int, engine: EngineName) -> StepCosts:
    if shape.role != "decoder":
        engine = "gpuplan"
    overhead_s, in_blocks = step_overhead_s(engine, shape, card), engine == "vllm"
    return StepCosts(
        shape, card, part, tensor_parallel=ways, processes=processes, overhead_s=overhead_s, in_blocks=in_blocks
    )


@lru_cache(maxsize=1024)
def _line_of(costs: StepCosts, decoder: bool) -> StepLine:
    """A line through the roofline at sizes that are common in serving."""
    step_s = costs.step_s
    prompt_token = (step_s(_prompts(1024)) - step_s(_prompts(256))) / 768
    if not decoder:
        return StepLine(max(step_s(_prompts(256)) - 256 * prompt_token, 0.0), prompt_token, 0.0, 0.0)
    one = step_s(StepLoad(0, 0, 1, 512, 1))
    context_token = (step_s(StepLoad(0, 0, 1, 8704, 1)) - one) / 8192
    decode = max(step_s(StepLoad(0, 0, 32, 512, 32)) - one, 0.0) / 31
    return StepLine(max(one - decode - 512 * context_token, 0.0), prompt_token, decode, context_token)


def _prompts(tokens: int) -> StepLoad:
    """Prompts of 128 tokens."""
    return StepLoad(tokens, tokens * 128, 0, 0, max(tokens // 128, 1))
