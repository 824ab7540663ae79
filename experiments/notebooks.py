"""Runs the notebooks, and puts what they say and draw into them.

    python -m experiments.notebooks                  # all, in some minutes
    python -m experiments.notebooks quickstart       # one

A notebook is made from its source, `notebooks/NAME.py`, and run from top to bottom by
this interpreter, in an environment with the extra `tests`. One that fails is left as it
was.
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jupytext
import nbformat
import tyro
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

FOLDER = Path(__file__).parent.parent / "notebooks"


class SameInterpreter(AsyncKernelManager):
    """Kernels of the interpreter that runs this, whatever Jupyter knows of."""

    @property
    def kernel_spec(self) -> KernelSpec:
        launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=launch, display_name="Python 3", language="python")


def execute(source: Path, seconds: int = 3600) -> nbformat.NotebookNode:
    """A notebook with its outputs.

    Args:
        source: the notebook, or its source in Python.
        seconds: for all its cells.

    Raises:
        CellExecutionError: if a cell fails.
        CellTimeoutError: if there is no time left.
    """
    end = time.monotonic() + seconds
    notebook: Any = jupytext.read(source)
    client = NotebookClient(
        notebook,
        kernel_manager_class=SameInterpreter,
        # 0 would be no limit.
        timeout_func=lambda cell: max(end - time.monotonic(), 0.1),
        # When it ran would differ each time.
        record_timing=False,
        resources={"metadata": {"path": str(source.parent)}},
    )
    return client.execute()


def write(name: str) -> Path:
    """Runs a notebook and stores it with its outputs.

    Raises:
        FileNotFoundError: if it has no source.
    """
    source = FOLDER / f"{name}.py"
    if not source.exists():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.py")))
        raise FileNotFoundError(f"no notebook {name!r}; there is {known}")
    file = source.with_suffix(".ipynb")
    executed = execute(source)
    for number, cell in enumerate(executed.cells):
        # (Names that are drawn by chance would be others each time.)
        cell["id"] = f"cell-{number}"
    # (The version of Python stands there otherwise.)
    executed.metadata.pop("language_info", None)
    text = nbformat.writes(nbformat.from_dict(executed), version=4)
    file.write_text(text if text.endswith("\n") else f"{text}\n")
    return file


def main(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
) -> None:
    """Runs notebooks by name, by default all."""
    for name in tqdm(names or sorted(file.stem for file in FOLDER.glob("*.py"))):
        try:
            tqdm.write(str(write(name)))
        except (FileNotFoundError, CellExecutionError) as error:
            raise SystemExit(f"experiments.notebooks: {error}") from None


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
