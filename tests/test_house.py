"""The rules of the house: what travels stands alone, data flows one way, files stay small, the pages are true."""

import ast
import importlib
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The way of the data. A room imports only from rooms before it.
ROOMS = (
    "modeling",
    "checkpoints",
    "architectures",
    "symmetry",
    "members",
    "zoos",
    "training",
    "analysis",
    "generation",
    "reporting",
)
TRAVELLING = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub"} | sys.stdlib_module_names
LIBRARY = sorted(
    file
    for folder in ("modeling", "sane_hf", "model_cards", "recipes", "datasets_scripts", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")  # does not follow links
) + [ROOT / name for name in ("setup.py", "train.py", "sane_hf_cli.py")]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


@cache
def imports(file: Path, top_level: bool = False) -> list[str]:
    """Modules that a file imports, anywhere or at top level, in absolute form; `from a import b` gives `a.b`."""
    found = []
    package = ".".join(file.relative_to(ROOT).parent.parts)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "modeling").glob("*.py")), ids=name_of)
def test_what_travels_stands_alone(file):
    """`save_pretrained` copies these files flat: only `from .file_sane import Name` and few packages survive that."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno} leaves the folder"
            assert node.module, f"line {node.lineno}: `from . import x` saves and then fails to load"
            assert re.fullmatch(r"\w+_sane", node.module), f"line {node.lineno} imports .{node.module}"
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in TRAVELLING, f"line {node.lineno} imports {node.module}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] in TRAVELLING, f"line {node.lineno} imports {alias.name}"


def test_nothing_but_flat_files_travels():
    files = [file for file in (ROOT / "modeling").rglob("*") if "__pycache__" not in file.parts]
    assert all(file.parent == ROOT / "modeling" for file in files)
    assert {file.name for file in files if not file.name.endswith("_sane.py")} == {"__init__.py"}


@pytest.mark.parametrize("folder", ["modeling", "model_cards", "recipes"])
def test_the_links_for_runs_from_the_checkout(folder):
    assert (ROOT / "sane_hf" / folder).resolve() == ROOT / folder


@pytest.mark.parametrize("file", [file for file in LIBRARY if "sane_hf" in file.parts], ids=name_of)
def test_data_flows_one_way(file):
    parts = file.relative_to(ROOT / "sane_hf").parts
    if len(parts) == 1:
        pytest.skip("stands above the rooms")
    assert parts[0] in ROOMS, f"a new room: say in {name_of(Path(__file__))} where it stands"
    allowed = ROOMS[: ROOMS.index(parts[0]) + 1]
    for module in imports(file):
        package, _, rest = module.partition(".")
        if package == "sane_hf" and rest.split(".")[0] in ROOMS:
            assert rest.split(".")[0] in allowed, f"{parts[0]} imports {module}, which stands after it"


@pytest.mark.parametrize("file", LIBRARY, ids=name_of)
def test_files_are_read_in_one_sitting(file):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{lines} lines: more than one concept?"


def declared(*names: str) -> set[str]:
    """The distributions in the lists of setup.py that bear these names."""
    found = set()
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in names:
            strings = [item.value for item in ast.walk(node) if isinstance(item, ast.Constant)]
            found |= {re.split("[<>=]", string)[0] for string in strings}
    return found


def needed(modules: list[str]) -> set[str]:
    """The distributions that the given modules come from, without the standard library and ourselves."""
    other_name = {"huggingface_hub": "huggingface-hub", "sklearn": "scikit-learn", "yaml": "pyyaml"}
    own = {"sane_hf", "sane_hf_cli", "modeling", ""} | sys.stdlib_module_names
    return {other_name.get(name, name) for name in {module.split(".")[0] for module in modules} - own}


@pytest.mark.parametrize("file", LIBRARY, ids=name_of)
def test_every_dependency_is_declared(file):
    """Under its own name, not through somebody else's dependencies."""
    assert needed(imports(file)) <= declared("BASE", "ANALYSIS", "APP", "DEV")


@pytest.mark.parametrize("room", ROOMS[: ROOMS.index("training") + 1])
def test_the_base_install_imports_every_room_up_to_training(room):
    for file in (ROOT / "sane_hf" / room).glob("*.py"):
        assert needed(imports(file, top_level=True)) <= declared("BASE"), file.name


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_name_what_exists(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z-]+)(?=[`\s]*(?:$|[`#]))", text, re.MULTILINE))
    assert named <= targets()
    for path in re.findall(r"`((?:\w[\w.-]*/)+[\w.-]*)`", text):
        if path.split("/")[0] not in {"zoos", "runs", "sane-resnet"} and "/my_" not in path:
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make run" in text
    assert "make test" in text
    assert {"run", "test", "test-all", "clean"} <= targets()


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_on_the_pages_imports_what_exists(page):
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page.name}: {node.module} has no {alias.name}"


def test_the_ten_lines_of_the_readme_run(monkeypatch):
    built = [ROOT / "runs" / "sane-digits" / "metrics.json", ROOT / "zoos" / "digits-cnn" / "zoo.json"]
    missing = [name_of(file) for file in built if not file.is_file()]
    if missing:
        pytest.skip(f"`make run` builds {', '.join(missing)}")
    monkeypatch.chdir(ROOT)
    (block,) = python_blocks(ROOT / "README.md")
    names: dict = {}
    exec(block, names)
    rows, features = names["embedding"].shape
    assert rows == 1
    assert features % names["model"].config.latent_size == 0
    assert {name: tensor.shape for name, tensor in names["network"].items()} == {
        name: tensor.shape for name, tensor in names["weights"].items()
    }
