"""How Sphinx builds the documentation.

    pip install -c constraints.txt -e ".[docs]" && sphinx-build -W docs docs/_build

Nothing is fetched: notebooks are shown with the outputs that are stored in them.
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

project = "l0jax"
author = copyright = "the l0jax developers"
html_title = "l0jax"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# MathJax lies beside the pages.
extensions += ["sphinx-mathjax-offline"]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "sphinx_book_theme"
html_theme_options = {"show_toc_level": 2}
html_static_path = ["static"]
html_css_files = ["narrower.css"]

myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "off"

# Docstrings have Markdown's single backquotes for code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
# Shapes say more than what they are annotations of; defaults are shown as written.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def registry(app, what, name, obj, options, lines):
    """A constant without a docstring has that of its type: what is in it says more."""
    said = "\n".join(lines).strip()
    if what != "data" or said not in {
        (each.__doc__ or "").strip() for each in (obj, type(obj))
    }:
        return
    members = obj if isinstance(obj, dict | tuple | list) else []
    known = ", ".join(f"`{each}`" for each in members if isinstance(each, str))
    lines[:] = [f"There is {known}."] if known else []


def from_markdown(app, what, name, obj, options, lines):
    """Code, formulas and links of docstrings, as reStructuredText has them."""
    text, formulas = "\n".join(lines), []

    def set_aside(found):
        indent, formula = found[1], " ".join(found[2].split())
        formulas.append(f"\n{indent}.. math:: {formula}\n")
        return f"\0{len(formulas) - 1}\0"

    text = re.sub(
        r"^( *)\$\$(.+?)\$\$", set_aside, text, flags=re.DOTALL | re.MULTILINE
    )
    text = re.sub(r"(?<![`:])`([^`]+)`(?!`)", r"``\1``", text)
    text = re.sub(r"(?<![\\$`])\$([^$]+)\$(?!\$)", r":math:`\1`", text)
    text = re.sub(r"\[([^\]]+)\]\((https?://[^)]+)\)", r"`\1 <\2>`__", text)
    # Bars are of absolute values and sizes.
    code_or_bar = r"(``.*?``|:math:`.*?`)|\|(?=\S)|(?<=\S)\|"
    text = re.sub(code_or_bar, lambda m: m[1] or r"\|", text, flags=re.DOTALL)
    text = re.sub("\0(\\d+)\0", lambda m: formulas[int(m[1])], text)
    lines[:] = text.split("\n")


SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Warns", "Yields")


def examples(app, what, name, obj, options, lines):
    """What is indented is code, where it is no section's."""
    found, last = [], ""
    for at, line in enumerate(lines):
        begins = line.startswith("    ") and not (at and lines[at - 1].strip())
        if begins and not last.startswith(" ") and last.rstrip(":") not in SECTIONS:
            found += ["::", ""]
        last = line or last
        found.append(line)
    # (Of a property napoleon takes what stands before a colon for its type, unless it
    # begins with an empty line.)
    lines[:] = ["", *found] if what in ("property", "attribute") else found


def signature(app, what, name, obj, options, signature, returns):
    """Without the places where annotations come from."""

    def short(text):
        return text and re.sub(r"~?(?:jaxlib\._jax|jaxtyping|numpy)\.", "", text)

    return short(signature), short(returns)


def results(app, docname, source):
    """The page of results is what `experiments.tables` prints; of what it links to,
    files of data are copied beside it, and texts are named."""
    if docname != "results":
        return
    text = (ROOT / "RESULTS.md").read_text()
    app.env.note_dependency(str(ROOT / "RESULTS.md"))
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((experiments/[^)]+\.md)\)", r"\1 (`\2`)", text)
    source[0] = re.sub(r"\]\(((?:experiments|benchmarks)/)", r"](../\1", text)


def pictures():
    """Those of `RESULTS.md` by the command that makes them: the last before each."""
    found, command = {}, None
    told = r"`(python -m (?:experiments|benchmarks)[^`]*)`|!\[([^\]]*)\]\(([^)]*)\)"
    for made_by, what, file in re.findall(told, (ROOT / "RESULTS.md").read_text()):
        if made_by:
            command = made_by
        else:
            found.setdefault(command, []).append((what, file))
    return found


def gallery(app, docname, source):
    """Every picture of the results, two in a line, below its command."""
    if docname != "gallery":
        return
    app.env.note_dependency(str(ROOT / "RESULTS.md"))
    for command, those in pictures().items():
        shown = [f'![{what}](../{file}){{width="49%"}}' for what, file in those]
        source[0] += "\n".join(["", "```sh", command, "```", "", *shown, ""])


def notebooks(app, config):
    """Sphinx reads what lies below its own folder."""
    here = Path(app.srcdir) / "notebooks"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy2(file, here)


def links(app, docname, source):
    """To notebooks they are those of the repository."""
    source[0] = source[0].replace("../notebooks/", "notebooks/")


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", registry, priority=90)
    app.connect("autodoc-process-docstring", from_markdown, priority=100)
    app.connect("autodoc-process-docstring", examples, priority=110)
    app.connect("autodoc-process-signature", signature)
    app.connect("source-read", results)
    app.connect("source-read", gallery)
    app.connect("source-read", links)
    app.connect("config-inited", notebooks)
