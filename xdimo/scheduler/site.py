"""The site's commands: each with a time limit, none through a shell; answers can be kept."""

import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from getpass import getuser
from pathlib import Path

from xdimo.errors import UserError
from xdimo.files import write_json, write_text
from xdimo.scheduler.dialects import Dialect, History, Job, read_history, read_jobs
from xdimo.scheduler.hosts import Host, read_hosts


class Silent(Exception):
    """A command that failed, hung, or answered what cannot be read: it says nothing of the jobs."""


@dataclass(frozen=True)
class Answer:
    code: int
    text: str  # standard output, then standard error


def ask(
    command: Sequence[str],
    timeout_s: float,
    *,
    stdin: str = "",
    folder: Path | None = None,
    keep_open: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
) -> Answer:
    """Runs one command in ``folder``. Raises Silent where it cannot start or takes too long.

    ``keep_open``: file descriptors that it inherits; a lock among them is held while it lives.
    ``environment``: variables beside our own.
    """
    try:
        done = subprocess.run(
            list(command),
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            pass_fds=tuple(keep_open),
            start_new_session=True,  # a Ctrl-C meant for us does not cut a submission
        )
    except subprocess.TimeoutExpired:
        raise Silent(f"{command[0]}: no answer in {timeout_s:g} s") from None
    except OSError as error:
        raise Silent(f"{command[0]}: {error.strerror}") from None
    return Answer(done.returncode, done.stdout + done.stderr)


@dataclass
class Site:
    """The scheduler in one dialect."""

    dialect: Dialect
    timeout_s: float
    transcript: Path | None = None  # folder for raw answers
    commands: int = 0  # asked so far
    _lacking: set[tuple[str, ...]] = field(default_factory=set)  # commands that are not known here

    def ask(self, command: Sequence[str], **options: object) -> Answer:
        self.commands += 1
        options = {"environment": self.dialect.environment, **options}
        answer = ask(command, self.timeout_s, **options)  # type: ignore[arg-type]
        if self.transcript:
            keep(self.transcript, command, answer)
        return answer

    def jobs(self, name: str | None = None) -> dict[str, Job]:
        """Our jobs by id, in one command. Raises Silent where there is no readable answer."""
        command = self.dialect.status_command(name)
        answer = self.ask(command)
        jobs = read_jobs(answer.text)
        if jobs is None:
            raise Silent(f"{command[0]}: exit code {answer.code}, {_shown(answer.text)}")
        return jobs

    def hosts(self, unreadable: Path | None = None) -> dict[str, Host]:
        """Hosts by name. Raises Silent; an answer that cannot be read is saved, or quoted."""
        for command in self.dialect.hosts:
            if command in self._lacking:
                continue
            text = self.ask(command).text
            hosts = read_hosts(text)
            if hosts is not None:
                return hosts
            if command != self.dialect.hosts[-1] and re.search(r"(?i)usage:|option|field", text):
                self._lacking.add(command)
        where = _shown(text)
        if unreadable:
            write_text(unreadable, text)
            where = f"its answer is in {unreadable}"
        raise Silent(f"{command[0]}: not a table of hosts; {where}")

    def history(self, job: str) -> History:
        """Raises Silent where there is no readable answer. None at all, without a fault, is one."""
        command = self.dialect.history_command(job)
        answer = self.ask(command)
        history = read_history(answer.text)
        if history is None and (answer.code or answer.text.strip()):
            raise Silent(f"{command[0]}: exit code {answer.code}, {_shown(answer.text)}")
        return history or History(known=False)

    def kill(self, jobs: Sequence[str]) -> str:
        """The scheduler's answer. Raises Silent."""
        return self.ask(self.dialect.kill_command(jobs)).text.strip() if jobs else ""


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return f"answer {line[:200]!r}" if line else "no answer"


def keep(folder: Path, command: Sequence[str], answer: Answer) -> None:
    """Adds one command and its raw answer, user names masked, to a folder of such."""
    number = 1 + len(list(folder.glob("*.json")))
    name = re.sub(r"[^A-Za-z0-9]+", "-", " ".join(command)).strip("-")[:60]
    masked = mask(answer.text)
    write_json(
        folder / f"{number:03}-{name}.json",
        {"command": [mask(part) for part in command], "code": answer.code, "answer": masked},
    )


def mask(text: str) -> str:
    """Without the name of whoever runs this, and without the names in columns of users."""
    lines = text.splitlines()
    users = {getuser()}
    for separator in (None, ";"):
        rows = [[cell.strip() for cell in line.split(separator)] for line in lines]
        for number, row in enumerate(rows):
            columns = [cell.upper() for cell in row]
            if "USER" in columns:
                at = columns.index("USER")
                users |= {below[at] for below in rows[number + 1 :] if len(below) > at}
    users |= set(re.findall(r"User\s*<([^>]+)>", text))
    for user in sorted(filter(None, users), key=len, reverse=True):
        text = re.sub(rf"(?<![A-Za-z0-9_]){re.escape(user)}(?![A-Za-z0-9_])", "user", text)
    return text


def replay(folder: Path) -> Callable[[Sequence[str]], Answer]:
    """Answers from a transcript, each command's in the order they came. A test's scheduler."""
    import json

    kept: dict[tuple[str, ...], list[Answer]] = {}
    for path in sorted(folder.glob("*.json")):
        line = json.loads(path.read_text(encoding="utf-8"))
        answers = kept.setdefault(tuple(line["command"]), [])
        answers.append(Answer(line["code"], line["answer"]))

    def answer(command: Sequence[str]) -> Answer:
        left = kept.get(tuple(command))
        if not left:
            raise UserError(f"{folder}: has no (further) answer to {' '.join(command)}")
        return left.pop(0) if len(left) > 1 else left[0]

    return answer
