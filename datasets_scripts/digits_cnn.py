"""Train the digits zoos: a population of small CNNs on scikit-learn's handwritten digits.

    python datasets_scripts/digits_cnn.py            # zoos/digits-cnn: 1,000 networks, hyperparameters varied
    python datasets_scripts/digits_cnn.py --fixed    # zoos/digits-cnn-seeds: 500 networks, only the seed varies

Running it again goes on where it was interrupted, and leaves a finished zoo alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

from sane_hf.zoos.population import Population, train_population


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixed", action="store_true", help="vary only the networks' seeds")
    parser.add_argument("--networks", type=int, help="how many (1000, with --fixed 500)")
    parser.add_argument("--epochs", type=int, default=25, help="of training (25)")
    parser.add_argument("--seed", type=int, default=0, help="of the whole population (0)")
    parser.add_argument("--out", type=Path, help="folder (zoos/digits-cnn, with --fixed zoos/digits-cnn-seeds)")
    parser.add_argument("--workers", type=int, help="processes (one per core); the zoo does not depend on it")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    out = arguments.out or Path("zoos") / ("digits-cnn-seeds" if arguments.fixed else "digits-cnn")
    networks = arguments.networks if arguments.networks is not None else 500 if arguments.fixed else 1000
    started = time.monotonic()
    try:
        population = Population(
            name=out.name, networks=networks, epochs=arguments.epochs, seed=arguments.seed, fixed=arguments.fixed
        )
        train_population(out, population, workers=arguments.workers)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"interrupted; the same command goes on where {out} was\n")
    info = json.loads((out / "zoo.json").read_text(encoding="utf-8"))
    rows = {split: entry["rows"] for split, entry in info["splits"].items()}
    print(f"{out}: {rows}, content {info['content_hash'][:16]}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

# digits-cnn        {'train': 5600, 'validation': 1200, 'test': 1200}
# digits-cnn-seeds  {'train': 2800, 'validation': 600, 'test': 600}
