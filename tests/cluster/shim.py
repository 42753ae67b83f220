#!/usr/bin/python3 -SE
"""LSF's and JH's commands over a real Slurm. Called by the name of the command it stands for.

Settings and faults are files in the folder $XDIMO_SHIM:

pending      jobs of a user that may be pending (1)
threshold    LSF's word of whose limit is reached (User <root>: Pending job threshold reached.)
refuse       text of a refusal that every submission gets
closed       a queue that is closed (LSF)
storm        N: so many submissions more are refused as over the limit
status       hang, rubbish, header or fail: what the status command does
status-left  N: only the next N times
noise        text before the tables of jobs and hosts, and on standard error
unknown      a node whose daemon is away: its running jobs are UNKWN
requeued     lines of job and time: shown as EXIT for two seconds, then as pending (LSF)
hosts        text that the hosts command answers
old          LSF 9: no `bhosts -o`, no `bsub -gpu`, no unit in -M, no TERM_ word in the history
forget       finished jobs are not listed
kill-reason  text in the history of jobs that somebody ended
slow         seconds a submission takes before it is made
commands     a line a command: time, name (written here)
options      the last submission's options (written here)
"""

import os
import re
import subprocess
import sys
import time

NAME = os.path.basename(sys.argv[0])
JH = NAME.startswith("j")
FOLDER = os.environ["XDIMO_SHIM"]
STATES = {
    "PENDING": "PEND",
    "CONFIGURING": "PEND",
    "REQUEUED": "PEND",
    "RUNNING": "RUN",
    "COMPLETING": "RUN",
    "SUSPENDED": "USUSP",
    "COMPLETED": "DONE",
}
REASONS = {
    "TIMEOUT": "TERM_RUNLIMIT",
    "OUT_OF_MEMORY": "TERM_MEMLIMIT",
    "CANCELLED": "TERM_OWNER",
    "PREEMPTED": "TERM_PREEMPT",
}


def setting(name, default=""):
    try:
        with open(os.path.join(FOLDER, name)) as file:
            return file.read().strip()
    except FileNotFoundError:
        return default


def put(name, value):
    with open(os.path.join(FOLDER, name), "w") as file:
        file.write(str(value))


def slurm(*command, stdin=None):
    done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{NAME}: batch system daemon not responding: {done.stderr.strip()}")
    return done.stdout


def options(arguments, flags=()):
    found, rest = {}, []
    arguments = list(arguments)
    while arguments:
        word = arguments.pop(0)
        if word in flags:
            found[word] = True
        elif word.startswith("-"):
            found[word] = arguments.pop(0)
        else:
            rest.append(word)
    return found, rest


def queue(*selection, states="all"):
    """Id, state, partition, node, name, user of jobs."""
    text = slurm("squeue", "-h", "-t", states, "-o", "%i|%T|%P|%N|%j|%u", *selection)
    return [line.split("|") for line in text.splitlines()]


def requeued():
    """Job -> when somebody requeued it."""
    return {job: float(at) for job, at in (s.split() for s in setting("requeued").splitlines())}


def refuse_for_now():
    if JH:
        sys.exit("提交作业失败: 用户待提交任务数达上限")
    words = setting("threshold") or f"User <{me()}>: Pending job threshold reached."
    if os.environ.get("LSB_NTRIES") == "1":
        sys.exit(f"{words} Job not submitted.")
    print(f"{words} Retrying in 60 seconds...", file=sys.stderr, flush=True)
    time.sleep(600)


def me():
    return os.environ.get("SHIM_USER", "root")


def submit():
    asked, _ = options(sys.argv[1:])
    script = sys.stdin.read()
    if len(script.encode()) >= 4096:
        sys.exit(f"{NAME}: script is longer than 4096 bytes. Job not submitted.")
    put("options", " ".join(sys.argv[1:]))
    refusal = setting("refuse")
    if refusal:
        sys.exit(refusal)
    if setting("closed") == asked["-q"] and not JH:  # JH's words for it are not known
        sys.exit(f"{asked['-q']}: Queue has been closed. Job not submitted.")
    if setting("old") and ("-gpu" in asked or not asked.get("-M", "0").isdigit()):
        sys.exit("bsub: illegal option -- g\nUsage: bsub [-h] [-V] [-H] [-x] [-r] ...")
    storm = int(setting("storm", "0"))
    pending = len(queue("-u", me(), states="PENDING"))
    if storm:
        put("storm", storm - 1)
    if storm or pending >= int(setting("pending", "1")):
        refuse_for_now()
    words = f"{asked.get('-gpu', '')} {asked['-R']}"
    number = re.search(r"\b(?:num|rusage\[ngpus)=(\d+)", words)
    gpus = asked.get("-gpgpu") or (number and number[1])
    command = ["sbatch", "--parsable", "-J", asked["-J"], "-p", asked["-q"], "-N1", "-n1"]
    command += ["-c", asked["-n"], "-t", asked["-W"], "--requeue", "--open-mode=truncate"]
    command += ["-o", asked["-o"], "-e", asked["-e"], f"--signal=B:USR2@{setting('warn', '30')}"]
    if gpus:
        command += [f"--gres=gpu:{gpus}"]
    if "-m" in asked:
        command += ["-w", asked["-m"].replace(" ", ",")]
    variable = "JH_JOBID" if JH else "LSB_JOBID"
    first, _, rest = script.partition("\n")
    script = f"{first}\nexport {variable}=$SLURM_JOB_ID\n{rest}"
    time.sleep(float(setting("slow", "0")))
    job = slurm(*command, stdin=script).strip()
    print(f"Job <{job}> is submitted to queue <{asked['-q']}>.", flush=True)


def status():
    fault = setting("status")
    left = int(setting("status-left", "-1"))
    if fault and left:
        if left > 0:
            put("status-left", left - 1)
        if fault == "hang":
            time.sleep(600)
        if fault == "rubbish":
            print("Segmentation fault (core dumped)\x00\ufffd")
            return
        if fault == "fail":
            sys.exit(f"{NAME}: Cannot connect to the scheduler. Please try later.")
    asked, _ = options(sys.argv[1:], flags=("-a", "-p"))
    if "-p" in asked:
        text = slurm("squeue", "-h", "-u", me(), "-t", "PENDING", "-o", "%i|%j|%r")
        print("JOBID   USER    STAT  QUEUE      FROM_HOST   JOB_NAME   SUBMIT_TIME")
        for line in text.splitlines():
            job, name, reason = line.split("|")
            print(f"{job}    {me()}    PEND  queue      login       {name}   Nov 25 10:00")
            print(f" {reason};")
        return
    noise()
    if fault == "header" and left:
        print("JOBID;STAT;QUEUE;EXEC_HOST")
        return
    chosen = ["-n", asked["-J"]] if "-J" in asked else []
    again = requeued()
    rows = []
    for job, state, partition, node, _, _ in queue("-u", me(), *chosen):
        word = STATES.get(state, "EXIT")
        if word in ("DONE", "EXIT") and setting("forget"):
            continue
        if word == "RUN" and node == setting("unknown", "none"):
            word = "UNKWN"
        if time.time() - again.get(job, 0) < 2:
            word = "EXIT"
        rows.append(f"{job};{word};{partition};{f'32*{node}' if node else '-'}")
    if not (rows or JH):
        print(f"Job <{asked['-J']}> is not found" if chosen else "No job found", file=sys.stderr)
        sys.exit(254)
    print("JOBID;STAT;QUEUE;EXEC_HOST", *rows, sep="\n")


def noise():
    if text := setting("noise"):
        print(text, flush=True)
        print(text, file=sys.stderr)


def history():
    job = sys.argv[-1]
    done = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True)
    state = re.search(r"JobState=(\w+)", done.stdout)
    if done.returncode or not state or setting("forget"):
        sys.exit("No matching job found")
    lines = [f"Job <{job}>, User <{me()}>, Project <default>"]
    if job in requeued():
        lines += [
            "Starting (Pid 1);",
            "Exited with exit code 143.",
            "Pending: Job has been requeued;",
        ]
    if STATES.get(state[1]) != "PEND":
        lines += ["Starting (Pid 2);"]
    if state[1] == "COMPLETED":
        lines += ["Done successfully. The CPU time used is 0.1 seconds;"]
    elif state[1] == "TIMEOUT" and setting("old"):
        lines += ["Exited with exit code 140. The CPU time used is 0.1 seconds;"]
    elif state[1] in REASONS and not setting("old"):
        lines += [f"Exited; {setting('kill-reason') or REASONS[state[1]]}: job ended."]
    elif STATES.get(state[1]) is None:
        lines += ["Exited with exit code 1."]
    for line in lines:  # as long as LSF's, and wrapped as it does
        line = f"Sat Nov 28 10:00:00: {line}"
        print(
            "\n".join([line[:80], *(21 * " " + line[n : n + 59] for n in range(80, len(line), 59))])
        )


def hosts():
    answer = setting("hosts")
    if answer:
        print(answer)
        return
    wide = JH or "-w" in sys.argv
    if setting("old") and not wide:
        sys.exit("bhosts: illegal option -- o\nUsage: bhosts [-h] [-V] [-R res_req] [-w | -l] ...")
    noise()
    taken = {}
    for line in slurm("squeue", "-h", "-t", "R,CG", "-o", "%N|%C|%b").splitlines():
        node, cpus, gres = line.split("|")
        slots, cards = taken.get(node, (0, 0))
        count = re.search(r":(\d+)$", gres)
        taken[node] = (slots + int(cpus), cards + (int(count[1]) if count else 0))
    rows = []
    for line in slurm("sinfo", "-h", "-N", "-o", "%N|%T|%c|%G").splitlines():
        node, state, cpus, gres = line.split("|")
        if node in [row[0] for row in rows]:
            continue
        slots, cards = taken.get(node, (0, 0))
        total = re.search(r"gpu:\w+:(\d+)", gres)[1]
        out = state.rstrip("*$~#") in ("down", "drained", "draining", "drain", "unknown")
        full = "closed_Full" if slots >= int(cpus) and not JH else "ok"
        word = ("unavail" if "down" in state else "closed_Adm") if out else full
        rows.append([node, word, cpus, str(slots), total, str(cards)])
    if wide:
        print("HOST_NAME       STATUS    JL/U  MAX  NJOBS  RUN  SSUSP  USUSP  RSV")
        for node, word, cpus, slots, _, _ in rows:
            print(f"{node}    {word}    -    {cpus}   {slots}   {slots}   0   0   0")
    else:
        print("HOST_NAME;STATUS;MAX;NJOBS;NGPUS;NGPUS_ALLOC")
        for row in rows:
            print(";".join(row))


def kill():
    words = sys.argv[1:]
    jobs = words[1:] if JH else words
    for job in jobs:
        subprocess.run(["scancel", job], capture_output=True)
        print(f"Job <{job}> is being terminated")


def limits():
    print("USER   QUEUE   MAX_PEND_JOBS  PEND_JOBS")
    print(
        f"{me()}   all     {setting('pending', '1')}   {len(queue('-u', me(), states='PENDING'))}"
    )


COMMANDS = {
    "sub": submit,
    "jobs": status,
    "hist": history,
    "hosts": hosts,
    "kill": kill,
    "ctrl": kill,
    "limits": limits,
}
with open(os.path.join(FOLDER, "commands"), "a") as log:
    log.write(f"{time.time():.3f} {NAME}\n")
COMMANDS[NAME[1:]]()
