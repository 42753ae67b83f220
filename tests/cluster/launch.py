"""What `xdimo launch` does to files, signals and exit codes, without training anything.

behave.json in the working directory says what runs do: {run or "*": {"seconds": 1, "held": true,
"ends": ["crash", "ok"]}}. A held run goes on until a file `released` is there; the n-th attempt
ends as the n-th of `ends`, the last holds for the rest.
"""

import hashlib
import json
import os
import signal
import sys
import time

ANSWERS = ("ok", "oom", "nan", "timeout", "config", "data")
spec_path, output = sys.argv[1:]
with open(spec_path) as file:
    spec = json.load(file)
canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
spec_hash = "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
with open("behave.json") as file:
    behave = json.load(file)
behave = {**behave.get("*", {}), **behave.get(spec["run"], {})}
behave = {"seconds": 1, "held": False, "deaf": False, "ends": ["ok"], **behave}
names = ("JH_JOBID", "LSB_JOBID", "SLURM_JOB_ID")
job = next(os.environ[name] for name in names if name in os.environ)
SIGNALS = () if behave["deaf"] else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is an attempt to end
attempts = os.path.join(os.path.dirname(output), "attempts")
os.makedirs(attempts, exist_ok=True)
number = 1 + max((int(name) for name in os.listdir(attempts)), default=0)
folder = os.path.join(attempts, str(number))
os.mkdir(folder)
with open(os.path.join(folder, "log.jsonl"), "x") as log:
    log.write(json.dumps({"event": "header", "run": spec["run"], "job": job}) + "\n")
started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def write(path, value):
    with open(path + ".part", "w") as file:
        json.dump(value, file)
    os.rename(path + ".part", path)


def end(outcome, reason):
    with open(os.path.join(folder, "log.jsonl"), "rb") as log:
        digest = hashlib.sha256(log.read()).hexdigest()
    run = {
        "schema": 1,
        "run": spec["run"],
        "spec": spec_hash,
        "outcome": outcome,
        "reason": reason,
        "attempt": number,
        "job": job,
        "host": os.uname().nodename,
        "started": started,
        "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "log": "log.jsonl",
        "log_sha256": "sha256:" + digest,
        "code": {"commit": None, "dirty": None, "package": "sha256:0"},
        "cause": [],
    }
    write(os.path.join(folder, "run.json"), run)
    if outcome in ANSWERS:
        write(output, {**run, "log": f"attempts/{number}/log.jsonl"})
    print(f"{spec['run']}: {outcome} {reason}", flush=True)
    os._exit(outcome not in ANSWERS)


def stop(signum, frame):
    name = signal.Signals(signum).name
    end("timeout" if signum == signal.SIGUSR2 else "killed", name)


for each in SIGNALS:
    signal.signal(each, stop)
signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
print(f"{spec['run']}: attempt {number}, job {job}", flush=True)
time.sleep(behave["seconds"])
while behave["held"] and not os.path.exists("released"):
    time.sleep(0.1)
outcome = behave["ends"][min(number, len(behave["ends"])) - 1]
if outcome == "vanish":  # dies without a word
    os.kill(os.getpid(), signal.SIGKILL)
end(outcome, None if outcome == "ok" else f"as told: {outcome}")
