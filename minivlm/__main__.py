"""`python -m minivlm`: the command line."""

import sys

from minivlm.cli import main

sys.exit(main())
