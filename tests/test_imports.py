"""Which way imports flow (CONTRIBUTING.md), checked on the source itself."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "pe_jax"

# room: what it may import from pe_jax besides itself, `types` and `paths`
MAY_IMPORT = {
    "types": set(),
    "paths": set(),
    "sharding": set(),
    "losses": {"sharding"},
    "gradients": {"sharding"},
    "models": {"sharding"},
    "stages": {"models", "losses", "gradients"},
    "optim": set(),
    "checkpoint": set(),
    "metrics": set(),
    "profiling": set(),
    "data": set(),
    "hub": set(),
    "convert": {"models", "data", "checkpoint"},
    "evals": {"models", "data", "sharding"},
    "engine": {"models", "data", "checkpoint"},
}
FORBIDDEN_EVERYWHERE = {"torch", "tensorflow", "experiments", "tpu", "tests"}
# A harness whose functions take torch tensors: its adapter makes them, inside its functions, and nothing imports it.
MAY_ALSO_IMPORT = {"interop/clip_benchmark.py": {"torch"}}


def modules() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = imported(path)
    roots = {name.split(".")[0] for name in names}
    forbidden = FORBIDDEN_EVERYWHERE - MAY_ALSO_IMPORT.get(str(path.relative_to(PACKAGE)), set())
    assert not roots & forbidden, f"{path.name} imports {roots & forbidden}"
    assert room == "interop" or not any(name.startswith("pe_jax.interop") for name in names), path
    if room in MAY_IMPORT:
        rooms = {name.split(".")[1] for name in names if name.startswith("pe_jax.")}
        assert rooms <= MAY_IMPORT[room] | {room, "types", "paths"}, f"{path.relative_to(ROOT)} reaches into {rooms}"


@pytest.mark.parametrize("room", ["sharding", "losses", "gradients", "models", "stages"])
def test_what_runs_on_the_chip_needs_only_jax_flax_and_small_libraries(room):
    """GPU machines have no grain, tfds, clu or ml_collections."""
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else sorted((PACKAGE / room).glob("*.py"))
    heavy = {"grain", "tensorflow_datasets", "clu", "ml_collections", "array_record", "PIL", "ftfy"}
    for path in files:
        assert not {name.split(".")[0] for name in imported(path)} & heavy, path


def test_importing_pe_jax_loads_neither_torch_nor_tensorflow():
    code = "import sys, pe_jax.train, pe_jax.api, pe_jax.evals, pe_jax.interop.clip_benchmark"
    code += "; print({'torch', 'tensorflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"


def test_no_room_is_called_utils():
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [path for path in modules() if path.stem in vague]


def test_mesh_axes_are_named_in_sharding_alone():
    for path in modules():
        if path.name == "sharding.py" or "commands" in path.parts:
            continue
        text = path.read_text()
        assert '"fsdp"' not in text, path
