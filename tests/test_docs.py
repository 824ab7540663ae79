"""The documentation shows programs that run, and every public name."""

import ast
import importlib
import importlib.util
import os
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import TypeVar

import jax
import pytest

import l0jax

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
LISTED = re.compile(r"^\.\. auto(?:class|function|data):: (\S+)$", re.MULTILINE)
# What the others are built on: it is read in the code.
INSIDE = {
    *("agnosticism", "axes", "derivatives", "encoding", "equivalence", "exporting"),
    *("kinds", "liveness", "narrowed", "poles", "polynomials", "program", "reading"),
    *("remembered", "rules", "symbolic", "terms", "values"),
}


def programs(page):
    """What a page shows of Python, as one program."""
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.M)
    return "\n".join(found)


SLOW = {"compare"}  # four runs of an experiment
READS_MNIST = {"pipelines"}
MNIST = Path(os.environ.get("TFDS_DATA_DIR", "nowhere")) / "mnist"


@pytest.mark.sweep
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=[pytest.mark.slow] if p.stem in SLOW else [], id=p.stem)
        for p in PAGES
        if programs(p)
    ],
)
def test_the_programs_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    if page.stem in READS_MNIST and not MNIST.is_dir():
        pytest.skip("no MNIST: TFDS_DATA_DIR names no folder with mnist prepared")
    monkeypatch.chdir(tmp_path)
    program = programs(page)
    name = "__main__" if "__main__" in program else page.stem
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        # So few steps leave gates undecided, and say so.
        warnings.filterwarnings("ignore", "gates are undecided", UserWarning)
        exec(compile(program, page.name, "exec"), {"__name__": name})
    assert capsys.readouterr().out


def public(module):
    """Names that a module makes, or gives under the same name."""
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.ImportFrom):
            yield from (a.name for a in node.names if a.asname == a.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (each.id for each in targets if isinstance(each, ast.Name))


def modules():
    """Those of the library that users import."""
    root = DOCS.parent / "l0jax"
    single = {f"l0jax.{p.stem}" for p in root.glob("*.py") if p.stem not in INSIDE}
    packages = {f"l0jax.{p.parent.name}" for p in root.glob("*/__init__.py")}
    return sorted((single | packages) - {"l0jax.__init__"})


def test_no_public_name_is_missing():
    listed = set()
    for page in (DOCS / "api").glob("*.md"):
        names = LISTED.findall(page.read_text())
        twice = [name for name in names if name in listed]
        assert not twice
        listed |= set(names)
    for name in modules():
        importlib.import_module(name)
        module = sys.modules[name]
        there = {
            n
            for n in public(module)
            if not n.startswith("_") and not isinstance(getattr(module, n), TypeVar)
        }
        here = {n.removeprefix(f"{name}.") for n in listed if n.startswith(f"{name}.")}
        # What the package itself has is listed as users write it.
        above = {
            n
            for n in there
            if f"l0jax.{n}" in listed and getattr(l0jax, n) is getattr(module, n)
        }
        missing = there - here - above
        assert not missing, f"docs/api lacks {name}.{min(missing)}"


def test_what_is_listed_is_there():
    for page in (DOCS / "api").glob("*.md"):
        for path in LISTED.findall(page.read_text()):
            name, _, what = path.rpartition(".")
            importlib.import_module(name)
            assert hasattr(sys.modules[name], what), f"{page.name}: no {path}"


def test_every_picture_of_the_results_stands_in_the_gallery_with_its_command():
    spec = importlib.util.spec_from_file_location("conf", DOCS / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    pictures = conf.pictures()
    assert None not in pictures, pictures[None]
    shown = {file for those in pictures.values() for _, file in those}
    root = DOCS.parent
    results = root / "experiments" / "results"
    there = {p for kind in ("png", "gif") for p in results.rglob(f"*.{kind}")}
    assert {str(p.relative_to(root)) for p in there} == shown


def test_every_page_is_reached():
    """From the index, by tables of contents."""
    shown = {"index"}
    for page in PAGES:
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.S):
            lines = [n for n in block.split("\n") if n and not n.startswith(":")]
            folder = page.parent.relative_to(DOCS)
            shown |= {str(folder / line) for line in lines}
    pages = {str(p.relative_to(DOCS).with_suffix("")) for p in PAGES}
    # The build puts them there.
    notebooks = (DOCS.parent / "notebooks").glob("*.ipynb")
    assert pages | {f"notebooks/{file.stem}" for file in notebooks} == shown


def test_formulas_of_docstrings_are_drawn():
    """Also those of several lines, between words that Markdown has."""
    from_markdown = runpy.run_path(str(DOCS / "conf.py"))["from_markdown"]
    lines = ["    For `a` and |b|", "", "    $$ |x| \\le \\frac{1}{n},", "       y $$"]
    from_markdown(None, "", "", None, None, lines)
    assert lines == [
        *(
            "    For ``a`` and \\|b\\|",
            "",
            "",
            "    .. math:: |x| \\le \\frac{1}{n}, y",
        ),
        "",
    ]
