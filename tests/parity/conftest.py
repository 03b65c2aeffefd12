"""Set-up of the live comparisons: the peers import on a CPU, and Meta's checkout is found. See README.md beside it."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ERRORS: dict[str, dict[str, tuple[float, str]]] = {}  # test file → kind of figure → largest error and where

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]  # `make test` needs no torch; `make parity` has it
else:
    import torch

    if torch.version.cuda is None and importlib.util.find_spec("torchvision") is not None:
        # A torchvision wheel built for CUDA imports beside a CPU torch once the operators that its own library would
        # have declared exist; no test calls them.
        _operators = torch.library.Library("torchvision", "FRAGMENT")
        for _name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, _name):
                _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(scope="session")
def perception_models() -> Path:
    """Meta's checkout (github.com/facebookresearch/perception_models), importable as `core`; skips if unset."""
    root = os.environ.get("PERCEPTION_MODELS")
    if not root:
        pytest.skip("PERCEPTION_MODELS is unset; clone facebookresearch/perception_models and set it to that folder")
    if not (Path(root) / "core/vision_encoder/pe.py").is_file():
        pytest.fail(f"PERCEPTION_MODELS={root} has no core/vision_encoder/pe.py; set it to the root of the checkout")
    if root not in sys.path:
        sys.path.insert(0, root)
    return Path(root)


@pytest.fixture(scope="session")
def meta(perception_models: Path) -> ModuleType:
    """Meta's module of the model, `core.vision_encoder.pe`."""
    from core.vision_encoder import pe

    return pe


@pytest.fixture
def close(request: pytest.FixtureRequest) -> Any:
    """`close(ours, reference64, reference32)`: asserts `compare.error` < 1e-4 for each named tensor, and notes it."""
    from tests.golden import compare

    def check(ours: Any, reference64: Any, reference32: Any) -> None:
        noted = ERRORS.setdefault(request.path.name, {})
        bad = []
        for what, got, want, rough in zip(("outputs", "gradients"), ours, reference64, reference32, strict=True):
            assert set(got) == set(want)
            for name in want:
                for kind, a, b in (
                    ("ours to float64", got[name], want[name]),
                    ("ours to float32", got[name], rough[name]),
                    ("reference's float32 to its float64", rough[name], want[name]),
                ):
                    off = compare.error(a, b)
                    kind = f"{what}, {kind}"
                    noted[kind] = max(noted.get(kind, (-1.0, "")), (off, f"{request.node.name}: {name}"))
                    if kind.split(", ")[1].startswith("ours") and not off < compare.TOLERANCE:
                        bad.append(f"{kind}: {name} is {off:.1e} off")
        assert not bad, "\n".join(bad)

    return check


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist: the process that reports has run no test itself
        session.config.workeroutput["errors"] = ERRORS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    ERRORS.update(getattr(node, "workeroutput", {}).get("errors", {}))  # a file's tests are all run by one worker


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for file, kinds in ERRORS.items():
        terminalreporter.section(f"largest relative errors in {file}")
        for kind, (off, where) in sorted(kinds.items()):
            terminalreporter.write_line(f"{off:.1e}  {kind}  ({where})")
