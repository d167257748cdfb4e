"""One library, one problem, one process: worker.py ADAPTER PROBLEM.json THREADS.

Answers the same commands as attend_peer: `run SECONDS` with "ms MEDIAN RUNS", `dump FILE` with "ok".
The first line is "ready VERSION", "unsupported REASON" or "failed REASON".
"""
import importlib
import json
import os
import pathlib
import statistics
import sys
import time
import traceback

from base import Unsupported
from data import Data
from problems import Problem

WARM_UP_BELOW = 0.02  # s, as in attend_peer



def timed_runs(run, seconds):
    def once():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    times = [once()]
    if times[0] < WARM_UP_BELOW:
        times.clear()
    while not times or sum(times) < seconds:
        times.append(once())
    return f"ms {1e3 * statistics.median(times)} {len(times)}"


def prepare(adapter, description, threads):
    text = json.loads(pathlib.Path(description).read_text())
    fields = {f: text[f] for f in Problem.__dataclass_fields__}
    problem = Problem(**fields)
    reason = adapter.unsupported(problem)
    if reason:
        raise Unsupported(reason)
    return adapter.prepare(problem, Data(problem, pathlib.Path(description).parent), threads)


def serve(answer, side):
    for line in sys.stdin:
        command, argument = line.split()
        if command == "run":
            answer(timed_runs(side.run, float(argument)))
        elif command == "dump":
            side.output().astype("float32").tofile(argument)
            answer("ok")
        else:
            answer(f"failed unknown command {command}")


def main():
    # What the libraries print goes to stderr; only answers go to the runner.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(text):
        print(" ".join(text.split()), file=answers, flush=True)
    name, description, threads = sys.argv[1:]
    try:
        adapter = importlib.import_module(f"adapters.{name}")
        side = prepare(adapter, description, int(threads))
        answer(f"ready {side.version}")
    except Unsupported as e:
        answer(f"unsupported {e}")
        return
    except Exception as e:  # whatever a library throws is its result
        traceback.print_exc()
        answer(f"failed {type(e).__name__}: {str(e)[:400]}")
        return
    serve(answer, side)


if __name__ == "__main__":
    main()
