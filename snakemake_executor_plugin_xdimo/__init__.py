"""Snakemake's door to the queue: hands jobs to `xdimo.scheduler`, and their ends back.

A queued job runs its rule's command itself, not a second Snakemake: it needs this process for
nothing, and whatever happens to this process, `xdimo launch` says in run.json how the run ended.
"""

import os
import signal
import sys
import threading
import time
from asyncio import sleep
from collections.abc import AsyncGenerator
from pathlib import Path
from types import FrameType

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.jobs import JobExecutorInterface
from snakemake_interface_executor_plugins.settings import CommonSettings

from xdimo.config.load import load, typed
from xdimo.config.schema import Bench
from xdimo.errors import UserError
from xdimo.scheduler.dispatcher import Spool
from xdimo.scheduler.queue_session import open_spool, work_of
from xdimo.scheduler.site import Silent
from xdimo.scheduler.task import Ended


def _folder(job: JobExecutorInterface) -> str:
    """Of a run it has the run's name."""
    return Path(job.output[0]).parent.name


common_settings = CommonSettings(
    non_local_exec=True,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    pass_default_storage_provider_args=False,
    pass_default_resources_args=False,
    pass_envvar_declarations_to_cmd=False,
    auto_deploy_default_storage_provider=False,
)


class Executor(RemoteExecutor):
    bench: Bench
    spool: Spool | None = None  # the base class polls before __post_init__ has run

    def __post_init__(self) -> None:
        if self.workflow.deployment_settings.deployment_method:
            raise WorkflowError(
                "--software-deployment-method: jobs of this profile run in the environment that "
                "targets.<name>.setup makes"
            )
        self._turn = threading.Lock()  # the main thread adds, the waiting thread polls
        self._names: dict[JobExecutorInterface, str] = {}
        self._stopped: str | None = None
        configs = [os.path.relpath(path) for path in self.workflow.configfiles]
        configs = configs or ["config/config.yaml"]
        override = typed(self.workflow.config_settings.config)
        try:
            self.bench = load(configs, override)
            self.spool = open_spool(self.bench, configs, override, self.logger.info)
        except UserError as error:
            raise WorkflowError(str(error)) from None
        self.next_seconds_between_status_checks = self.bench.queue.poll_s

    # -- jobs ------------------------------------------------------------------------------------

    def run_jobs(self, jobs: list[JobExecutorInterface]) -> None:
        self._mind_signals()
        order = {run: number for number, run in enumerate(self.bench.runs(self.bench.cells))}
        super().run_jobs(sorted(jobs, key=lambda job: order.get(_folder(job), -1)))

    def run_job(self, job: JobExecutorInterface) -> None:
        if job.is_group():
            raise WorkflowError("groups: the queue takes each run by itself")
        incomplete = self.workflow.async_run(self.workflow.persistence.incomplete(job))
        try:
            work = work_of(
                self.bench,
                target=job.resources.target,
                rule=job.rule.name,
                command=job.shellcmd,
                inputs=[Path(path) for path in job.input],
                answer=Path(job.output[0]),
                spec=Path(spec) if (spec := job.input.get("spec")) else None,
                interrupted=bool(list(incomplete)),
            )
        except UserError as error:
            raise WorkflowError(str(error)) from None
        for path in job.log:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._names[job] = work.name
        # Marks the output as under way, before anything is submitted.
        self.report_job_submission(SubmittedJobInfo(job=job, aux={"name": work.name}))
        with self._turn:
            assert self.spool
            self.spool.add(work)

    async def check_active_jobs(
        self, active_jobs: list[SubmittedJobInfo]
    ) -> AsyncGenerator[SubmittedJobInfo, None]:
        if self.spool is None or not active_jobs:
            for info in active_jobs:
                yield info
            return
        with self._turn:
            ended = {one.work.name: one for one in self.spool.poll()}
        for info in active_jobs:
            one = ended.get(info.aux["name"])
            if one is None:
                yield info
            elif one.ending.answered:
                self.report_job_success(info)
            else:
                self._failed(info, one)

    def _failed(self, info: SubmittedJobInfo, one: Ended) -> None:
        if not one.retry:
            info.job.attempt = info.job.restart_times + 1
        self.report_job_error(info, msg=f"{one.work.name}: {one.ending}. ")

    def handle_job_success(self, job: JobExecutorInterface) -> None:
        with self._turn:
            assert self.spool
            self.spool.close(self._names[job])

    async def sleep(self) -> None:
        """Until the next poll, or until the end: the base class would sleep on."""
        while self.wait and self.spool is None:  # started by the base class, before __post_init__
            await sleep(0.05)
        until = time.monotonic() + self.next_seconds_between_status_checks
        while self.wait and (left := until - time.monotonic()) > 0:
            await sleep(min(left, 0.1))

    # -- leaving ---------------------------------------------------------------------------------

    def _mind_signals(self) -> None:
        """A lost terminal or a polite kill ends this process and leaves its jobs.

        Set here because Snakemake sets its own after the executor is made.
        """

        def stop(number: int, frame: FrameType | None) -> None:
            self._stopped = signal.Signals(number).name
            raise SystemExit(1)

        for number in (signal.SIGHUP, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, stop)

    def cancel_jobs(self, active_jobs: list[SubmittedJobInfo]) -> None:
        with self._turn:
            assert self.spool
            dropped = self.spool.drop()
            left = self.spool.submitted()
            if dropped:
                self.logger.info(f"dropped, not submitted yet: {', '.join(dropped)}")
            if not left:
                return
            names = ", ".join(f"{entry.work} ({entry.label})" for entry in left)
            if self._ask_to_end(names):
                try:
                    self.logger.info(self.spool.end(left))
                except Silent as silent:
                    self.logger.error(f"{silent}; end them with: xdimo cancel")
            else:
                self.logger.info(
                    f"left in the queue: {names}. The same command takes them up again; "
                    "`xdimo cancel` ends them."
                )

    def _ask_to_end(self, names: str) -> bool:
        if self._stopped or not (sys.stdin.isatty() and sys.stderr.isatty()):
            return False
        print(f"In the queue: {names}.\nEnd them? [y/N] ", end="", file=sys.stderr, flush=True)
        try:
            return sys.stdin.readline().strip().lower() in ("y", "yes")
        except KeyboardInterrupt:
            return False

    def shutdown(self) -> None:
        super().shutdown()
        if self.spool:
            self.spool.shut()
