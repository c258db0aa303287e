"""``python -m vargpt.convert SRC DST``: the same as ``vargpt convert``."""

import sys

from vargpt.cli import main

sys.exit(main(["convert", *sys.argv[1:]]))
