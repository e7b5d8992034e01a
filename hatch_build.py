"""Compiles what decides and what simulates, where asked: `GPUPLAN_COMPILE=1 pip install .`

The policy and the simulation's loop are plain Python with types, and mypyc makes extension modules of them as they are;
a simulation is then several times as fast. Without a compiler, or unasked, the same files are interpreted.

    python hatch_build.py FOLDER    puts a compiled copy of the package into FOLDER, for benchmarks and tests
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
COMPILED = [
    "gpuplan/hardware/roofline.py",
    "gpuplan/hardware/shapes.py",
    *(
        f"gpuplan/policy/{path.name}"
        for path in sorted((ROOT / "gpuplan" / "policy").glob("*.py"))
        if path.name not in ("__init__.py", "vocabulary.py")  # compiled, its structs would not know their fields' types
    ),
    "gpuplan/record/counts.py",
    *(f"gpuplan/sim/{name}.py" for name in ("clock", "faults", "loop", "tally")),
]
NEEDS = ["mypy>=1.13", "setuptools"]


def compile_into(folder: Path) -> list[Path]:
    """A copy of the package, compiled in place; gives the extension modules. Raises CalledProcessError where there is
    no compiler, or one that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "gpuplan", folder / "gpuplan", ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd"))
    (folder / "mypy.ini").write_text("[mypy]\nignore_missing_imports = True\n")
    subprocess.run([sys.executable, "-m", "mypyc", *COMPILED], cwd=folder, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    return sorted(path for pattern in ("*.so", "*.pyd") for path in folder.rglob(pattern) if "build" not in path.parts)


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script
    pass
else:

    class CompileHook(BuildHookInterface):  # type: ignore[type-arg]
        """Adds the extension modules to a wheel. An editable install has none: they would hide the files."""

        PLUGIN_NAME = "custom"

        def _asked(self) -> bool:
            return self.target_name == "wheel" and bool(os.environ.get("GPUPLAN_COMPILE"))

        def dependencies(self) -> list[str]:
            return [*NEEDS, *self.metadata.core.dependencies] if self._asked() else []

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            if not self._asked() or version == "editable":
                return
            self._folder = tempfile.mkdtemp()
            for path in compile_into(Path(self._folder)):
                build_data["force_include"][str(path)] = str(path.relative_to(self._folder))
            build_data["pure_python"] = False
            build_data["infer_tag"] = True

        def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
            if (folder := getattr(self, "_folder", None)) is not None:
                shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for extension in compile_into(Path(sys.argv[1])):
        print(extension)
