"""`python -m asyncrl.cli`: the command without its script on the PATH."""

import sys

from asyncrl.cli import main

sys.exit(main())
