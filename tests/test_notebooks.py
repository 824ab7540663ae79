"""Notebooks run from top to bottom, and are committed with what they gave."""

import base64
import json
import re
from pathlib import Path

import jupytext
import nbformat
import pytest

from experiments import notebooks

FOLDER = Path(__file__).parent.parent / "notebooks"
# Several times what one takes on a core of its own.
SECONDS = 300

every_notebook = pytest.mark.parametrize(
    "notebook", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem
)


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
    there = {file.stem for file in FOLDER.glob("*.ipynb")}
    assert "quickstart" in there
    assert {file.stem for file in FOLDER.glob("*.py")} == there


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs_and_shows_pictures(notebook, own_jupyter):
    executed = notebooks.execute(notebook, SECONDS)
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells if cell.source.strip())
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@every_notebook
def test_a_notebook_holds_what_it_gave(notebook):
    """Run once from top to bottom; no picture is large, and no place of the machine
    that ran it is told."""
    cells = json.loads(notebook.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code" and "".join(c["source"])]
    counts = [cell["execution_count"] for cell in code]
    assert counts == list(range(1, len(code) + 1)), "python -m experiments.notebooks"
    outputs = [output for cell in code for output in cell["outputs"]]
    pictures = [
        o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", ())
    ]
    assert pictures
    for picture in pictures:
        assert len(base64.b64decode(picture)) <= 150_000
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        said = "".join(output.get("text", ()))
        assert not re.search(r"(?<![\w.:/])/\w+/\w+", said), said


def test_a_notebook_that_fails_is_left_as_it_was(tmp_path, monkeypatch, own_jupyter):
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    (tmp_path / "one.py").write_text("# %%\nprint(6 * 7)\n")
    file = notebooks.write("one")
    (cell,) = nbformat.read(file, as_version=4).cells
    assert cell.outputs[0].text == "42\n"
    before = file.read_text()
    assert notebooks.write("one").read_text() == before
    (tmp_path / "one.py").write_text("# %%\nprint(1 / 0)\n")
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        notebooks.main(("one",))
    assert file.read_text() == before
    with pytest.raises(SystemExit, match="no notebook 'two'; there is one"):
        notebooks.main(("two",))


@every_notebook
def test_a_notebook_is_paired_with_its_source(notebook):
    """If not, `python -m experiments.notebooks` makes it anew."""
    two = [jupytext.read(file) for file in (notebook, notebook.with_suffix(".py"))]
    cells, source = ([(c.cell_type, c.source) for c in one.cells] for one in two)
    assert cells == source
    for one in two:
        assert one.metadata["jupytext"]["formats"] == "ipynb,py:percent"
