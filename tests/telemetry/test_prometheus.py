"""What an exporter's text means, and an exporter that is slow, absent, wrong, or comes back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gpuplan.errors import InputError
from gpuplan.record.recorder import Sample
from gpuplan.scenario import deployment, files
from gpuplan.scenario.demand import Scenario
from gpuplan.serve.metrics import Metrics
from gpuplan.telemetry import choice, prometheus
from gpuplan.telemetry.cards import NvmlCards
from gpuplan.telemetry.emulated import EmulatedCards
from gpuplan.telemetry.prometheus import PrometheusCards, parse
from tests.conftest import single_step

WHOLE = """\
# HELP DCGM_FI_DEV_GPU_UTIL GPU utilization (in %).
# TYPE DCGM_FI_DEV_GPU_UTIL gauge
DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-1",device="nvidia0",modelName="NVIDIA A100",Hostname="node-1"} 97
DCGM_FI_DEV_MEM_COPY_UTIL{gpu="0",UUID="GPU-1",Hostname="node-1"} 42
DCGM_FI_DEV_FB_USED{gpu="0",UUID="GPU-1",Hostname="node-1"} 1024
DCGM_FI_DEV_FB_FREE{gpu="0",UUID="GPU-1",Hostname="node-1"} 3072
DCGM_FI_DEV_POWER_USAGE{gpu="0",UUID="GPU-1",Hostname="node-1"} 301.5
# TYPE DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION counter
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="0",UUID="GPU-1",Hostname="node-1"} 5000000
DCGM_FI_DEV_SM_CLOCK{gpu="0",UUID="GPU-1",Hostname="node-1"} 1410
DCGM_FI_DEV_MEM_CLOCK{gpu="0",UUID="GPU-1",Hostname="node-1"} 1593
DCGM_FI_DEV_GPU_TEMP{gpu="0",UUID="GPU-1",Hostname="node-1"} 61
DCGM_FI_DEV_CLOCK_THROTTLE_REASONS{gpu="0",UUID="GPU-1",Hostname="node-1"} 4
DCGM_FI_PROF_PCIE_RX_BYTES{gpu="0",UUID="GPU-1",Hostname="node-1"} 3000
DCGM_FI_PROF_PCIE_TX_BYTES{gpu="0",UUID="GPU-1",Hostname="node-1"} 2000
DCGM_FI_DEV_XID_ERRORS{gpu="0",UUID="GPU-1",Hostname="node-1"} 0
"""

SLICED = """\
DCGM_FI_DEV_POWER_USAGE{gpu="1",UUID="GPU-2",GPU_I_PROFILE="3g.40gb",GPU_I_ID="1"} 250
DCGM_FI_DEV_POWER_USAGE{gpu="1",UUID="GPU-2",GPU_I_PROFILE="1g.10gb",GPU_I_ID="7"} 250
DCGM_FI_DEV_FB_USED{gpu="1",UUID="GPU-2",GPU_I_PROFILE="3g.40gb",GPU_I_ID="1"} 19456
DCGM_FI_DEV_FB_USED{gpu="1",UUID="GPU-2",GPU_I_PROFILE="1g.10gb",GPU_I_ID="7"} 0
DCGM_FI_PROF_SM_ACTIVE{gpu="1",UUID="GPU-2",GPU_I_PROFILE="3g.40gb",GPU_I_ID="1"} 0.8
DCGM_FI_PROF_GR_ENGINE_ACTIVE{gpu="1",UUID="GPU-2",GPU_I_PROFILE="3g.40gb",GPU_I_ID="1"} 0.9
DCGM_FI_PROF_DRAM_ACTIVE{gpu="1",UUID="GPU-2",GPU_I_PROFILE="3g.40gb",GPU_I_ID="1"} 0.4
"""


def test_a_whole_card_in_our_units() -> None:
    assert parse(WHOLE) == {
        ("gpu0", None): {
            "gpu_utilization": 0.97,
            "memory_utilization": 0.42,
            "memory_used_bytes": 2.0**30,
            "memory_total_bytes": 4 * 2.0**30,
            "power_w": 301.5,
            "energy_j": 5000.0,
            "sm_clock_mhz": 1410.0,
            "memory_clock_mhz": 1593.0,
            "temperature_c": 61.0,
            "throttle_reasons": "sw_power_cap",
            "pcie_rx_bytes_per_s": 3000.0,
            "pcie_tx_bytes_per_s": 2000.0,
        }
    }


def test_of_slices_the_card_has_the_power_and_each_its_own_load() -> None:
    """The exporter repeats the card's power at every slice: it is no slice's own, and not to be added up."""
    assert parse(SLICED) == {
        ("gpu1", None): {"power_w": 250.0},
        ("gpu1", "gpu1/3g.40gb#1"): {
            "gpu_utilization": 0.8,
            "memory_utilization": 0.4,
            "memory_used_bytes": 19 * 2.0**30,
        },
        ("gpu1", "gpu1/1g.10gb#7"): {"memory_used_bytes": 0.0},
    }


@pytest.mark.parametrize(
    ("text", "cards"),
    [
        ("", []),
        ("# only a comment\nup 1\n", []),
        ('DCGM_FI_DEV_GPU_UTIL{gpu="0"} NaN\n', []),  # missing, not a number
        (WHOLE + WHOLE.replace("node-1", "node-2"), ["node-1/gpu0", "node-2/gpu0"]),  # a federation of two hosts
    ],
)
def test_which_cards_there_are(text: str, cards: list[str]) -> None:
    assert [gpu for gpu, _ in parse(text)] == cards


def test_what_gpuplan_s_own_server_says_reads_back_with_its_origin() -> None:
    supply = deployment.resolve(files.build(single_step(), Scenario))
    metrics = Metrics(supply)
    now_s = time.monotonic()
    card = Sample(now_s, "emulated", "gpu0", None, 0.5, 1e9, 8e10, 200.0, 7.0, processes=2)
    metrics.sampled([card, Sample(now_s, "emulated", "gpu0", "gpu0/1g.10gb@6", 0.25)])
    metrics.sampled([Sample(now_s - 60, "nvml", "gpu1", None, 0.5)])  # a card that has been silent for a minute
    assert parse(metrics.text().decode()) == {
        ("gpu0", None): {
            "source": "emulated",
            "gpu_utilization": 0.5,
            "memory_used_bytes": 1e9,
            "memory_total_bytes": 8e10,
            "power_w": 200.0,
            "energy_j": 7.0,
            "processes": 2,
        },
        ("gpu0", "gpu0/1g.10gb@6"): {"source": "emulated", "gpu_utilization": 0.25},
    }


# --- over the network ---------------------------------------------------------------------------------------------


class Exporter(ThreadingHTTPServer):
    """Answers /metrics with `text`, or what a test wants instead."""

    daemon_threads = True
    text = WHOLE
    status = 200
    delay_s = 0.0

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.asked: list[tuple[str, str | None]] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/metrics"


class _Handler(BaseHTTPRequestHandler):
    server: Exporter

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        time.sleep(self.server.delay_s)
        self.send_response(self.server.status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        with contextlib.suppress(OSError):  # nobody waits any longer
            self.wfile.write(self.server.text.encode())

    def log_message(self, *_: Any) -> None:
        return None


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    server = Exporter()
    yield server
    server.shutdown()
    server.server_close()


def test_it_is_asked_once_a_second_and_energy_counts_from_the_first_answer(exporter: Exporter) -> None:
    cards = PrometheusCards(exporter.url)
    rows = [row for tenth in range(11) for row in cards.read(tenth / 10)]
    exporter.text = WHOLE.replace("5000000", "5030000")
    rows += cards.read(2.0)
    assert [(row.time_s, row.source, row.gpu, row.energy_j) for row in rows] == [
        (0.0, "prometheus", "gpu0", 0.0),
        (1.0, "prometheus", "gpu0", 0.0),
        (2.0, "prometheus", "gpu0", 30.0),
    ]
    assert cards.problems == []


def test_what_a_url_lacks_is_said_once(exporter: Exporter) -> None:
    exporter.text = SLICED
    cards = PrometheusCards(exporter.url)
    for second in range(3):
        cards.read(float(second))
    assert cards.problems == [f"telemetry: {exporter.url} has no energy, clocks, temperature"]
    exporter.text = "up 1\n"
    elsewhere = PrometheusCards(exporter.url)
    assert elsewhere.read(0.0) == []
    assert elsewhere.problems == [
        f"telemetry: {exporter.url} tells of no GPU (known are the DCGM exporter and gpuplan serve)"
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": 500}, "HTTP 500"),
        ({"status": 302}, "HTTP 302"),  # followed nowhere
        ({"text": "<html><body>hello</body></html>"}, "not Prometheus text"),
        ({"text": "x" * (prometheus.BYTES_MAX + 1)}, "more than 8 MiB"),
        ({"delay_s": 0.3}, "it took too long"),
    ],
)
def test_an_answer_that_is_none_is_said_once_and_asked_for_again(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(prometheus, "TIMEOUT_S", 0.1 if "delay_s" in change else 5.0)
    for name, value in change.items():
        setattr(exporter, name, value)
    cards = PrometheusCards(exporter.url)
    assert cards.read(0.0) == cards.read(1.0) == []
    assert len(cards.problems) == 1
    assert cards.problems[0].startswith(f"telemetry: {exporter.url} did not answer as expected at times: ")
    assert reason in cards.problems[0]
    for name in change:
        delattr(exporter, name)
    monkeypatch.setattr(prometheus, "TIMEOUT_S", 5.0)
    assert len(cards.read(2.0)) == 1, "it is back"
    assert len(cards.problems) == 1


def test_an_exporter_that_is_not_there_is_said_once(exporter: Exporter) -> None:
    exporter.shutdown()
    exporter.server_close()
    cards = PrometheusCards(exporter.url)
    assert cards.read(0.0) == cards.read(1.0) == []
    assert cards.problems == [f"telemetry: {exporter.url} did not answer as expected at times: Connection refused"]


def test_a_password_is_sent_and_never_said(exporter: Exporter) -> None:
    cards = PrometheusCards(exporter.url.replace("//", "//me:s%40cret@"))
    exporter.status = 401
    cards.read(0.0)
    assert exporter.asked == [("/metrics", "Basic bWU6c0BjcmV0")]
    assert "cret" not in cards.problems[0] and "HTTP 401" in cards.problems[0]


# --- the choice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["auto", "nvml", "none", "http://host:9400/metrics", "https://[::1]:1/x?y=z"])
def test_a_choice(asked: str) -> None:
    assert choice.check(asked) == asked


@pytest.mark.parametrize("asked", ["", "NVML", "dcgm", "host:9400", "file:///etc/passwd", "http://", "http://h:99999", "http://h:0", "http://a b/", "http://h/\r\nX: y"])  # fmt: skip
def test_no_choice(asked: str) -> None:
    with pytest.raises(
        InputError, match=r"--telemetry: not a source of telemetry .*; allowed: auto, nvml, none, or http"
    ):
        choice.check(asked)


def test_what_a_run_reads() -> None:
    emulated = EmulatedCards(deployment.resolve(files.build(single_step(), Scenario)))
    rows = [
        ("auto", emulated, True, EmulatedCards),  # emulated cards are what works
        ("auto", None, True, NvmlCards),
        ("auto", None, False, None),
        ("nvml", emulated, False, NvmlCards),  # as asked: it will say that there is none
        ("none", emulated, True, None),
        ("http://host/metrics", emulated, True, PrometheusCards),
    ]
    for asked, cards, here, expected in rows:
        found = choice.source(asked, emulated=cards, cards_here=here)
        assert type(found) is (expected or type(None)), asked
