"""``xdimo`` and ``python -m xdimo``: one verb a step of the pipeline."""

import sys

from xdimo.cli import parser
from xdimo.errors import UserError


def main() -> int:
    """Exit code: 0, what the verb returns, or 2 with one line for bad input."""
    arguments = parser().parse_args()
    try:
        return arguments.run(arguments) or 0
    except UserError as error:
        print(f"xdimo {arguments.verb}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
