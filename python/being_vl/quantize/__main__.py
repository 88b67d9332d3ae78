"""`python -m being_vl.quantize` and `torchrun … -m being_vl.quantize`: `being-vl quantize`."""

import sys

from being_vl.cli import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
