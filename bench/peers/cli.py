"""Options of scripts/peers."""
import argparse
import fnmatch
import pathlib

from problems import PROBLEMS

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "peers"
ADAPTERS = sorted(p.stem for p in (HERE / "adapters").glob("*.py"))
LEFT_OUT_OF_QUICK = ["jax_attention"]  # it materialises all logits: a minute a problem

DESCRIPTION = """Compares attend with other CPU attention libraries on the same problems.

The first call makes a Python environment in build/peers (about 4 GB with the data), installs the peers there and compiles
what has no package; what cannot be installed is reported with the reason. Then, for each problem: random data
are written, each library sets up its best layout (not timed), its output is compared with float64 on sampled
rows, and only a right one is timed, in turn with ours. The program that waits is stopped meanwhile. A spin
check before each run measures what other programs take; above 2 % the row is marked noisy.

A run of everything writes docs/benchmarks.md between its markers (--quick too); with --only, --case or
--threads the tables go to standard output only. The results are in build/peers/results.json, those of such
a part in partial.json, what the programs print in build/peers/logs."""
EXAMPLES = """examples:
  scripts/peers                                        everything
  scripts/peers --quick                                in a few minutes
  scripts/peers --only torch_sdpa --case 'prefill*'    one peer, some problems
  scripts/peers --list                                 the peers and the problems

The environment: python3 bench/peers/install.py --only PEER installs and runs nothing."""


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="scripts/peers", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--only", action="append", choices=ADAPTERS, metavar="PEER",
                        help="only this peer (may be repeated)")
    parser.add_argument("--case", default="*", metavar="PATTERN", help="problems to run, a shell pattern")
    parser.add_argument("--threads", type=int, action="append", metavar="N", help="threads (default: 2 and 1)")
    parser.add_argument("--quick", action="store_true", help="5 short rounds instead of 7, 2 threads, half of the problems, no jax")
    parser.add_argument("--timeout", type=int, default=240, metavar="SECONDS",
                        help="how long to wait for one answer (default: 240)")
    parser.add_argument("--list", action="store_true", help="list peers and problems, and end")
    o = parser.parse_args(arguments)
    o.complete = not o.only and o.case == "*" and not o.threads
    o.only = o.only or [a for a in ADAPTERS if not (o.quick and a in LEFT_OUT_OF_QUICK)]
    o.threads = o.threads or ([2] if o.quick else [2, 1])
    o.rounds, o.seconds = (5, 0.05) if o.quick else (7, 0.2)
    o.problems = [p for p in PROBLEMS if fnmatch.fnmatch(p.name, o.case) and (p.quick or not o.quick or o.case != "*")]
    if not o.problems:
        parser.error(f"no problem matches '{o.case}' (--list shows them)")
    if o.list:
        print("peers:", *ADAPTERS, "problems:", *(p.name for p in PROBLEMS), sep="\n  ")
        parser.exit()
    return o


if __name__ == "__main__":
    parse(None)
