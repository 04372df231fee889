"""`python -m sparsify.plan`: see `sparsify.commands.plan`."""

import sys

from sparsify.commands.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
