"""`python -m being_vl`: the command line, for launchers such as torchrun."""

import sys

from being_vl.cli import main

sys.exit(main())
