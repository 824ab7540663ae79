"""Law 9: imports flow downward, and three files touch the disk."""

import ast
import graphlib
import pathlib
import pydoc
import tomllib
from pathlib import Path

import pytest

import l0jax

(PACKAGE,) = map(pathlib.Path, l0jax.__path__)
FILES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
# From the ground up; a module imports from lower layers, or from its own package.
LAYERS = (
    ("units", "gates", "axes", "symbolic", "liveness", "derivatives", "files"),
    ("values", "polynomials", "encoding"),
    ("rules",),
    ("program",),
    ("poles", "terms"),
    ("reading", "kinds"),
    ("structure",),
    ("tracing", "narrow", "dataflow"),
    ("gating", "costs", "equivalence", "unstacking"),
    (
        "objectives",
        "models",
        "compaction",
        "estimators",
        "exporting",
        "remembered",
        "narrowed",
    ),
    ("constraints",),
    ("nnx", "linen"),
    ("report", "storage", "checkpoints", "methods", "agnosticism"),
    ("train",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
ALLOWED = {"jax", "flax", "optax", "numpy", "jaxtyping"}
TOUCH_THE_DISK = ("files", "storage", "checkpoints")
# And the few that one file has a use for.
ONLY_IN = {
    "storage": {"hashlib", "pathlib", "jax2onnx", "onnxruntime"}
    | {"os", "subprocess", "sys", "warnings"},
    "checkpoints": {"pathlib", "warnings", "concurrent"},
    "files": {"os", "pathlib"},
    # To read and write bytes, of which storage makes files.
    "encoding": {"hashlib", "json"},
    # To say on which line of the user's code something is.
    "program": {"os"},
    "reading": {"pathlib", "traceback"},
    # To find the symbols in a size, and what it is.
    "symbolic": {"ast", "re"},
    # To measure, and to draw.
    "report": {"time", "statistics", "matplotlib"},
    # To find the sharpness at which a pair leaves as much as it is told.
    "gates.mixture": {"scipy"},
    # Kendall's tau.
    "agnosticism": {"scipy"},
    # To see whether a loss asks for a key, and to say what one should know.
    "train.training": {"warnings"},
    "train.tasks": {"inspect"},
    "train.resuming": {"pathlib", "warnings"},
    "train.deciding": {"warnings"},
    "train.compacting": {"warnings"},
    "train.placement": {"re"},
    # An extra, for data that don't fit into memory.
    "train.streams": {"grain", "absl"},
    # The LASSO.
    "methods.channel_pruning": {"sklearn"},
}
# What the standard library offers a pure function.
PURE = {
    "abc",
    "collections",
    "contextlib",
    "copy",
    "dataclasses",
    "enum",
    "functools",
    "itertools",
    "math",
    "operator",
    "types",
    "typing",
    "zlib",
}

sweep = pytest.mark.parametrize("module", FILES)


def imported(file):
    """Every module that is imported anywhere in a file, by its full dotted name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def layer_of(dotted):
    return dotted.split(".")[0]


def test_every_module_has_its_layer():
    found = {layer_of(module) for module in FILES} - {"__init__"}
    assert found == set(RANK)


@sweep
def test_imports_flow_downward(module):
    own = layer_of(module)
    if own == "__init__":
        return
    for name in imported(FILES[module]):
        if name.split(".")[0] != "l0jax":
            continue
        other = layer_of(name.removeprefix("l0jax").removeprefix("."))
        assert other in RANK, f"{module} imports all of l0jax"
        assert other == own or RANK[other] < RANK[own], f"{module} imports {name}"


@sweep
def test_outside_imports_are_the_few_that_are_allowed(module):
    allowed = ALLOWED | PURE | ONLY_IN.get(module, set()) | {"l0jax"}
    found = {name.split(".")[0] for name in imported(FILES[module])}
    assert found <= allowed, f"{module} imports {found - allowed}"


@sweep
def test_nothing_prints_or_opens_files(module):
    # What reads or writes a file, the clock, the network or the terminal.
    called = {
        node.func.id
        for node in ast.walk(ast.parse(FILES[module].read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    forbidden = {"print", "input", "breakpoint", "exec", "eval"}
    if module not in TOUCH_THE_DISK:
        forbidden |= {"open"}
    assert not called & forbidden
    attributes = {
        node.attr
        for node in ast.walk(ast.parse(FILES[module].read_text()))
        if isinstance(node, ast.Attribute)
    }
    verbs = {"savez", "tofile", "fromfile", "memmap", "write_text", "read_text"}
    verbs |= {"write_bytes", "read_bytes", "mkdir", "unlink", "savetxt", "loadtxt"}
    if module not in TOUCH_THE_DISK:
        assert not attributes & verbs
    assert not attributes & {"stdout", "stderr", "debug"}


@sweep
def test_gates_know_of_nothing_else(module):
    if layer_of(module) == "gates":
        for name in imported(FILES[module]):
            assert not name.startswith("l0jax") or name.startswith("l0jax.gates")


def imported_at_once(module):
    """What importing a file imports, unless it is within a function."""
    return {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.parse(FILES[module].read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def test_report_imports_matplotlib_only_to_draw():
    """It is no dependency, and takes a second."""
    every = set(imported(FILES["report"]))
    assert any(name.startswith("matplotlib") for name in every)
    top = imported_at_once("report")
    assert not any(name.startswith("matplotlib") for name in top)


def test_what_the_package_offers_is_listed_and_there():
    assert {*l0jax.__all__} >= {"trace", "narrow", "report", "train", "costs"}
    for name in l0jax.__all__:
        assert getattr(l0jax, name) is not None
    shown = pydoc.plain(pydoc.render_doc(l0jax))
    assert "trace(apply" in shown
    assert (PACKAGE / "py.typed").exists()


def test_the_wheel_holds_the_library_alone():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["l0jax"]
    for file in (*project["project"]["license-files"], "CITATION.cff", "CHANGELOG.md"):
        assert (PACKAGE.parent / file).stat().st_size > 500


# --------------------------------------------------------------------- the experiments

STUDIES = Path(__file__).parent.parent / "experiments"


def needs(file):
    """Files of the experiments that one imports when it is imported."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("experiments"):
            for alias in node.names:
                parts = f"{node.module}.{alias.name}".split(".")[1:]
                for end in (len(parts), len(parts) - 1):
                    there = STUDIES.joinpath(*parts[:end]).with_suffix(".py")
                    if end and there.exists():
                        yield there


def test_no_import_needs_a_device(run_python):
    """Or processes could not join others any more (`jax.distributed.initialize`), nor
    flags be set."""
    modules = sorted(
        ".".join(file.relative_to(STUDIES.parent).with_suffix("").parts)
        for file in STUDIES.rglob("*.py")
        if "tracr" not in file.parts  # run in an environment of its own
    )
    program = (
        "import importlib, sys\n"
        "from jax._src import xla_bridge\n"
        f"for name in ['l0jax', *{modules}]:\n"
        "    importlib.import_module(name)\n"
        "    assert not xla_bridge.backends_are_initialized(), name\n"
    )
    run_python(program)


def test_no_study_needs_itself():
    graph = {file: set(needs(file)) for file in STUDIES.rglob("*.py")}
    assert sum(map(len, graph.values())) > 50
    list(graphlib.TopologicalSorter(graph).static_order())


def test_shared_parts_need_no_study():
    for folder in ("harness", "tasks"):
        for file in (STUDIES / folder).glob("*.py"):
            assert all(there.parent != STUDIES for there in needs(file)), file


def test_files_of_experiments_are_short():
    for file in STUDIES.rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 400, file
