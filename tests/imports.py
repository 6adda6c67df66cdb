"""The imports between the folders of the package: their order, which tests/test_structure.py checks, and a figure.

`python tests/imports.py [PICTURE.png]` (or `make imports`) draws the imports between folders and prints their lines of code.
"""
import ast, collections, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [p for p in sorted(ROOT.glob("nbs/**/*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
CHAPTERS = [p for p in NOTEBOOKS if p.parent.name not in ("runs", "experiments") and re.match(r"\d\d_", p.name)]
# folders in reading order: each imports only from earlier ones; inside a folder, from chapters with lower numbers
ORDER = ["core", "distributed", "show", "data/toy", "data", "space", "tasks", "metrics", "train", "rivals", "stages", "viz", "export", "zoo", "cli"]


def cells(path, kind="code"):
    "The cells of a notebook as (source, cell)."
    return [("".join(c["source"]), c) for c in json.loads(path.read_text("utf8"))["cells"] if c["cell_type"] == kind]


def is_exported(source): return re.match(r"#\s*\|\s*exporti?s?\b", source) is not None


def module_of(path):
    "The module that a notebook exports to, None if it exports nothing."
    return next((m[1] for source, _ in cells(path) if (m := re.search(r"#\s*\|\s*default_exp\s+([\w.]+)", source))), None)


MODULES = {module_of(p): p for p in CHAPTERS if module_of(p)}


def room(module):
    "The folder of a module, or its own name at the top level."
    return "/".join(module.split(".")[:-1]) or module


def place(module):
    "The position of a module in the reading order; modules import only from smaller positions."
    return ORDER.index(room(module)), int(MODULES[module].name[:2])


def package_imports(source):
    "The names of the modules of this package that a piece of code imports."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "a notebook says `from selfsupnas.x import`, without dots"
            module = (node.module or "").removeprefix("selfsupnas").removeprefix(".")
            if not (node.module or "").startswith("selfsupnas"): continue
            if module in MODULES: yield module
            else: yield from (f"{module}.{a.name}".removeprefix(".") for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("selfsupnas.") for a in node.names if a.name.startswith("selfsupnas."))


def wrong_imports(path, source):
    "The modules that exported code imports from its own position or a later one."
    own = place(module_of(path))
    return [module for module in package_imports(source) if module in MODULES and place(module) >= own]


def arrows():
    "Number of imports by (importing folder, imported folder)."
    found = collections.Counter()
    for module, path in MODULES.items():
        imported = {name for source, _ in cells(path) if is_exported(source) for name in package_imports(source) if name in MODULES}
        found.update((room(module), room(name)) for name in imported if room(name) != room(module))
    return found


def lines_of_rooms():
    "(modules, exported lines with comments and blanks) by folder."
    found = collections.defaultdict(lambda: [0, 0])
    for module in MODULES:
        text = (ROOT/"selfsupnas"/f"{module.replace('.', '/')}.py").read_text("utf8").splitlines()
        own = found[room(module)]
        own[0], own[1] = own[0] + 1, own[1] + len(text)
    return {name: tuple(found[name]) for name in ORDER if name in found}


def draw(to):
    """Save the picture: a row for each folder in reading order, an arrow to each folder that it imports from, with the number of imports.

    All arrows point to the left, to earlier folders; one that points to the right would be red. Returns the number of those.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    lines, counts = lines_of_rooms(), arrows()
    names = list(lines)
    fig, (ax, bars) = plt.subplots(1, 2, figsize=(12, 7), dpi=100, width_ratios=(3, 1), sharey=True, layout="constrained")
    for i, name in enumerate(names):
        ax.axhline(i, color="0.93", lw=1, zorder=0)
        ax.plot(i, i, "s", ms=17, color="#56B4E9", zorder=1)
    for (importing, imported), count in counts.items():
        i, j = names.index(importing), names.index(imported)
        colour = "0.55" if j < i else "#D55E00"
        ax.annotate("", (j, i), (i, i), arrowprops=dict(arrowstyle="-|>", color=colour, lw=1, shrinkA=9, shrinkB=11), zorder=2)
        ax.text(j, i, count, ha="center", va="center", fontsize=10, bbox=dict(boxstyle="circle,pad=.2", fc="w", ec=colour), zorder=3)
    ax.set_xticks(range(len(names)), names, rotation=60, ha="left", fontsize=11)
    ax.xaxis.tick_top(); ax.xaxis.set_label_position("top")
    ax.set_yticks(range(len(names)), names, fontsize=11)
    ax.set_xlabel("imported folder"); ax.set_ylabel("importing folder")
    ax.set_xlim(-.7, len(names) - .3); ax.invert_yaxis()
    bars.barh(range(len(names)), [count for _, count in lines.values()], height=.5, color="#56B4E9")
    for i, (modules, count) in enumerate(lines.values()): bars.text(count + 20, i, f"{count:,} in {modules}", va="center", fontsize=10)
    bars.set_xlabel("exported lines, in modules"); bars.set_xlim(0, 1.35 * max(count for _, count in lines.values()))
    for axes in (ax, bars): axes.spines[:].set_visible(False); axes.tick_params(length=0)
    wrong = sum(names.index(importing) <= names.index(imported) for importing, imported in counts)
    fig.suptitle(f"Imports between folders: {sum(counts.values())} in {len(counts)} arrows, {wrong} against the reading order")
    fig.savefig(to)
    return wrong


if __name__ == "__main__":
    to = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT/"nbs"/"figures"/"imports.png"
    to.parent.mkdir(parents=True, exist_ok=True)
    wrong = draw(to)
    rooms = lines_of_rooms()
    for name, (modules, count) in rooms.items(): print(f"{name:12} {modules:3} {'module ' if modules == 1 else 'modules'} {count:7,} lines")
    print(f"{'in all':12} {sum(m for m, _ in rooms.values()):3} modules {sum(n for _, n in rooms.values()):7,} lines; {len(arrows())} arrows, {wrong} against the order; {to}")
    raise SystemExit(bool(wrong))
