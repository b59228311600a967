"""The notebooks run from top to bottom, and are committed with the figures of such a run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import conftest
import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = {
    "01_quickstart.ipynb": 4,
    "02_embed_a_kernel.ipynb": 4,
    "03_sweeps.ipynb": 4,
    "04_text_by_rl.ipynb": 3,
}
"""Name -> number of figures."""
COMPUTES_LITTLE = ("02_embed_a_kernel.ipynb",)
MAX_BYTES = 600_000


def figures(notebook) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel in this interpreter, whatever kernels the machine has registered."""
    folder = tmp_path / "jupyter" / "kernels" / "jrl-test"
    folder.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "jrl test", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    return folder.name


def test_every_notebook_is_listed():
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == sorted(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_without_an_error(name, kernel, tmp_path):
    """The cells themselves assert what they show: returns reached, values learned."""
    notebook = nbformat.read(FOLDER / name, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    resources = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(notebook, timeout=240, kernel_name=kernel, resources=resources)
    # that of a user, but for how it compiles: the notebook sets NPROC itself, before it imports jax
    environ = {name: value for name, value in os.environ.items() if name not in ("NPROC", "XLA_FLAGS")}
    level = 0 if name in COMPUTES_LITTLE else 1
    client.execute(env=conftest.quickly_compiled(environ, level=level))
    assert figures(notebook) == NOTEBOOKS[name]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_committed_with_the_outputs_of_one_run(name):
    path = FOLDER / name
    assert path.stat().st_size < MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert figures(notebook) == NOTEBOOKS[name]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output
        assert "/site-packages/" not in str(output)
