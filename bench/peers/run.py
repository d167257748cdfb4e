"""Runs the problems through the peers and through attend, run by run in turn."""
import importlib
import json
import pathlib
import statistics
import sys
import time

import report
from cli import BUILD, HERE, ROOT, parse
from data import Data
from problems import ERROR_LIMIT
from sides import SideFailed, SideProcess

SLOWER_BEYOND_DOUBT = 8  # times
COLD_BELOW = 2  # s; what a first run does besides attention does not matter in longer ones


def say(text):
    print(text, file=sys.stderr, flush=True)


def start_attend(data, threads, timeout):
    log = BUILD / "logs" / f"{data.problem.name}-{threads}-attend.log"
    return SideProcess([ROOT / "build/release/bench/attend_peer", data.description, threads], {}, log,
                       timeout)


def start_peer(name, data, threads, timeout):
    adapter = importlib.import_module(f"adapters.{name}")
    # Huge pages for whatever the library allocates with malloc: ours has them too.
    environment = {"OMP_NUM_THREADS": str(threads), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
                   "PYTHONPATH": str(HERE)}
    if hasattr(adapter, "environment"):
        environment |= adapter.environment(threads)
    log = BUILD / "logs" / f"{data.problem.name}-{threads}-{name}.log"
    return SideProcess([sys.executable, HERE / "worker.py", name, data.description, threads],
                       environment, log, timeout)


def checked_run(side, data, reference):
    """(milliseconds, relative error) of one run; what is wrong is not timed further."""
    output = BUILD / "output.f32"
    ms = side.milliseconds(0)
    side.ask(f"dump {output}")
    error = data.error(output, reference)
    if not error <= ERROR_LIMIT[data.problem.kv]:
        raise SideFailed(f"wrong result: relative error {error:.2g}")
    return ms, error


def compare(peer, first_ms, ours, options):
    """Medians of alternating runs, and the share of time that other programs took. For a peer that is
    slower beyond doubt its first run is enough."""
    times, our_times, lost = [], [], []
    if first_ms < 1e3 * COLD_BELOW:
        first_ms = peer.milliseconds(0)
    slower = first_ms > SLOWER_BEYOND_DOUBT * ours.milliseconds(0)
    for _ in range(1 if slower else options.rounds):
        lost.append(float(ours.ask("spin 0.05")))
        times.append(first_ms if slower else peer.milliseconds(options.seconds))
        our_times.append(ours.milliseconds(options.seconds))
    return {"rounds": len(times), "ms": statistics.median(times), "our_ms": statistics.median(our_times),
            "lost": statistics.median(lost)}


def run_pair(name, data, reference, ours, options):
    adapter = importlib.import_module(f"adapters.{name}")
    result = {"peer": name, "label": adapter.LABEL}
    reason = adapter.unsupported(data.problem)
    if reason:
        return result | {"not_offered": reason}
    try:
        failed = BUILD / "install" / f"{name}.failed"
        if failed.exists():
            raise SideFailed(failed.read_text().strip())
        with start_peer(name, data, ours["threads"], options.timeout) as peer:
            first_ms, error = checked_run(peer, data, reference)
            result |= {"version": peer.version, "error": error}
            result |= compare(peer, first_ms, ours["side"], options)
    except SideFailed as e:
        say(f"    {adapter.LABEL}: {e}")
        return result | {"failed": str(e)}
    say(f"    {adapter.LABEL}: {result['ms']:.3f} ms, attend {result['our_ms']:.3f} ms, "
        f"{result['ms'] / result['our_ms']:.2f} times as fast; errors {result['error']:.1e}, "
        f"{ours['error']:.1e}{report.noise(result)}")
    return result


def run_problem(problem, threads, options):
    data = Data(problem, BUILD / "data")
    data.make()
    reference = data.reference()
    result = {"problem": problem.name, "threads": threads, "flops": problem.flops,
              "bytes": problem.bytes, "decode": problem.is_decode, "peers": []}
    try:
        with start_attend(data, threads, options.timeout) as side:
            _, error = checked_run(side, data, reference)
            ours = {"side": side, "threads": threads, "error": error}
            result |= {"version": side.version, "our_error": error,
                       "ceilings": side.ask("ceilings").split()}
            for name in options.only:
                result["peers"].append(run_pair(name, data, reference, ours, options))
    except SideFailed as e:
        say(f"    attend: {e}")
        result["failed"] = str(e)
    return result


def main():
    o = parse(sys.argv[1:])
    for folder in ("data", "logs"):
        (BUILD / folder).mkdir(parents=True, exist_ok=True)
    results, start = [], time.monotonic()
    for i, problem in enumerate(o.problems):
        for threads in [problem.only_threads] if problem.only_threads else o.threads:
            say(f"[{i + 1}/{len(o.problems)}, {time.monotonic() - start:.0f} s] {problem.name}, "
                f"{threads} thread(s)")
            results.append(run_problem(problem, threads, o))
            (BUILD / ("results.json" if o.complete else "partial.json")).write_text(json.dumps(results, indent=1))
    text = report.markdown(results, o)
    if o.complete:
        report.insert(text, ROOT / "docs" / "benchmarks.md")
        say("Wrote docs/benchmarks.md")
    else:
        print(text)


if __name__ == "__main__":
    main()
