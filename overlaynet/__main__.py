"""``python -m overlaynet``."""

import sys

from overlaynet.cli import main

sys.exit(main())
