"""`python -m misa`."""

import sys

from misa.cli import main

sys.exit(main())
