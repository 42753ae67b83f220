"""``xdimo`` and ``python -m xdimo``: one verb a step of the pipeline."""

import os
import sys

from xdimo.cli import parser
from xdimo.errors import UserError


def main() -> int:
    """Exit code: 0, what the verb returns, or 2 with one line for bad input."""
    arguments = parser().parse_args()
    try:
        code = arguments.run(arguments) or 0
        sys.stdout.flush()
        return int(code)
    except UserError as error:
        print(f"xdimo {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone (xdimo ... | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
