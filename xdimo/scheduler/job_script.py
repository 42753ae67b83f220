"""What is submitted: a stub that starts a job script, which lies beside the job's record.

Only these two texts reach a shell. File names in them are quoted; what the rule says is taken as
it is. The scheduler gets plain words: names of ours, and file names without a folder.
"""

import os
import shlex
from pathlib import Path

from xdimo.errors import UserError
from xdimo.scheduler.dialects import SCRIPT_LIMIT_BYTES, Dialect

# What a job sees of the environment it was submitted from, whatever the scheduler copies.
ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "LANG")

# What `launch` answers by ending its run. A closed pipe ends neither it nor the shells around it.
SIGNALS = "HUP INT QUIT TERM USR1 USR2 XCPU ALRM VTALRM PROF IO PWR STKFLT"

SCRIPT, COMMAND, STARTED = "job.sh", "command.sh", "started"


def stub(script: Path) -> str:
    """Raises UserError where the scheduler would refuse it for its length."""
    text = f"#!/bin/bash\nexec /bin/bash {shlex.quote(str(script))}\n"
    if len(text.encode()) >= SCRIPT_LIMIT_BYTES:
        raise UserError(
            f"{script}: too long a path for a job; a script has under {SCRIPT_LIMIT_BYTES} bytes"
        )
    return text


def write(folder: Path, command: str, workdir: Path, dialect: Dialect) -> Path:
    """job.sh and command.sh in ``folder``; returns the first.

    A scheduler's warning may reach the job's shell alone, and a shell waits for its command before
    it minds a signal: so the command runs beside, in a process group that each signal is sent to.
    """
    set_up = "".join(
        f"export {name}={shlex.quote(os.environ[name])}\n"
        for name in ENVIRONMENT
        if name in os.environ
    )
    script = folder / SCRIPT
    script.write_text(
        f"{set_up}"
        f"cd {shlex.quote(str(workdir))} || exit 70\n"
        f'printf %s "${dialect.job_variable}" > {shlex.quote(str(folder / STARTED))}\n'
        "set -m\n"
        f"/bin/bash {shlex.quote(str(folder / COMMAND))} < /dev/null &\n"
        "child=$!\n"
        "trap : PIPE\n"
        f"for name in {SIGNALS}; do\n"
        '  trap "kill -s $name -- -$child 2>/dev/null" $name\n'
        "done\n"
        "while kill -0 $child 2>/dev/null; do wait $child; done\n"
        "wait $child\n"
        "exit $?\n",
        encoding="utf-8",
    )
    (folder / COMMAND).write_text(
        # The shell outlives a signal, so that the command it runs can answer it.
        f"trap : {SIGNALS} PIPE\nset -euo pipefail\n{command}\n",
        encoding="utf-8",
    )
    return script
