"""README.md from nbs/index.ipynb: `python tests/readme.py [ADDRESS]` (or `make readme ADDRESS=...`).

The index is executed, and its prose and the Markdown that its cells make become the README. With the address of the
repository (https://github.com/OWNER/NAME), the index and the tour get it first, for the links to Colab and Binder.
"""
import json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INDEX, NO_ADDRESS = ROOT/"nbs"/"index.ipynb", "REPOSITORY-ADDRESS"


def readme_of(cell):
    "What a cell of the index is in the README: its prose, or the Markdown that it makes, with links from the root."
    texts = ["".join(cell["source"])] if cell["cell_type"] == "markdown" else ["".join(o["data"]["text/markdown"]) for o in cell["outputs"] if "text/markdown" in o.get("data", {})]
    return [re.sub(r"\]\((?!\.\./|http)", "](nbs/", text).replace("](../", "](") for text in texts]


def readme(cells):
    "The text of the README."
    return "\n\n".join(part for cell in cells for part in readme_of(cell)) + "\n"


def main(address=None):
    import nbformat
    from nbclient import NotebookClient
    from nbdev.clean import clean_nb, process_write
    for file in (INDEX, ROOT/"nbs"/"00_tour.ipynb") if address else ():
        file.write_text(file.read_text("utf8").replace(NO_ADDRESS, address), "utf8")
    notebook = nbformat.read(INDEX, 4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": INDEX.parent}}).execute()
    nbformat.write(notebook, INDEX)
    process_write("cannot clean", clean_nb, INDEX, INDEX)
    (ROOT/"README.md").write_text(readme(json.loads(INDEX.read_text("utf8"))["cells"]), "utf8")


if __name__ == "__main__": main(*sys.argv[1:])
