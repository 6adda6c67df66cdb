"README.md says what nbs/index.ipynb says, its table is that of the committed records, and what it tells a newcomer to type works."
import json, re, shlex

import pytest
import tyro
import yaml
from conftest import ROOT
from readme import NO_ADDRESS, readme, readme_of

from selfsupnas.train.batches import check_shares
from selfsupnas.distributed import World
from selfsupnas.cli import STAGES, DataOptions, DemoOptions, ExportOptions, ReportOptions, ZooOptions, main, parse_options
from selfsupnas.stages.configs import RetrainConfig

INDEX = json.loads((ROOT/"nbs"/"index.ipynb").read_text("utf8"))
README = (ROOT/"README.md").read_text("utf8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)  # (language, text)
SHELL = [line.split("#")[0].strip() for language, text in FENCES if language == "sh" for line in text.replace("\\\n", " ").splitlines()]
TEXT = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)  # without code blocks


def test_readme_and_index_are_alike():
    assert README == readme(INDEX["cells"])


def test_its_badges_need_an_address(page):
    "They name the owner, the repository and the tour; the tour installs the package from the same address."
    assert page["ADDRESS"] == NO_ADDRESS and page["badges"](NO_ADDRESS) == page["badges"]("https://example.org/a/b") == ""
    links = re.findall(r"\]\((https[^)]+)\)(?: |$)", page["badges"]("https://github.com/owner/name.git"))
    assert len(links) == 2 and all("/owner/name/" in link and link.endswith("nbs/00_tour.ipynb") for link in links)
    assert f"git+{NO_ADDRESS}" in (ROOT/"nbs"/"00_tour.ipynb").read_text("utf8")


def test_it_is_short(): assert len([word for word in README.split() if re.search(r"\w", word)]) <= 1000


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(link): assert link.startswith("http") or (ROOT/link).exists()


@pytest.fixture(scope="module")
def page():
    "The names that the code of the index defines, run from the notebooks' folder as in JupyterLab."
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT/"nbs")
        for cell in INDEX["cells"]:
            if cell["cell_type"] == "code": exec("".join(cell["source"]), names)
        made = {name: names[name](names["records"]) for name in ("results", "findings")}
    return names | {"made": made}


def test_its_table_and_findings_come_from_the_records(page):
    for text in page["made"].values(): assert readme_of({"cell_type": "markdown", "source": text})[0] in README


def test_results_are_one_table_of_at_most_twelve_rows(page):
    tables = [table for table in re.findall(r"(?:^\|.*\n)+", TEXT, re.M) if "mIoU" in table]
    assert tables == [page["made"]["results"] + "\n"]
    assert 0 < len(tables[0].splitlines()) - 2 <= 12


def test_arms_and_networks_are_explained_before_the_table(page):
    before = TEXT.partition(page["made"]["results"])[0].partition("## Results")[2].lower()
    columns = [[cell.strip(" +").lower() for cell in line.split("|")[1:3]] for line in page["made"]["results"].splitlines()[2:]]
    named = {name for line in columns for name in line if "-" not in name}  # hand-crafted networks have their own names
    assert len(named) >= 6 and [name for name in named if name not in before] == []


COMMANDS = sorted({line for line in SHELL if re.match(r"(torchrun .*)?selfsupnas ", line)})
SWEEPS = [line for line in SHELL if line.startswith("snakemake ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_understood(command):
    "Each is parsed to the end; where 8 processes share a batch, they can."
    launcher, _, words = command.partition("selfsupnas ")
    command, *words = shlex.split(words)
    options = {"demo": DemoOptions, "data": DataOptions, "report": ReportOptions, "export": ExportOptions, "zoo": ZooOptions}.get(command)
    if "--help" in words: assert main([command, *words]) == 0
    elif options: tyro.cli(options, args=words, return_unknown_args=command == "demo")
    else:
        config = STAGES[command](**parse_options(command, words))
        if launcher: check_shares(config, World(0, 8))


@pytest.mark.parametrize("command", SWEEPS)
def test_its_sweeps_are_understood(command):
    words = shlex.split(command)
    assert (ROOT/words[words.index("-s") + 1]).is_file() and ("-n" in words or "--cores" in words)


def test_there_are_commands(): assert len(COMMANDS) >= 9 and SWEEPS and any(c.startswith("torchrun") for c in COMMANDS)


OPTIONS = sorted(set(re.findall(r"`(--[^`]+)`", TEXT)))


@pytest.mark.parametrize("options", OPTIONS)
def test_its_options_are_those_of_retrain(options):
    RetrainConfig(**parse_options("retrain", shlex.split(options)))


def test_there_are_options(): assert any("w-semi" in o for o in OPTIONS)


def test_make_has_its_targets():
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join([*(text for language, text in FENCES if language == "sh"), *re.findall(r"`(make [^`]+)`", TEXT)])))
    assert {"env", "demo", "test"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", (ROOT/"Makefile").read_text("utf8"), re.M))


def test_its_python_makes_a_picture(tmp_path, monkeypatch):
    "The lines under *Use a network*, as they stand, on a drawn street scene."
    from PIL import Image

    from selfsupnas.data.datasets import CAMVID_SPEC
    from selfsupnas.data.toy.streetscenes import draw_scene
    (code,) = [text for language, text in FENCES if language == "python"]
    monkeypatch.chdir(tmp_path)
    Image.fromarray(draw_scene(0, (192, 256))[0]).save("street.png")
    exec(code, {})
    with Image.open("classes.png") as picture:
        assert picture.size == (256, 192)
        colours = {colour for _, colour in picture.getcolors()}
    assert 3 <= len(colours) and colours <= set(CAMVID_SPEC.palette)


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "by split"])
def test_its_folders_are_read(flat, tmp_path):
    "The layouts that it draws: files in one folder, or in one for each split; images without a mask beside either."
    from PIL import Image

    from selfsupnas.data.datasets import load_dataset
    (tree,) = [text for language, text in FENCES if not language]
    assert set(re.findall(r"[\w.]+(?=/\*|\n| {2,})", tree)) >= {"classes.txt", "images", "masks", "train", "val", "test", "unlabelled"}
    assert "`images/*.png` and `masks/*.png`" in README
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        for i, split in enumerate(["train"] * 7 + ["val"] + ["test"] * 2):
            folder = tmp_path/kind if flat else tmp_path/kind/split
            folder.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (40, 40), i if mode == "L" else (i, i, i)).save(folder/f"{i}.png")
    (tmp_path/"images"/"unlabelled").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path/"images"/"unlabelled"/"bare.png")
    (tmp_path/"classes.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    sets = {split: load_dataset("folder", split, tmp_path) for split in ("train", "val", "test")}
    assert {split: len(data.labelled_ids) for split, data in sets.items()} == dict(train=7, val=1, test=2)
    assert len(sets["train"]) == 8


def test_the_citation_can_be_read():
    cited = yaml.safe_load((ROOT/"CITATION.cff").read_text("utf8"))
    assert cited["cff-version"] == "1.2.0" and cited["title"] == "selfsupnas" and cited["message"] and cited["authors"]
    assert f"version = {cited['version']}\n" in (ROOT/"settings.ini").read_text("utf8")
    for reference in cited["references"]:
        assert reference["type"] and reference["title"] and reference["year"] and all(a["family-names"] and a["given-names"] for a in reference["authors"])
    assert {r["url"].rpartition("/")[2] for r in cited["references"]} == {"2201.12646", "2003.10401"}
