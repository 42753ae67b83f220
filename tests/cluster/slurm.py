"""A Slurm of one's own: Debian's, on loopback, with three nodes of fake GPUs, as root."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SHIM = Path(__file__).parent / "shim.py"
NODES = {"ada01": ("ada", 8, "gpu_6000ada"), "h01": ("h200", 5, "gpu_h200")}
NODES |= {"pro01": ("pro", 8, "gpu_pro6000")}
DOWN = {"pro01": 1}  # of its eight cards one is taken for good: 7 are given out
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")


def missing() -> str | None:
    """Why no Slurm can be started here; None where one can."""
    absent = [name for name in PROGRAMS if not _which(name)]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root"
    return None


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Slurm:
    folder: Path
    controller: int  # pid, 0 = stopped

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, check: bool = True) -> str:
        environment = {**os.environ, **self.environment}
        for _ in range(20):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode == 0 or not check:
                return done.stdout
            time.sleep(0.25)
        raise RuntimeError(f"{command}: {done.stderr}")

    def jobs(self, *selection: str) -> list[dict[str, str]]:
        """Every job that the controller remembers."""
        keys = ("id", "state", "partition", "name", "user", "gres")
        answer = self.run("squeue", "-h", "-t", "all", "-o", "%i|%T|%P|%j|%u|%b", *selection)
        return [dict(zip(keys, line.split("|"), strict=True)) for line in answer.splitlines()]

    def hold(self, node: str, cards: int, user: str = "nobody") -> str:
        """Another user's job."""
        script = "#!/bin/sh\nexec sleep 3600\n"
        command = ["sbatch", "--parsable", f"--uid={user}", "-J", "other", "-N1", "-n1", "-w", node]
        command += ["-p", NODES[node][2], f"--gres=gpu:{cards}", "-c", str(8 * cards), "-t", "60"]
        command += ["-o", "/dev/null", "-D", "/tmp"]
        environment = {**os.environ, **self.environment}
        done = subprocess.run(
            command, env=environment, input=script, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def stop_controller(self) -> None:
        os.kill(self.controller, signal.SIGTERM)
        _wait_gone(self.controller)
        self.controller = 0

    def start_controller(self) -> None:
        self.controller = _daemon(self.folder, "slurmctld")
        self.run("scontrol", "ping")

    def clean(self) -> None:
        """No job of anybody is left, and every node is up."""
        for _ in range(200):
            left = [job["id"] for job in self.jobs() if job["state"] in _LIVE]
            if not left:
                break
            self.run("scancel", "--signal=KILL", "--full", *left, check=False)
            self.run("scancel", *left, check=False)
            time.sleep(0.1)
        for node in NODES:
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)


_LIVE = ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "REQUEUED")


def _daemon(folder: Path, name: str, *arguments: str) -> int:
    """Starts one in the foreground, in a session of its own; returns its pid."""
    program = _which(name)
    assert program
    with open(folder / f"{name}.out", "ab") as out:
        process = subprocess.Popen(
            [program, "-D", "-f", str(folder / "slurm.conf"), *arguments],
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, "SLURM_CONF": str(folder / "slurm.conf")},
        )
    _STARTED.append(process)
    return process.pid


_STARTED: list["subprocess.Popen[bytes]"] = []


def _wait_gone(pid: int) -> None:
    for process in _STARTED:
        if process.pid == pid:
            process.wait(timeout=30)


def start() -> tuple[Slurm, list[int]]:
    """A running cluster and the pids of its daemons. As root, on free ports of loopback."""
    folder = Path(tempfile.mkdtemp(prefix="xdimo-slurm-"))
    folder.chmod(0o755)
    munge = folder / "munge"
    munge.mkdir(mode=0o700)
    key = munge / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    pids = []
    socket_path = folder / "munge.socket"
    munged = subprocess.Popen(
        [
            str(_which("munged")),
            "--foreground",
            "--force",
            f"--socket={socket_path}",
            f"--key-file={key}",
            f"--pid-file={munge / 'pid'}",
            f"--log-file={munge / 'log'}",
            f"--seed-file={munge / 'seed'}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    _STARTED.append(munged)
    pids.append(munged.pid)
    ports = _free_ports(1 + len(NODES))
    host = socket.gethostname().split(".")[0]
    nodes, partitions, gres = [], [], []
    for port, (name, (kind, cards, partition)) in zip(ports[1:], NODES.items(), strict=True):
        given = cards - DOWN.get(name, 0)
        nodes.append(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={8 * cards} RealMemory=1000000 Gres=gpu:{kind}:{given} State=UNKNOWN"
        )
        partitions.append(f"PartitionName={partition} Nodes={name} MaxTime=INFINITE State=UP")
        for card in range(given):
            file = folder / f"gpu-{name}-{card}"
            file.touch()
            gres.append(f"NodeName={name} Name=gpu Type={kind} File={file}")
        (folder / f"spool-{name}").mkdir()
    (folder / "state").mkdir()
    (folder / "gres.conf").write_text("\n".join(gres) + "\n")
    lines = [
        "ClusterName=xdimo",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ports[0]}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={socket_path}",
        "CryptoType=crypto/munge",
        f"StateSaveLocation={folder / 'state'}",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder / 'slurmctld.pid'}",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder / 'slurmctld.log'}",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "AccountingStorageType=accounting_storage/none",
        "JobAcctGatherType=jobacct_gather/none",
        "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",
        "GresTypes=gpu",
        "SlurmdParameters=config_overrides",
        "ReturnToService=0",
        "MpiDefault=none",
        "MailProg=/bin/true",
        f"TaskProlog={folder / 'prolog'}",
        "SchedulerType=sched/builtin",
        "SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0",
        "MinJobAge=600",
        "KillWait=5",
        "InactiveLimit=0",
        "SlurmdTimeout=30",
        "SlurmctldTimeout=30",
        *nodes,
        *partitions,
    ]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    # For commands of Slurm's in a job, whatever environment it was submitted with.
    prolog = folder / "prolog"
    prolog.write_text(f"#!/bin/sh\necho export SLURM_CONF={folder / 'slurm.conf'}\n")
    prolog.chmod(0o755)
    for _ in range(100):
        if socket_path.exists():
            break
        time.sleep(0.05)
    slurm = Slurm(folder, 0)
    slurm.start_controller()
    pids += [_daemon(folder, "slurmd", "-N", name) for name in NODES]
    for _ in range(100):
        states = slurm.run("sinfo", "-h", "-N", "-o", "%T").split()
        if states and set(states) == {"idle"}:
            break
        time.sleep(0.1)
    else:
        raise RuntimeError(f"nodes are {states}; {folder} has the logs")
    # The first job after a start waits longest; no scenario shall.
    for node in NODES:
        slurm.hold(node, 1)
    while any(job["state"] != "RUNNING" for job in slurm.jobs()):
        time.sleep(0.1)
    slurm.clean()
    return slurm, pids


def stop(slurm: Slurm, pids: list[int]) -> None:
    slurm.clean()
    for pid in [slurm.controller, *reversed(pids)]:
        if pid:
            os.kill(pid, signal.SIGTERM)
            _wait_gone(pid)
    shutil.rmtree(slurm.folder)


def shims(folder: Path, dialect: str) -> Path:
    """A folder for PATH with one dialect's commands."""
    names = {
        "jh": ("jsub", "jjobs", "jctrl", "jhosts", "jhist", "jlimits"),
        "lsf": ("bsub", "bjobs", "bkill", "bhosts", "bhist"),
    }
    bin = folder / f"bin-{dialect}"
    bin.mkdir(exist_ok=True)
    for name in names[dialect]:
        link = bin / name
        if not link.exists():
            link.symlink_to(SHIM)
    return bin


if __name__ == "__main__":
    cluster, daemons = start()
    print(f"export SLURM_CONF={cluster.folder}/slurm.conf", flush=True)
    try:
        sys.stdin.read()
    finally:
        stop(cluster, daemons)
