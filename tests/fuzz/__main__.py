"""``python -m fuzz --calls 100000 --seed 3``: draw calls, run them and print each that goes wrong as a script."""

import argparse
import collections
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

# So many calls that JAX traces are of one form, so that XLA compiles one program for them.
TRACED_ALIKE = 25
# Of a mode and a backend that ran so many calls, half must have computed something.
MANY = 250
FLAGS = ("gpu", "apart")
# A call that takes longer than this, in seconds, hangs; XLA may compile in it.
HANGS = 180


def parsed(arguments):
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--traced", type=int, default=20, help="one call in so many is traced by JAX; 0 for none")
    parser.add_argument("--gpu", action="store_true", help="arrays on a GPU, for triton")
    parser.add_argument("--alike", type=int, default=125, help="with --gpu: so many calls in a row share their kernels")
    parser.add_argument("--apart", action="store_true", help="leave out calls whose sequences meet in a slot or a row")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--most", type=int, default=10, help="stop after so many wrong calls")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="draw no call after so many")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--progress", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.until = options.until or time.time() + options.seconds
    return options


def block(options):
    """Return how many calls in a row one process runs: those that JAX traces among them are of one form."""
    return TRACED_ALIKE * options.traced or 250


def drawn(options, number):
    """Return the call of a number."""
    from fuzz.draw import EAGER, ON_GPU, TRACED, TRACED_ON_GPU, draw

    is_traced = bool(options.traced) and number % options.traced == 0
    alike = block(options) if is_traced else options.alike if options.gpu else 1
    form = f"{options.seed} {number // alike}"
    modes = (TRACED_ON_GPU if is_traced else ON_GPU) if options.gpu else (TRACED if is_traced else EAGER)
    return draw(f"{form} {is_traced}", options.seed * 10**9 + number, modes)


def numbers_of(options):
    """Return the numbers of a worker's calls: whole blocks of them."""
    numbers = range(options.first, options.first + options.calls)
    return [number for number in numbers if number // block(options) % options.jobs == options.worker]


def work(options):
    """Run a worker's calls. Its progress is the number of the call that it runs; what it says goes to stdout as JSON."""
    from fuzz.oracle import apart
    from fuzz.run import run
    from fuzz.script import script

    with open(options.progress, "r+b") as file:
        progress = mmap.mmap(file.fileno(), 8)
    begin = int.from_bytes(progress[:8], "little", signed=True)
    counts = collections.Counter()
    for number in numbers_of(options):
        if number < begin:
            continue
        if time.time() > options.until:
            break
        progress[:8] = number.to_bytes(8, "little", signed=True)
        call = drawn(options, number)
        if options.apart and not apart(call.arrays, call.options):
            counts["left out: sequences meet"] += 1
            continue
        try:
            outcome = run(call)
        except Exception:
            if options.gpu:  # whose process can launch nothing any more
                raise
            say(number=number, wrong=f"{traceback.format_exc()}\n{script(call, crash('an exception'))}")
            continue
        counts[f"{call.mode}, {call.backend}: {outcome.what}{' as it must' if call.spoils else ''}"] += 1
        if outcome.wrong is not None:
            say(number=number, wrong=script(call, outcome.wrong, f"call {number} of seed {options.seed}"))
    say(counts=counts)


def say(**what):
    """Print what the parent process reads."""
    print(json.dumps(what), flush=True)


def crash(how):
    """Return what is wrong with a call that ended its process."""
    from fuzz.judge import Wrong

    return Wrong("the process", (), "results or an error", how)


class Worker:
    """A process that runs calls, and is started again behind one that ends or stops it."""

    def __init__(self, options, number, folder):
        self.options, self.number = options, number
        self.progress, self.said = Path(folder, f"{number}"), Path(folder, f"{number}.jsonl")
        self.progress.write_bytes((-1).to_bytes(8, "little", signed=True))
        self.ended, self.wrong = False, 0
        self.start()

    def start(self):
        """Run the calls from the one that the progress says on."""
        passed = {n: v for n, v in vars(self.options).items() if n not in ("worker", "progress", "most", *FLAGS)}
        command = [sys.executable, "-m", "fuzz", *(f"--{name}={value}" for name, value in passed.items())]
        command += [f"--{flag}" for flag in FLAGS if vars(self.options)[flag]]
        command += [f"--worker={self.number}", f"--progress={self.progress}"]
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        with self.said.open("ab") as out:
            where = {} if self.options.gpu else {"JAX_PLATFORMS": "cpu"}
            self.process = subprocess.Popen(command, stdout=out, env=os.environ | {"PYTHONPATH": path} | where)
        self.seen, self.since = self.current(), time.monotonic()

    def current(self):
        """Return the number of the call that runs."""
        return int.from_bytes(self.progress.read_bytes(), "little", signed=True)

    def poll(self):
        """Look after the process; print what went wrong."""
        status, current = self.process.poll(), self.current()
        if status == 0:
            self.ended = True
        elif status is not None:
            name = signal.Signals(-status).name if status < 0 else f"status {status}"
            self.skip(current, f"ended with {name}")
        elif current != self.seen:
            self.seen, self.since = current, time.monotonic()
        elif time.monotonic() - self.since > HANGS:
            self.process.kill()
            self.process.wait()
            self.skip(current, f"no end in {HANGS} seconds")

    def skip(self, number, how):
        """Print the call that ended the process, and go on with the next."""
        from fuzz.script import script

        self.wrong += 1
        print(script(drawn(self.options, max(number, 0)), crash(how), f"call {number} of seed {self.options.seed}"))
        self.progress.write_bytes((number + 1).to_bytes(8, "little", signed=True))
        if number < 0:  # before its first call
            self.ended = True
        else:
            self.start()

    def results(self):
        """Return all that it has said."""
        return [json.loads(line) for line in self.said.read_text().splitlines() if line.startswith("{")]


def mostly_refused(counts):
    """Return the modes and backends that computed fewer than half of their calls, if there were many."""
    totals, computed = collections.Counter(), collections.Counter()
    for name, count in counts.items():
        where, _, what = name.partition(": ")
        totals[where] += count
        computed[where] += count if what == "computed" else 0
    return [where for where, total in totals.items() if total >= MANY and 2 * computed[where] < total]


def main(arguments=None):
    """Run the fuzz; return 1 if a call went wrong."""
    options = parsed(arguments)
    options.jobs = max(1, min(options.jobs, -(-options.calls // block(options))))
    if options.worker is not None:
        work(options)
        return 0
    begin, printed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker(options, number, folder) for number in range(options.jobs)]
        while not all(worker.ended for worker in workers):
            time.sleep(0.2)
            for worker in (worker for worker in workers if not worker.ended):
                worker.poll()
            found = [said["wrong"] for worker in workers for said in worker.results() if "wrong" in said]
            print(*found[printed:], sep="\n", end="\n" * (len(found) > printed), flush=True)
            printed = len(found)
            if printed + sum(worker.wrong for worker in workers) >= options.most:
                print(f"stopped at {options.most} wrong calls")
                break
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
        wrong = printed + sum(worker.wrong for worker in workers)
        counts = collections.Counter()
        for said in (said for worker in workers for said in worker.results() if "counts" in said):
            counts.update(said["counts"])
    for name, count in sorted(counts.items()):
        print(f"{count:>8}  {name}")
    for where in mostly_refused(counts):
        print(f"{where}: fewer than half of the calls were computed")
        wrong += 1
    print(f"{sum(counts.values())} calls of seed {options.seed} in {time.monotonic() - begin:.0f} s: {wrong} wrong")
    is_whole = sum(counts.values()) >= options.calls or time.time() > options.until
    return 0 if is_whole and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
