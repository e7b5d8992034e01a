"""What sampling costs: CPU of the telemetry thread for 8 cards at 10 Hz, as a share of one core.

The cards are played by the library that the tests compile (tests/telemetry/nvml_fake), which answers at once: this is
the cost of our own code and of pynvml's. A real driver adds the time it spends in its own calls; `--real`, on a machine
with cards, shows both together.

    python benchmarks/sampler_cost.py [--cards 8] [--hz 10] [--seconds 10] [--mig] [--real]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpuplan.record.recorder import Sample
from gpuplan.telemetry.cards import NvmlCards
from gpuplan.telemetry.sampler import Sampler
from tests.telemetry.nvml_fake import a100, compiled, sliced

LIMIT = 0.01
"""Of a core, for 8 cards at 10 Hz."""


class Timed(NvmlCards):
    """The cards, and the CPU seconds that their thread has used."""

    cpu_s = 0.0
    began_s: float | None = None
    readings = 0

    def read(self, now_s: float) -> list[Sample]:
        samples = super().read(now_s)
        if self.began_s is None:  # what comes before, initialisation included, is spent once
            self.began_s = time.thread_time()
        self.cpu_s = time.thread_time() - self.began_s
        self.readings += 1
        return samples


class Kept:
    """Keeps rows as the recorder does."""

    def __init__(self) -> None:
        self.rows: list[Sample] = []

    def sampled(self, samples: list[Sample]) -> None:
        self.rows.extend(samples)


def cost(hz: float, seconds: float) -> tuple[float, Timed, Kept]:
    """CPU seconds of the sampling thread per second."""
    cards, kept = Timed(), Kept()
    sampler = Sampler(cards, kept, hz=hz)
    began_s = time.monotonic()
    sampler.start()
    time.sleep(seconds)
    sampler.stop()
    return cards.cpu_s / (time.monotonic() - began_s), cards, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cards", type=int, default=8)
    parser.add_argument("--hz", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--mig", action="store_true", help="cards with GPM, cut into two slices each")
    parser.add_argument("--real", action="store_true", help="this machine's own driver and cards")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not options.real:
            library = compiled(Path(folder))
            if library is None:
                sys.exit("no C compiler on this machine")
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # found by its soname when pynvml asks for NVML
            card: Callable[[str], str] = (lambda _: sliced(gpm=True)) if options.mig else a100
            script = Path(folder) / "nvml.txt"
            script.write_text("".join(card(f"GPU-{i}") for i in range(options.cards)))
            os.environ["NVML_FAKE"] = str(script)
        share, cards, kept = cost(options.hz, options.seconds)
    names = {row.gpu for row in kept.rows}
    if not names:
        sys.exit(f"no card was read: {'; '.join(cards.problems)}")
    whose = "this machine's driver" if options.real else "a fake driver, so this is our own cost"
    print(f"{len(names)} cards, {cards.readings} readings in {options.seconds:g} s, {len(kept.rows)} rows ({whose})")
    print(f"{share:.2%} of a core: {share / LIMIT:.2f} x the limit of {LIMIT:.0%}")


if __name__ == "__main__":
    main()
