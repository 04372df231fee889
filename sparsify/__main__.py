"""`python -m sparsify`: one cell, or a sweep with -m. See --help."""

import sys

from sparsify.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
