"""Train a ranker: `recsys/train.py [--config PATH] [path.to.key=value ...]`, alone or on many ranks."""

import argparse

from recsys.cli import run_entry
from recsys.config import DEFAULT_CONFIG, load_config


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(prog="recsys/train.py", description="Train a ranker in the stages of a config.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="path.to.key=value", help="settings that replace the file's")
    arguments = parser.parse_args()

    def body() -> None:
        config = load_config(arguments.config, arguments.overrides)
        from recsys.training.run import train

        train(config)

    run_entry(body)


if __name__ == "__main__":
    main()
