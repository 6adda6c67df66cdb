"""The documentation by Sphinx, `make docs`: the notebooks in reading order, and the API."""
import ast, configparser, re
from pathlib import Path

import nbformat
from docutils import nodes
from fastcore.docments import docments
from latex2mathml.converter import convert
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform

from selfsupnas._modidx import d as index

HERE = Path(__file__).parent
settings = configparser.ConfigParser()
settings.read(HERE.parent/"settings.ini")
project, author, release = (settings["DEFAULT"][key] for key in ("title", "author", "version"))
extensions = ["sphinx_external_toc", "myst_nb", "sphinx.ext.autodoc"]
external_toc_path = "_toc.yml"
exclude_patterns = ["runs/recipes", "**/.ipynb_checkpoints"]

nb_execution_mode = "off" # outputs are committed
nb_ipywidgets_js = {} # explorers show their pictures
nb_merge_streams = True
nb_render_markdown_format = "myst" # of outputs: their links lead to pages, too
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = True
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "sphinx_book_theme"
html_title = project
html_theme_options = {"use_download_button": False, "show_navbar_depth": 1,
                      "home_page_in_toc": True, "navbar_persistent": []}
html_static_path, html_css_files = ["_static"], ["docs.css"]
html_math_renderer = "mathml"
html_show_sphinx = False

autodoc_default_options = {"members": True, "undoc-members": False}
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
default_role = "code" # docstrings write names in single backticks

# ---- API pages: one for each module

def write_api():
    "Write api/MODULE.md for each module; other files there are removed."
    folder = HERE/"api"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.md"): old.unlink()
    for module in index["syms"]:
        name = module.removeprefix("selfsupnas.")
        (folder/f"{name}.md").write_text(
            f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n", "utf8")

write_api()

def as_rst(text: str) -> str:
    "A docstring whose only markup is `code`."
    parts = re.split("(`[^`]*`)", text) # every second one is code
    parts[::2] = [re.sub(r"([*_|\\])", r"\\\1", part) for part in parts[::2]]
    return re.sub(r"(`[^`]*`)(?=\w)", r"\1\\ ", "".join(parts))

def add_docments(app, what, name, obj, options, lines):
    "Append the comments of the parameters to a docstring."
    if lines: lines[:] = as_rst("\n".join(lines)).split("\n")
    if what not in ("function", "class", "method"): return
    try: documents = docments(obj, full=True)
    except (TypeError, OSError, SyntaxError): return # not written in Python
    fields = [f":{'returns' if name == 'return' else f'param {name}'}: {as_rst(found.docment)}"
              for name, found in documents.items() if found.docment and name != "self"]
    if fields: lines += ["", *(" ".join(field.split()) for field in fields), ""]

# ---- Notebooks: what is shown of a cell

def is_setup(source: str) -> bool:
    "Does a cell only import or assert?"
    try: body = ast.parse(source).body
    except SyntaxError: return False # a magic
    return bool(body) and all(isinstance(s, (ast.Import, ast.ImportFrom, ast.Assert)) for s in body)

def prepare_cells(app, docname, source):
    "Fold imports and assertions, leave directives of nbdev out."
    if Path(app.env.doc2path(docname)).suffix != ".ipynb": return
    source[0] = source[0].replace("../CONTRIBUTING.md", "contributing.md")
    notebook = nbformat.reads(source[0], 4)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            # JupyterLab keeps the case and the commas of a heading in its anchor, GitHub does not
            cell.source = re.sub(r"\]\(#[^)]*\)", lambda link: link[0].lower().replace(",", ""),
                                 cell.source)
            continue
        directives = re.findall(r"^#\| *(\w+)", cell.source, re.M)
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        tags = cell.metadata.setdefault("tags", [])
        if "default_exp" in directives or not cell.source: tags.append("remove-cell")
        elif docname == "index": # the front page is the README
            tags.append("remove-input" if cell.outputs else "remove-cell")
        elif "hide" in directives or is_setup(cell.source): tags.append("hide-input")
    source[0] = nbformat.writes(notebook)

# ---- Links from names in text, and formulas

NAMES = {module: [module] for module in index["syms"]} # text -> what it may name
for module, symbols in index["syms"].items():
    for symbol in symbols: NAMES.setdefault(symbol.removeprefix(f"{module}."), []).append(symbol)

class LinkNames(SphinxTransform):
    "`name` in a text links to what a module exports under that name, if only one does."
    default_priority = 500

    def apply(self, **kwargs):
        for node in list(self.document.findall(nodes.literal)):
            found = NAMES.get(node.astext().removesuffix("()"), ())
            if len(found) != 1 or isinstance(node.parent, (nodes.reference, pending_xref)): continue
            link = pending_xref("", refdomain="py", reftype="obj", reftarget=found[0],
                                refdoc=self.env.docname, refwarn=False)
            node.replace_self(link)
            link += node

def visit_math(self, node):
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode

def visit_math_block(self, node):
    self.body.append(f"<div class=\"math\">{convert(node.astext(), display='block')}</div>")
    raise nodes.SkipNode

def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.add_transform(LinkNames)
    app.connect("source-read", prepare_cells)
    app.connect("autodoc-process-docstring", add_docments)
