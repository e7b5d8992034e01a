"""What a matrix multiplication costs on a slice of a card.

`seconds(rows, columns, inner, ...)` takes arrays and gives seconds: an output of `rows` x `columns` is cut into tiles,
every SM works on one tile at a time, so the tiles need whole waves; each candidate tile shape and split of the inner
dimension is costed, and the cheapest counts, as a library's heuristics would have it. A tile's time is the larger of
its multiplications and of what it draws through the L2 cache; over it all lies the time of reading the operands from
memory, joined by a smooth maximum (Williams et al., Roofline, CACM 2009). A long kernel draws the card to its power
limit and the clock falls.

The constants were fitted on published medians of four linear operators (microsoft/vidur, MIT licence; A100-80GB and
H100, fp16, 1 to 4096 tokens, tensor parallel 1, 2, 4 and 8). `benchmarks/emulator_fidelity.py` repeats the fit and the
comparison; `roofline.band` has what came of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2, sqrt
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Means:
    """What a slice computes with, by data sheet. `flops_per_s` is at the operands' precision; `l2_pace` is what its L2
    cache delivers, in units that `Constants.flops_per_l2_byte` turns into bytes per second (see `l2_pace`)."""

    flops_per_s: float
    l2_pace: float
    bytes_per_s: float
    sm_count: int


AMPERE_FLOPS_PER_CYCLE = 2048
"""Of one A100 SM's tensor cores, fp16, dense."""


def l2_pace(fp16_flops_per_s: float, sm_count: int, sm_clock_hz: float) -> float:
    """How an L2 cache grows with the tensor cores it feeds, in FLOP/s of an A100's.

    With more SMs and faster clocks in proportion; with wider tensor cores by the square root only, as operands are
    shared among SMs for the rest. So constants fitted on A100s alone come within 6 % of an H100's layers, and the other
    way round; with no such rule they were 7 to 8 % off. Widths are powers of two: a sheet's clocks are not
    always those of its FLOP/s.
    """
    flops_per_cycle = 2 ** round(log2(fp16_flops_per_s / (sm_count * sm_clock_hz)))
    return fp16_flops_per_s / sqrt(flops_per_cycle / AMPERE_FLOPS_PER_CYCLE)


@dataclass(frozen=True, slots=True)
class Constants:
    """What an architecture makes of its data sheet.

    `full_loss` is the share of speed lost when all SMs are busy at once, `tile_start_s` what every wave of tiles takes
    before and after its multiplications, `flops_per_l2_byte` the unit of the L2 cache's pace. A kernel that computes
    for `hot_after_s` has lost half of `hot_loss` in clock.
    """

    compute_efficiency: float
    memory_efficiency: float
    launch_s: float
    flops_per_l2_byte: float
    full_loss: float
    tile_start_s: float
    hot_after_s: float
    hot_loss: float


@dataclass(frozen=True, slots=True)
class Structure:
    """What is the same on every architecture: how sharp the smooth maximum is, how much of a last, partly filled wave
    is lost, and what writing costs: partial sums of a split, and results that nothing hides."""

    sharpness: float
    wave_loss: float
    split_writes: float
    unhidden_writes: float


STRUCTURE = Structure(sharpness=2.395, wave_loss=0.758, split_writes=0.707, unhidden_writes=0.174)

# (rows, columns, splits of the inner dimension). More shapes gained nothing on the operators above.
TILES = tuple(
    (rows, columns, splits)
    for rows, columns in ((64, 64), (64, 128), (128, 128), (128, 256), (256, 128))
    for splits in (1, 2, 4)
)
ACCUMULATOR_BYTES = 4


def seconds(
    rows: Floats,
    columns: Floats,
    inner: Floats,
    *,
    element_bytes: float,
    means: Means,
    constants: Constants,
    structure: Structure = STRUCTURE,
    matrices: Floats | float = 1.0,
) -> Floats:
    """Seconds of multiplying (rows x inner) by (inner x columns), for arrays of any one shape.

    With more than one of `matrices`, each row meets one of so many and all are one kernel (a grouped product). Their
    rows are many or few by chance, so a matrix has at least one tile of rows, and the last one is half full on average.
    """
    import numpy as np

    m, n, k, g = (np.asarray(size, dtype=float)[..., None] for size in (rows, columns, inner, matrices))
    tile_rows, tile_columns, splits = np.array(TILES, dtype=float).T
    row_tiles = np.where(g == 1.0, np.ceil(m / tile_rows), np.maximum(g, m / tile_rows + g / 2))
    tiles = row_tiles * np.ceil(n / tile_columns)
    may_split = (splits == 1) | (tiles <= means.sm_count)
    tiles = tiles * splits
    filled = tiles / means.sm_count
    whole_waves = np.ceil(filled)
    waves = structure.wave_loss * whole_waves + (1 - structure.wave_loss) * np.maximum(filled, 1.0)
    efficiency = constants.compute_efficiency * (1 - constants.full_loss * filled / whole_waves)
    tile_s = 2 * tile_rows * tile_columns * k / splits * means.sm_count / (means.flops_per_s * efficiency)
    l2_bytes = element_bytes * tiles * (np.minimum(tile_rows, m / g) + tile_columns) * k / splits
    compute_s = np.maximum(
        waves * (tile_s + constants.tile_start_s), l2_bytes * constants.flops_per_l2_byte / means.l2_pace
    )
    heat = (compute_s / constants.hot_after_s) ** 2
    compute_s = compute_s * (1 + constants.hot_loss * heat / (1 + heat))
    memory_s = element_bytes * (g * n * k + m * k + m * n) / (means.bytes_per_s * constants.memory_efficiency)
    unhidden_bytes = structure.unhidden_writes * 2 * m * n
    unhidden_bytes = unhidden_bytes + np.where(
        splits > 1, structure.split_writes * ACCUMULATOR_BYTES * splits * m * n, 0.0
    )
    p = structure.sharpness
    total_s = (compute_s**p + memory_s**p) ** (1 / p) + unhidden_bytes / means.bytes_per_s + constants.launch_s
    best: Floats = np.where(may_split, total_s, np.inf).min(axis=-1)
    return best
