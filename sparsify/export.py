"""`python -m sparsify.export`: see `sparsify.commands.export`."""

import sys

from sparsify.commands.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
