"""``python train.py …`` is ``deit-kd train …``."""

import sys

from deit_kd.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
