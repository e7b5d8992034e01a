"""What is compiled decides the same: the tests of the policy and of the simulation, run on a compiled copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C compiler")
@pytest.mark.skipif(not (REPOSITORY / "hatch_build.py").exists(), reason="not a checkout")
def test_a_compiled_copy_passes_the_tests_of_policy_and_simulation(tmp_path: Path) -> None:
    build = [sys.executable, str(REPOSITORY / "hatch_build.py"), str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True, env={**os.environ, "MYPYC_OPT_LEVEL": "1"})
    assert list((tmp_path / "gpuplan" / "policy").glob("core.*.so"))
    for name in ("tests", "benchmarks", "scenarios", "docs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    asked = ["tests/policy", "tests/sim", "tests/hardware/test_roofline.py", "tests/hardware/test_experts.py"]
    not_there = "--ignore=tests/policy/test_bounded.py"  # it looks into objects, which a compiled one does not let it
    tests = [sys.executable, "-m", "pytest", not_there, *asked]
    itself = {**os.environ, "PYTHONPATH": str(tmp_path)}  # for the workers that some start
    told = subprocess.run(tests, cwd=tmp_path, env=itself, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stdout[-5000:]
