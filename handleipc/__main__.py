"""``python -m handleipc``."""

from handleipc.cli import main

main(prog_name="python -m handleipc")
