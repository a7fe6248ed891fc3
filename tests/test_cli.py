"""The command line: at once for help, the right call for each command, one clear line for an error of the user."""

import subprocess
import sys
import time
import types

import pytest
import torch
from typer.testing import CliRunner

import sane_hf_cli
from sane_hf.checkpoints import load_checkpoint
from sane_hf.zoos import ZooWriter


@pytest.fixture
def run():
    runner = CliRunner()
    return lambda *arguments: runner.invoke(sane_hf_cli.app, list(arguments), prog_name="sane-hf")


@pytest.fixture
def room(monkeypatch):
    """Replace a room of the package by one that holds the given functions."""

    def put(name: str, **functions) -> None:
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return put


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["zoo", "info", "--help"], ["trian"]])
def test_help_and_typing_errors_import_nothing_heavy(arguments, root):
    code = (
        "import sys, sane_hf_cli\n"
        "try: sane_hf_cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'scipy', 'sane_hf'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sane-hf" in done.stdout + done.stderr


def test_every_command_has_a_help_page_with_an_example(run):
    for command in (["train"], ["report"], ["zoo", "info"]):
        page = run(*command, "--help")
        assert page.exit_code == 0
        assert f"sane-hf {' '.join(command)} " in page.output.split("Example", 1)[1]


def test_train_hands_over_recipe_and_overrides(run, room, tmp_path):
    calls = []
    room("sane_hf.training", train=lambda *arguments: calls.append(arguments))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 1\n")
    done = run("train", str(recipe), "--trainer.learning_rate", "3e-4", "--seed=2")
    assert done.exit_code == 0, done.output
    assert calls == [(recipe, ["--trainer.learning_rate", "3e-4", "--seed=2"])]


def test_an_unknown_recipe_names_those_that_ship(run, monkeypatch, tmp_path):
    (tmp_path / "sane-digits.yaml").write_text("seed: 1\n")
    monkeypatch.setattr(sane_hf_cli, "files", lambda package: tmp_path)
    done = run("train", "sane-digit")
    assert done.exit_code == 2
    assert "sane-digit" in done.stderr
    assert "sane-digits" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_recipe_is_found_by_name(monkeypatch, tmp_path):
    (tmp_path / "sane-digits.yaml").write_text("seed: 1\n")
    monkeypatch.setattr(sane_hf_cli, "files", lambda package: tmp_path)
    assert sane_hf_cli._recipe("sane-digits") == tmp_path / "sane-digits.yaml"


def test_zoo_info_shows_the_zoo(run, tmp_path):
    module = torch.nn.Linear(3, 2)
    shapes = [[name, list(tensor.shape)] for name, tensor in module.state_dict().items()]
    groups = {"version": 1, "groups": {"hidden": {"size": 7}, "inner": {"size": 5}}, "axes": {}, "pinned": {}}
    architectures = {"mlp": {"config": {}, "shapes": shapes, "permutation_groups": groups}}
    with ZooWriter(tmp_path / "zoo", "tiny", architectures) as writer:
        for model, split in {"a": "train", "b": "train", "c": "test"}.items():
            for epoch in (0, 1):
                row = {"model_id": model, "epoch": epoch, "architecture": "mlp", "architecture_config": "{}"}
                writer.add(split, {**row, "weights": module.state_dict()})
    done = run("zoo", "info", str(tmp_path / "zoo"))
    assert done.exit_code == 0, done.output
    words = done.stdout.replace("│", " ").splitlines()
    assert ["train", "2", "4", "1"] in [line.split() for line in words]
    assert ["test", "1", "2", "1"] in [line.split() for line in words]
    assert ["mlp", "2", "8", "7", "+", "5"] in [line.split() for line in words]


def test_a_missing_zoo_is_one_line(run, tmp_path):
    done = run("zoo", "info", str(tmp_path / "none"))
    assert done.exit_code == 2
    assert str(tmp_path / "none") in done.stderr
    assert len(done.stderr.splitlines()) == 1


def _fail(error):
    def report(run):
        raise error

    return report


@pytest.mark.parametrize(
    "error",
    [ValueError("layer conv1:\n  found 3, needed 8"), FileNotFoundError("no run at runs/x"), IsADirectoryError("x")],
)
def test_errors_of_the_user_are_one_line(run, room, error):
    room("sane_hf.reporting", report=_fail(error))
    done = run("report", "runs/x")
    assert done.exit_code == 2
    assert done.stderr.splitlines() == ["sane-hf: " + " ".join(str(error).split())]


def test_checkpoint_errors_are_one_line(run, room, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    room("sane_hf.reporting", report=load_checkpoint)
    done = run("report", str(tmp_path / "model.safetensors"))
    assert done.exit_code == 2
    assert "model.safetensors" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_extra_is_named(run, room):
    room("sane_hf.reporting", report=_fail(ModuleNotFoundError("No module named 'sklearn'", name="sklearn")))
    done = run("report", "runs/x")
    assert done.exit_code == 2
    assert "sane-hf[analysis]" in done.stderr


def test_debug_keeps_the_traceback_and_defects_are_never_hidden(run, room):
    room("sane_hf.reporting", report=_fail(ValueError("bad")))
    assert isinstance(run("--debug", "report", "runs/x").exception, ValueError)
    room("sane_hf.reporting", report=_fail(KeyError("a defect")))
    assert isinstance(run("report", "runs/x").exception, KeyError)


def test_importing_the_package_brings_nothing_beyond_transformers(root):
    code = (
        "import sys\n"
        "from transformers import PreTrainedModel, AutoModel, AutoTokenizer\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "import sane_hf\n"
        "print(*{name.split('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["sane_hf"], done.stderr


@pytest.mark.slow
def test_import_and_help_take_their_time_and_no_more():
    def seconds(*arguments: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        return time.perf_counter() - begin

    seconds("-c", "import sane_hf")  # compiled and in the page cache from here on
    rounds = [
        (seconds("-c", "from transformers import PreTrainedModel"), seconds("-c", "import sane_hf")) for _ in range(7)
    ]
    assert min(ours for _, ours in rounds) <= 1.1 * min(theirs for theirs, _ in rounds)
    assert min(seconds("-m", "sane_hf_cli", "--help") for _ in range(3)) < 1
