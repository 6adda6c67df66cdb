"Packaging: everything is read from settings.ini; the run notebooks travel in the wheel as selfsupnas/runs."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf8")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    long_description=(here / "README.md").read_text(encoding="utf8"), long_description_content_type="text/markdown",
    author=cfg["author"], author_email=cfg["author_email"], license="Apache-2.0", license_files=["LICENSE"],
    packages=find_packages(include=["selfsupnas", "selfsupnas.*"]) + ["selfsupnas.runs"],
    package_dir={"selfsupnas.runs": "nbs/runs"}, package_data={"selfsupnas": ["presets/*/*", "presets/*/*/*"], "selfsupnas.runs": ["*.ipynb"]},
    python_requires=">=" + cfg["min_python"], install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("dev", "bluemarble", "rivals", "export", "tensorboard", "workflow", "browser", "docs")},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
)
