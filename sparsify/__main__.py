"""`python -m sparsify`: one cell, or a sweep with -m. See --help."""

import sys

from sparsify.commands.cli import launch

if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
