"""The command line, `sane-hf`.

It lies outside the package because importing anything of `sane_hf` registers SANE with transformers, which takes
seconds: help and mistyped commands must answer at once. Every command imports what it calls, and only that.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.table import Table

_HELP = {"help_option_names": ["-h", "--help"]}
# Modules that only the extra `analysis` installs.
_ANALYSIS = ("matplotlib", "sklearn")


class _OneLineErrors(typer.core.TyperGroup):
    """Tell errors about input in one line and exit with 2; with `--debug`, let them through with their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:  # a CheckpointError is a ValueError
            if ctx.params["debug"]:
                raise
            message = " ".join(str(error).split()) or type(error).__name__
        except ModuleNotFoundError as error:
            if ctx.params["debug"] or error.name not in _ANALYSIS:
                raise
            message = f"{error.name} is not installed: pip install 'sane-hf[analysis]'"
        typer.echo(f"sane-hf: {message}", err=True)
        raise typer.Exit(2)


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings=_HELP,
)
zoo = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Populations of networks as datasets.")
app.add_typer(zoo, name="zoo")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sane-hf {version('sane-hf')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Log details, and show the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Embed neural networks, predict their properties, and make new ones with SANE."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("sane_hf").setLevel(logging.DEBUG if debug else logging.INFO)


def _recipe(name: str) -> Path:
    """A recipe by path, or by the name of one that is installed with the package."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in Path(str(files("sane_hf.recipes"))).glob("*.yaml")}
    if name not in shipped:
        raise FileNotFoundError(
            f"no recipe at {name}: give the path of a YAML file, or the name of one that comes with sane-hf: "
            f"{', '.join(sorted(shipped))}"
        )
    return shipped[name]


@app.command(context_settings={**_HELP, "allow_extra_args": True, "ignore_unknown_options": True})
def train(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe of the package.")],
) -> None:
    """Train SANE on a zoo, as the recipe says.

    Every key of the recipe can be given anew on the command line, with dots for what lies inside; the command line
    wins. An interrupted run continues from its last checkpoint, a finished one is left alone. The same under a
    launcher: `accelerate launch train.py recipe.yaml`.

    Examples:

    - `sane-hf train sane-digits`
    - `sane-hf train my-recipe.yaml --trainer.learning_rate 3e-4 --output_dir runs/slower`
    """
    path = _recipe(recipe)
    from sane_hf.training import train as run

    run(path, ctx.args)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a trained run.")],
) -> None:
    """Evaluate a trained run: probe its embeddings, decode and sample networks, write the report.

    Writes `report.md` with its plots, `metrics.json` and the model card into the folder of the run. What is there
    from an earlier call is kept.

    Example:

    - `sane-hf report runs/sane-digits`
    """
    from sane_hf.reporting import report as write_report

    write_report(run)


@zoo.command()
def info(
    path: Annotated[str, typer.Argument(help="The folder of a zoo, or its name on the Hub.")],
) -> None:
    """Show what a zoo holds: networks, epochs, architectures, properties.

    Example:

    - `sane-hf zoo info zoos/digits-cnn`
    """
    from sane_hf.zoos import zoo_info

    _show_zoo(zoo_info(path))


def _show_zoo(content: dict[str, Any]) -> None:
    """Print the content of a `zoo.json`: its checkpoints by split, its architectures, its reference."""
    console = Console()
    splits = Table("split", title=f"zoo {content['name']}", title_justify="left")
    for name in ("networks", "checkpoints", "files"):
        splits.add_column(name, justify="right")
    for split, entry in content["splits"].items():
        splits.add_row(split, f"{entry['models']:,}", f"{entry['rows']:,}", str(len(entry["files"])))
    console.print(splits)
    architectures = Table("architecture")
    for name in ("tensors", "weights", "permutable"):
        architectures.add_column(name, justify="right")
    for name, entry in content["architectures"].items():
        weights = sum(prod(shape) for _, shape in entry["shapes"])
        groups = entry.get("permutation_groups", {"groups": {}})["groups"]
        units = " + ".join(str(group["size"]) for group in groups.values())
        architectures.add_row(name, str(len(entry["shapes"])), f"{weights:,}", units)
    console.print(architectures)
    if content["reference"]:
        console.print("reference  {model_id}, epoch {epoch}".format(**content["reference"]), highlight=False)
    console.print(f"content    {content['content_hash'][:16]}", highlight=False)


def main() -> None:
    """Run the command line (the entry point of the console script `sane-hf`)."""
    app(prog_name="sane-hf")


if __name__ == "__main__":
    main()
