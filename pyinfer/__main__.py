"""`python -m pyinfer` and the console command `pyinfer`."""

import sys


def main() -> None:
    """Runs the command line and exits with its code."""
    from pyinfer.cli.entry import prepare_process, run

    prepare_process()
    sys.exit(run())


if __name__ == "__main__":
    main()
