"""Train a ranker: `recsys/train.py [--config PATH] [path.to.key=value ...]`, alone or on many ranks."""

from recsys.cli import ArgumentParser, run_entry
from recsys.config import load_config


def main() -> None:
    """Read the arguments and train."""
    parser = ArgumentParser(prog="recsys/train.py", description="Train a ranker in the stages of a config.")
    parser.add_config_arguments()
    arguments = parser.parse_args()

    def body() -> None:
        config = load_config(arguments.config, arguments.overrides)
        from recsys.training.run import train

        train(config)

    run_entry(body, prints_result=False)


if __name__ == "__main__":
    main()
