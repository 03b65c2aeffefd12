"""The notebooks run from top to bottom without a network, and each is what a reader in Colab needs.

They are committed with their outputs, so that they can be read where nothing runs. After a change:

  python -m tests.test_notebooks            # runs all and writes their outputs; or name some
"""

import base64
import json
import os
import pathlib
import re
import sys
import tempfile
import tomllib
from typing import Any

import pytest

from tests import quick

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
# In this order, as they share a folder: what train_tiny has trained, the others find.
NAMES = ("train_tiny", "quickstart", "features_by_layer", "convert_weights", "mesh_layouts", "vlm_chat")
TRAIN = ("train_tiny", "features_by_layer")
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
SECONDS = 300  # for one cell, on a busy machine
MOST_LINES, MOST_BYTES = 25, 300_000


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def execute(name: str, folder: pathlib.Path, flags: str) -> dict[str, Any]:
    """The notebook with the outputs of a run in `folder` with these flags of XLA; raises if a cell does."""
    import nbformat
    from nbclient import NotebookClient

    notebook: Any = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    # No network; weights that may lie on this machine are not found either.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PE_JAX_CACHE": str(folder / "cache")}
    env["XLA_FLAGS"] = flags
    env.pop("MPLBACKEND", None)
    place: Any = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources=place,
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env=env)
    return notebook


def test_every_notebook_of_the_folder_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_begins_with_its_badge_and_one_install_cell(name):
    cells = read(name)["cells"]
    repository = ADDRESS.removeprefix("https://github.com/")
    badge = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb"
    assert f"({badge})" in source(cells[0])
    installs = [i for i, cell in enumerate(cells) if re.search(r"(%|!)\s*pip|pip install -q", source(cell))]
    assert installs == [1]
    assert f"git+{ADDRESS}" in source(cells[1])
    assert 'find_spec("pe_jax") is None' in source(cells[1])  # nothing is touched where it is installed


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_short_cells_explained_and_small(name):
    notebook = read(name)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES
    text = json.dumps(notebook)
    assert not re.search(r"/(home|root|work|tmp|Users|content)/", text), "a path of a machine"
    before = None
    for cell in notebook["cells"]:
        assert len(source(cell).splitlines()) <= MOST_LINES, source(cell)[:80]
        # At most two code cells in a row: a reader is told what comes, and what to look at after it.
        kinds = (before, cell["cell_type"])
        run = run + 1 if kinds == ("code", "code") else 1
        assert run <= 2, source(cell)[:80]
        before = cell["cell_type"]
    for link in re.findall(r"\]\((?!http)([^)]+)\)", " ".join(map(source, notebook["cells"]))):
        assert (FOLDER / link).exists(), link


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_kept_are_those_of_one_run_from_the_top(name):
    cells = code_cells(read(name))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures or name == "convert_weights"
    assert all(len(base64.b64decode(picture)) < 100_000 for picture in pictures)


def test_the_stand_in_model_is_the_same_wherever_it_is_defined():
    definitions = {source(cell) for name in NAMES for cell in code_cells(read(name)) if "def tiny(" in source(cell)}
    assert len(definitions) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_top_to_bottom_without_a_network(name, folder):
    notebook = execute(name, folder, quick.flags(trains=name in TRAIN))
    assert [cell["execution_count"] for cell in code_cells(notebook)] == [
        cell["execution_count"] for cell in code_cells(read(name))
    ]


def main(names: list[str]) -> None:
    """Runs notebooks and writes them with their outputs."""
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        for name in names or NAMES:
            executed = execute(name, pathlib.Path(folder), "")
            notebook: Any = nbformat.from_dict(json.loads(json.dumps(executed).replace(f"{folder}/", "")))
            notebook["metadata"]["language_info"] = {"name": "python"}  # not the version that happened to run it
            nbformat.write(notebook, FOLDER / f"{name}.ipynb")
            print(f"{name}: {(FOLDER / f'{name}.ipynb').stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
