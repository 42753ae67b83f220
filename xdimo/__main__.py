"""``xdimo`` and ``python -m xdimo``: one verb a step of the pipeline."""

import os
import sys

from xdimo.cli import parser
from xdimo.errors import UserError


def main() -> int:
    """Exit code: 0, what the verb returns, or 2 with one line for bad input."""
    if sys.getfilesystemencoding() != "utf-8":
        # Files and their names are UTF-8 here, whatever the locale says.
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
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
    except OSError as error:  # a file that cannot be read or written
        if error.filename is None:
            raise
        print(f"xdimo {arguments.verb}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
