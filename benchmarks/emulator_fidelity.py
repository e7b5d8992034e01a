"""How far the emulated GPU is from real ones: linear operators, MIG slices, and tokens of a served 70B model.

Reads published measurements from a folder (see --data) laid out as

    gpu-profiles/{a100,h100}-*.csv          microsoft/vidur: medians of a layer's operators, fp16
    mig-profiles/a100-80gb-models.csv       MunQ-Lee/ParvaGPU_SC24: throughput of 11 networks on slices of an A100-80GB
    mig-profiles/mlperf-mig-offline.csv     MLPerf Inference v1.1: one slice beside the whole card
    llm-serving/llama-3.1-70b-h200.csv      ai-dynamo/aiconfigurator: TPOT of Llama-3.1-70B, fp8, on H200

and prints mean absolute errors. `--refit` fits the constants again, once for every model with that model left out,
once for every card with that card left out, and on everything: the last line is what `roofline.CONSTANTS` holds.

    python benchmarks/emulator_fidelity.py --data DIR [--refit]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gpuplan.hardware import catalog, engines, matmul, mig, roofline, shapes, slices
from gpuplan.hardware.matmul import STRUCTURE, Constants, Means, Structure
from gpuplan.hardware.roofline import StepLoad

Floats = NDArray[np.float64]
LINEAR = ["attn_pre_proj_ms", "attn_post_proj_ms", "mlp_up_proj_ms", "mlp_down_proj_ms"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the measurements")
    parser.add_argument("--refit", action="store_true", help="fit the constants again, leaving models and cards out")
    options = parser.parse_args()
    operators = [Operators.read(file) for file in sorted((options.data / "gpu-profiles").glob("*.csv"))]
    print("(a) linear operators of a layer, 1 to 4096 tokens, tensor parallel 1 to 8: mean absolute error, %")
    for one in operators:
        shipped = one.error(roofline.CONSTANTS[one.architecture].linear, STRUCTURE)
        unmeasured = one.error(roofline.UNMEASURED.linear, STRUCTURE)
        print(f"  {one.name:34} shipped constants {100 * shipped:5.2f}, the set for any card {100 * unmeasured:.2f}")
    if options.refit:
        leave_out(operators)
    slices_of_a100(options.data / "mig-profiles")
    served_tokens(options.data / "llm-serving" / "llama-3.1-70b-h200.csv")


# --- (a) linear operators -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operators:
    """The four operators of one model on one card: sizes and seconds as arrays of (rows, 4)."""

    name: str
    card: catalog.Gpu
    rows: Floats
    columns: Floats
    inner: Floats
    seconds: Floats

    @classmethod
    def read(cls, file: Path, step: int = 1) -> Operators:
        d = pd.read_csv(file).iloc[::step]
        ways, head = d["tensor_parallel"], d["n_embd"] // d["n_head"]
        gated = np.where(d["use_gated_mlp"], 2, 1)
        columns = [(d["n_head"] + 2 * d["n_kv_head"]) * head / ways, d["n_embd"]]
        columns += [gated * d["n_expanded_embd"] / ways, d["n_embd"]]
        inner = [d["n_embd"], d["n_head"] * head / ways, d["n_embd"], d["n_expanded_embd"] / ways]
        rows = np.repeat(d["num_tokens"].to_numpy(dtype=float)[:, None], 4, axis=1)
        return cls(
            file.stem,
            catalog.gpu(file.stem.split("-")[0]),
            rows,
            np.stack(columns, axis=1).astype(float),
            np.stack(inner, axis=1).astype(float),
            d[LINEAR].to_numpy(dtype=float) * 1e-3,
        )

    @property
    def architecture(self) -> str:
        return self.card.architecture

    def ratios(self, constants: Constants, structure: Structure) -> tuple[Floats, Floats]:
        """Predicted over measured: of every operator, and of every layer."""
        card = self.card
        pace = matmul.l2_pace(card.flops.fp16, card.sm_count, card.sm_clock_hz)
        means = Means(card.flops.fp16, pace, card.bandwidth_bytes_per_s, card.sm_count)
        each = matmul.seconds(
            self.rows,
            self.columns,
            self.inner,
            element_bytes=2,
            means=means,
            constants=constants,
            structure=structure,
        )
        return each / self.seconds, each.sum(axis=1) / self.seconds.sum(axis=1)

    def error(self, constants: Constants, structure: Structure) -> float:
        return float(np.abs(self.ratios(constants, structure)[1] - 1).mean())

    def every(self, step: int) -> Operators:
        return replace(self, **{f: getattr(self, f)[::step] for f in ("rows", "columns", "inner", "seconds")})


# What a fit may choose, and where it starts: the middle of what is plausible, nothing that was fitted before.
PHYSICAL = {
    "compute_efficiency": (0.7, 1.25, 1.0),
    "memory_efficiency": (0.7, 1.1, 0.88),
    "launch_s": (0.0, 7e-6, 4e-6),
    "flops_per_l2_byte": (20.0, 90.0, 70.0),
    "full_loss": (0.0, 0.3, 0.1),
    "tile_start_s": (0.0, 3e-6, 1e-6),
    "hot_after_s": (100e-6, 2500e-6, 500e-6),
    "hot_loss": (0.0, 0.5, 0.2),
}
STRUCTURAL = {
    "sharpness": (1.2, 6.0, 2.4),
    "wave_loss": (0.3, 1.0, 0.75),
    "split_writes": (0.0, 4.0, 1.0),
    "unhidden_writes": (0.0, 2.0, 0.4),
}


TIED_PULL = 0.1
"""How strongly one set for all cards is held to where it started: what the data of few cards cannot tell apart stays
plausible, and so carries over to the next card."""


def fit(known: list[Operators], *, tied: bool = False) -> tuple[dict[str, Constants], Structure]:
    """Constants of every architecture among `known` (with `tied`, one set for all) and the structure they share."""
    from scipy.optimize import differential_evolution, minimize

    thinned = [one.every(6) for one in known]
    names = ["any"] if tied else sorted({one.architecture for one in known})
    bounds = [*STRUCTURAL.values(), *(b for _ in names for b in PHYSICAL.values())]
    low, high, start = (np.array(column) for column in zip(*bounds, strict=True))
    unit = (start - low) / (high - low)

    def unpack(point: Floats) -> tuple[dict[str, Constants], Structure]:
        values = iter((low + (high - low) * np.clip(point, 0, 1)).tolist())
        structure = Structure(**{name: next(values) for name in STRUCTURAL})
        return {name: Constants(**{key: next(values) for key in PHYSICAL}) for name in names}, structure

    def loss(point: Floats) -> float:
        constants, structure = unpack(point)
        total = 0.0
        for one in thinned:
            each, layer = one.ratios(constants["any" if tied else one.architecture], structure)
            # Layers are what counts; single operators keep the fit from trading one for another.
            total += float(np.abs(np.log(layer)).mean() + 0.3 * np.abs(np.log(each)).mean())
        pull = TIED_PULL * float(((point - unit) ** 2).mean()) if tied else 0.0
        return total / len(thinned) + pull

    box = [(0.0, 1.0)] * len(unit)
    found = differential_evolution(loss, box, x0=unit, popsize=3, maxiter=60, seed=0, polish=False)
    for _ in range(3):
        found = minimize(loss, found.x, method="Nelder-Mead", bounds=box, options={"maxfev": 1500, "adaptive": True})
    return unpack(found.x)


def leave_out(operators: list[Operators]) -> None:
    errors = []
    for out in operators:
        constants, structure = fit([one for one in operators if one is not out])
        errors.append(out.error(constants[out.architecture], structure))
        print(f"  {out.name:34} left out          {100 * errors[-1]:5.2f}", flush=True)
    print(f"  mean over models left out            {100 * np.mean(errors):5.2f}")
    for architecture in sorted({one.architecture for one in operators}):
        constants, structure = fit([one for one in operators if one.architecture != architecture], tied=True)
        rest = [one.error(constants["any"], structure) for one in operators if one.architecture == architecture]
        print(f"  {architecture:34} known by its sheet{100 * np.mean(rest):5.2f}", flush=True)
    constants, structure = fit(operators)
    print(f"  on everything: {asdict(structure)} { {k: asdict(v) for k, v in constants.items()} }")


# --- (b) slices ---------------------------------------------------------------------------------------------------

OUTLIER = 0.3


def slices_of_a100(folder: Path) -> None:
    """Fits every network on its 1g and 7g rows and predicts 2g, 3g, 4g; then processes that share a slice."""
    table = pd.read_csv(folder / "a100-80gb-models.csv")
    table = table[table["throughput_per_process_per_s"] > 0]
    table["seconds"] = table["batch_size"] / table["throughput_per_process_per_s"]
    card = catalog.gpu("a100-80gb")
    parts = {p.slices: p for p in mig.plain_profiles(card) if p.slices != 1 or p.width == 1}
    print("(b) A100-80GB slices from 1g and 7g alone: mean absolute error, %")
    predicted = []
    for _, rows in table.groupby("model"):
        points = list(rows[["gpu_instance_slices", "batch_size", "processes", "seconds"]].itertuples(index=False))
        ends = [
            slices.Measured(parts[n], batch, s) for n, batch, processes, s in points if n in (1, 7) and processes == 1
        ]
        model = slices.BatchTimes.fit(card, ends)
        times = [model.seconds(parts[n], batch, processes) for n, batch, processes, _ in points]
        predicted.append(rows.assign(error=np.array(times) / rows["seconds"] - 1))
    every = pd.concat(predicted)
    between = every[every["gpu_instance_slices"].isin([2, 3, 4]) & (every["processes"] == 1)]
    median = 100 * between["error"].abs().median()
    print(f"  2g, 3g, 4g, {len(between)} points             {_percent(between['error']):5.2f}, median {median:.2f}")
    for row in between[between["error"].abs() > OUTLIER].itertuples():
        where = f"{row.model}, {row.gpu_instance_slices}g, batch {row.batch_size}"
        print(f"    outlier: {where}: predicted {100 * row.error:+.0f} %")
    print(f"  a + b / slices, for comparison        {100 * _amdahl(table[table['processes'] == 1]):5.2f}")
    for processes in (2, 3, 4, 5):
        shared = every[every["processes"] == processes]["error"]
        print(f"  {processes} processes on a slice              {_percent(shared):5.2f}")
    seven = 7 * slices.speed(card, parts[1]) * (1 - slices.neighbour_loss(card, parts[1]))
    mlperf = pd.read_csv(folder / "mlperf-mig-offline.csv")["seven_1g_over_whole_a100"].dropna()
    print(f"  seven 1g over the whole card: {seven:.3f}; MLPerf {mlperf.min():.3f} to {mlperf.max():.3f}")


def _amdahl(table: pd.DataFrame) -> float:
    wide = table.pivot_table(index=["model", "batch_size"], columns="gpu_instance_slices", values="seconds")
    per_slice = (wide[1] - wide[7]) / (1 - 1 / 7)
    fixed = wide[1] - per_slice
    off = [((fixed + per_slice / n) / wide[n] - 1).abs().dropna() for n in (2, 3, 4)]
    return float(pd.concat(off).mean())


# --- (c) a served model -------------------------------------------------------------------------------------------

MEMORY_SHARE_USED = 0.9
"""What the engines may fill by default (vLLM's gpu_memory_utilization)."""
KV_BYTES = {"vllm": 2, "trtllm": 1}
"""vLLM keeps an fp16 KV cache beside fp8 weights unless told otherwise; TensorRT-LLM's fp8 recipes an fp8 one."""


def served_tokens(file: Path) -> None:
    """TPOT at a steady concurrency: a decode step at the mean context, and a share of the others' prompts."""
    table = pd.read_csv(file)
    table["modelled_s"] = [_tpot_s(row) for row in table.itertuples()]
    table["measured_s"] = table["tpot_ms"] / 1e3
    print("(c) TPOT of Llama-3.1-70B, fp8, on H200: mean absolute error after one constant per engine, %")
    errors = []
    for engine, rows in table.groupby("backend"):
        offsets = np.linspace(0, 10e-3, 401)
        means = [((rows["modelled_s"] + o) / rows["measured_s"] - 1).abs().mean() for o in offsets]
        offset = offsets[int(np.argmin(means))]
        errors.append((rows["modelled_s"] + offset) / rows["measured_s"] - 1)
        found = f"{_percent(errors[-1]):5.2f}, overhead {1e3 * offset:.2f} ms a step"
        print(f"  {engine:10} {len(rows):3} points                  {found}")
    print(f"  all                                   {_percent(pd.concat(errors)):5.2f}")
    vllm = table[table["backend"] == "vllm"]
    overhead_s = engines.step_overhead_s("vllm", shapes.shape("llama-3.1-70b"), catalog.gpu("h200-141gb"))
    counted = (vllm["modelled_s"] + overhead_s) / vllm["measured_s"] - 1
    found = f"{_percent(counted):5.2f}, median {100 * counted.abs().median():.2f}, {1e3 * overhead_s:.2f} ms a step"
    print(f"  vllm, as deployment.engine has it     {found}")


def _tpot_s(row: tuple) -> float:  # type: ignore[type-arg]
    card, ways = catalog.gpu("h200-141gb"), int(row.tensor_parallel)  # type: ignore[attr-defined]
    model = replace(shapes.shape("llama-3-70b"), bytes_per_element=1, kv_bytes_per_element=KV_BYTES[row.backend])  # type: ignore[attr-defined]
    costs = roofline.StepCosts(model, card, mig.whole(card), tensor_parallel=ways)
    prompt, output, concurrency = int(row.prompt_tokens), int(row.output_tokens), int(row.concurrency)  # type: ignore[attr-defined]
    context = prompt + output / 2
    free = MEMORY_SHARE_USED * ways * card.memory_bytes - model.weights_bytes - ways * roofline.RUNTIME_MEMORY_BYTES
    running = min(concurrency, max(int(free / model.kv_bytes_per_token / context), 1))
    decode_s = costs.step_s(StepLoad.of_decodes(running, int(context))) - roofline.STEP_OVERHEAD_S
    prefill_s = costs.step_s(StepLoad.of_prompt(prompt)) - roofline.STEP_OVERHEAD_S
    return decode_s + (running - 1) / output * prefill_s


def _percent(errors: Iterable[float]) -> float:
    return 100 * float(np.abs(np.asarray(errors)).mean())


if __name__ == "__main__":
    main()
