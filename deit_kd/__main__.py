"""``python -m deit_kd …`` is ``deit-kd …``."""

import sys

from deit_kd.cli import main

sys.exit(main())
