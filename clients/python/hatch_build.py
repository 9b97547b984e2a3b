"""Generates the package `postern.auth.v1` from Postern's proto files when a wheel is built.

In the repository they are in ../../proto, in a source distribution in ./proto. Google's come from their own package.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import google.api
from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GenerateStubs(BuildHookInterface[Any]):
    """The hook that pyproject.toml names."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        protos = next(path for path in (root / "proto", root / "../../proto") if (path / "postern").is_dir())
        self._out = Path(tempfile.mkdtemp(prefix="postern-stubs-"))
        generate(protos, self._out)
        build_data["force_include"][str(self._out / "postern")] = "postern"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        shutil.rmtree(self._out)


def generate(protos: Path, out: Path) -> None:
    """Writes the stubs and their types below `out`."""
    googleapis = Path(next(iter(google.api.__path__))).parents[1]
    files = sorted(str(path) for path in (protos / "postern").rglob("*.proto"))
    plugins = Path(sys.executable).parent
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={protos}",
            f"--proto_path={googleapis}",
            f"--proto_path={Path(protoc.__file__).parent / '_proto'}",
            f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
            *(f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
            *files,
        ]
    )
    if status != 0:
        raise RuntimeError("protoc failed")
    package = out / "postern/auth/v1"
    # `postern` and `postern.auth` stay namespaces, so that other packages can add to them.
    (package / "__init__.py").write_text('"""The stubs of Postern\'s API, generated from its proto files."""\n')
    (package / "py.typed").touch()
