"""`python -m sparsify.sweep`: see `sparsify.commands.sweep`."""

import sys

from sparsify.commands.sweep import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
