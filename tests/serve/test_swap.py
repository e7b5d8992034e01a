"""Hot swap as an operator does it: over HTTP, with a token, from one folder, while clients are being answered."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpuplan.serve.service import Service

from .engines.graphs import votes
from .test_http import run

TOKEN = {"Authorization": "Bearer open sesame"}
GOOD, BAD = [[0, 0], [0, 1], [1, 0], [0, 0], [0, 0]], [[0, 0], [1, 0], [0, 1], [0, 0], [0, 0]]
"""What the words say of label 0 and 1; in the second version `good` is bad."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, table in (("v1", GOOD), ("v2", BAD)):
        (tmp_path / name).mkdir()
        votes(tmp_path / name, table=table)
    (tmp_path / "broken").mkdir()
    votes(tmp_path / "broken")
    (tmp_path / "broken" / "model.onnx").write_bytes(b"not a graph")
    return tmp_path


def scenario(folder: Path, worker: str = "process") -> dict[str, Any]:
    return {
        "name": "swap",
        "models": {"mood": {"onnx": str(folder / "v1" / "model.onnx")}},
        "deployment": {"gpu": "cpu", "replicas": [{"model": "mood", "slice": "cpu", "worker": worker}]},
    }


@pytest.mark.parametrize(("worker", "mode"), [("process", "beside"), ("process", "drain"), ("thread", "beside")])
def test_nobody_notices_a_swap_but_by_the_answers(folder: Path, worker: str, mode: str) -> None:
    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        labels: list[str] = []
        over = asyncio.Event()

        async def ask() -> None:
            while not over.is_set():
                answer = await client.post("/v1/classify", json={"model": "mood", "input": "good"})
                assert answer.status_code == 200, answer.text
                labels.append(answer.json()["label"])

        clients = [asyncio.create_task(ask()) for _ in range(4)]
        while len(labels) < 8:
            await asyncio.sleep(0.01)
        swap = {"model": "mood", "onnx": "v2/model.onnx", "mode": mode}
        told = await client.post("/admin/swap", json=swap, headers=TOKEN)
        assert told.status_code == 200, told.text
        assert told.json()["replicas"] == ["mood-0#2"]
        answered = len(labels)
        while len(labels) < answered + 8:
            await asyncio.sleep(0.01)
        over.set()
        await asyncio.gather(*clients)
        assert list(dict.fromkeys(labels)) == ["LABEL_1", "LABEL_0"], "first the one, then the other"

    run(scenario(folder, worker), scene, admin_token="open sesame", models_dir=folder)


def test_what_cannot_be_swapped_is_said_and_changes_nothing(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    shutil.copytree(folder / "v2", outside / "v2")
    (folder / "link").symlink_to(outside / "v2")

    async def scene(client: httpx.AsyncClient, service: Service) -> None:
        for body, status, said in (
            (
                {"model": "mood", "onnx": "../" + outside.name + "/v2/model.onnx"},
                400,
                "no such file below --models-dir",
            ),
            ({"model": "mood", "onnx": str(outside / "v2" / "model.onnx")}, 400, "no such file below --models-dir"),
            ({"model": "mood", "onnx": "link/model.onnx"}, 400, "no such file below --models-dir"),
            ({"model": "mood", "onnx": "v3/model.onnx"}, 400, "no such file below --models-dir"),
            ({"model": "mood", "onnx": "broken/model.onnx"}, 409, "cannot load the model"),
            ({"model": "mood", "onnx": "broken/model.onnx", "mode": "drain"}, 409, "cannot load the model"),
            ({"model": "mood", "builtin": "embed"}, 400, "another task"),
            ({"model": "mood", "builtin": "sentiment"}, 409, "another tokenizer"),
            ({"model": "mood"}, 400, "exactly one of them"),
            ({"model": "mood", "onnx": "v2/model.onnx", "mode": "now"}, 400, "mode"),
            ({"model": "nobody", "builtin": "embed"}, 404, "no such model"),
        ):
            refused = await client.post("/admin/swap", json=body, headers=TOKEN)
            assert refused.status_code == status and said in refused.json()["error"]["message"], refused.text
            answer = await client.post("/v1/classify", json={"model": "mood", "input": "good"})
            assert (answer.status_code, answer.json().get("label")) == (200, "LABEL_1"), body
        assert list(service.server.fleet.engines) == ["mood-0"]

    run(scenario(folder), scene, admin_token="open sesame", models_dir=folder)


def test_admins_have_a_token_of_their_own(folder: Path) -> None:
    body = json.dumps({"model": "mood", "onnx": "v2/model.onnx"})

    async def guarded(client: httpx.AsyncClient, service: Service) -> None:
        for headers in ({}, {"Authorization": "Bearer key"}):
            assert (await client.post("/admin/swap", content=body, headers=headers)).status_code == 401
        assert (await client.post("/admin/swap", content=body, headers=TOKEN)).status_code == 400, "no folder was named"
        assert (await client.get("/metrics", headers=TOKEN)).status_code == 401, "nor does it open the rest"

    async def absent(client: httpx.AsyncClient, service: Service) -> None:
        assert (await client.post("/admin/swap", content=body, headers=TOKEN)).status_code == 404

    run(scenario(folder, "thread"), guarded, admin_token="open sesame", api_keys={"ours": "key"})
    run(scenario(folder, "thread"), absent)
