"""Notebooks run from top to bottom, and are committed without what running left."""

import json
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
# Several times what one takes on a core of its own.
SECONDS = 300

every_notebook = pytest.mark.parametrize(
    "notebook", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem
)


class SameInterpreter(AsyncKernelManager):
    """Kernels of the interpreter that runs the tests, whatever Jupyter knows of."""

    @property
    def kernel_spec(self):
        launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=launch, display_name="Python 3", language="python")


def execute(notebook, folder, seconds):
    """The notebook after running it in `folder`, within a limit for all its cells."""
    end = time.monotonic() + seconds
    client = NotebookClient(
        nbformat.read(notebook, as_version=4),
        kernel_manager_class=SameInterpreter,
        # 0 would be no limit.
        timeout_func=lambda cell: max(end - time.monotonic(), 0.1),
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute()


@pytest.fixture
def own_jupyter(monkeypatch, tmp_path):
    """A Jupyter and a Matplotlib that hold no settings of whoever runs the tests."""
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("JUPYTER_PATH", raising=False)
    # The kernel chooses a backend that puts pictures into the notebook.
    monkeypatch.delenv("MPLBACKEND", raising=False)


def test_there_is_a_notebook_and_each_has_its_source():
    notebooks = {file.stem for file in FOLDER.glob("*.ipynb")}
    assert "quickstart" in notebooks
    assert {file.stem for file in FOLDER.glob("*.py")} == notebooks


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs_and_shows_pictures(notebook, own_jupyter):
    executed = execute(notebook, FOLDER, SECONDS)
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells if cell.source.strip())
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@every_notebook
def test_outputs_are_stripped(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@every_notebook
def test_a_notebook_is_paired_with_its_source(notebook):
    """If not, `jupytext --sync notebooks/*.py` makes them the same."""
    two = [jupytext.read(file) for file in (notebook, notebook.with_suffix(".py"))]
    cells, source = ([(c.cell_type, c.source) for c in one.cells] for one in two)
    assert cells == source
    for one in two:
        assert one.metadata["jupytext"]["formats"] == "ipynb,py:percent"
