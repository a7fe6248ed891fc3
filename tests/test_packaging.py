"""The wheel: everything that belongs into it and nothing else, and it works away from the checkout."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

HOUSED = {"modeling": "sane_hf/modeling", "model_cards": "sane_hf/model_cards", "recipes": "sane_hf/recipes"}
DATA = {".py", ".jinja", ".md", ".yaml", ".typed"}


def files_of(folder: Path) -> list[Path]:
    found = []
    for base, folders, names in os.walk(folder):  # does not follow links
        folders[:] = [name for name in folders if name != "__pycache__"]
        found += [Path(base) / name for name in names if Path(name).suffix in DATA]
    return found


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    """Built as pip builds it, from a copy, so that nothing is left in the checkout and nothing stale comes from it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "sane_hf_cli.py", "train.py"):
        shutil.copy(root / name, source)
    for name in ("sane_hf", "tests", *HOUSED):
        shutil.copytree(root / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    command = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", out, source]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel, root):
    expected = {"sane_hf_cli.py"} | {str(file.relative_to(root)) for file in files_of(root / "sane_hf")}
    for folder, package in HOUSED.items():
        expected |= {f"{package}/{file.relative_to(root / folder)}" for file in files_of(root / folder)}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_every_room_is_a_package(root):
    """A folder without `__init__.py` is not found by setuptools, and would be missing from the wheel."""
    rooms = [folder for folder in (root / "sane_hf").iterdir() if folder.is_dir() and folder.name != "__pycache__"]
    assert rooms
    assert [room.name for room in rooms if not (room / "__init__.py").is_file()] == []


def test_the_metadata(wheel, root):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
        assert archive.read(name.replace("METADATA", "entry_points.txt")).decode().split("\n")[1] == (
            "sane-hf = sane_hf_cli:main"
        )
    assert metadata["Name"] == "sane-hf"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f'__version__ = "{metadata["Version"]}"' in (root / "sane_hf" / "__init__.py").read_text()
    assert set(metadata.get_all("Provides-Extra")) == {"analysis", "app", "dev"}


def test_every_dependency_is_pinned_within_its_range(wheel, root):
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (root / "constraints.txt").read_text(), re.MULTILINE))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        required = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist")
    for requirement in map(Requirement, required):
        if requirement.marker is None or not requirement.marker.evaluate({"extra": "app"}):
            assert requirement.specifier.contains(pins[requirement.name.lower()]), f"{requirement} in constraints.txt"


def test_it_works_away_from_the_checkout(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import importlib.util, pathlib, sys\n"
        "import sane_hf, sane_hf.checkpoints, sane_hf.model_cards, sane_hf.recipes, sane_hf_cli\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForPreTraining\n"
        "site = pathlib.Path(sys.argv[1])\n"
        "for module in list(sys.modules.values()):\n"
        "    if module.__name__.partition('.')[0] in ('sane_hf', 'sane_hf_cli'):\n"
        "        assert pathlib.Path(module.__file__).is_relative_to(site), module.__file__\n"
        "assert importlib.util.find_spec('modeling') is None\n"
        "config = AutoConfig.for_model('sane')\n"
        "assert type(AutoModel.from_config(config)) is sane_hf.SaneModel\n"
        "assert type(AutoModelForPreTraining.from_config(config)) is sane_hf.SaneForPreTraining\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code, str(site)]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
