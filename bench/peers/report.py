"""Tables of a run in Markdown."""
import platform
import re
import statistics

BEGIN, END = "<!-- peers:begin, written by scripts/peers -->", "<!-- peers:end -->"
NOISY_ABOVE = 0.02  # as in attend bench


def noise(pair):
    return " (noisy)" if pair["lost"] > NOISY_ABOVE else ""


def _time(ms):
    return f"{ms * 1e3:.1f} us" if ms < 1 else f"{ms:.1f} ms" if ms < 100 else f"{ms:.0f} ms"


def _rate(result, ms):
    """GB/s of keys and values for decodes, GFLOP/s for prefills."""
    if result["decode"]:
        return f"{result['bytes'] / ms * 1e-6:.1f} GB/s"
    return f"{result['flops'] / ms * 1e-6:.0f} GFLOP/s"


def _timed(result):
    return sorted((p for p in result["peers"] if "ms" in p), key=lambda p: p["ms"])


def _table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _summary(results, threads):
    rows = []
    for r in results:
        timed = _timed(r)
        if r["threads"] != threads or not timed:
            continue
        best = timed[0]
        rows.append([f"`{r['problem']}`", _time(best["our_ms"]), _rate(r, best["our_ms"]), best["label"],
                     _time(best["ms"]), _rate(r, best["ms"]), f"{best['ms'] / best['our_ms']:.2f}"
                     + noise(best)])
    return _table(["problem", "attend", "", "fastest peer", "", "", "peer's time / ours"], rows)


def _details(results, threads):
    rows = []
    for r in results:
        for p in _timed(r) if r["threads"] == threads else []:
            few = " (one round)" if p["rounds"] == 1 else ""
            rows.append([f"`{r['problem']}`", p["label"], _time(p["ms"]), _time(p["our_ms"]),
                         f"{p['ms'] / p['our_ms']:.2f}{noise(p)}{few}", f"{p['error']:.1e}",
                         f"{r['our_error']:.1e}"])
    return _table(["problem", "peer", "peer", "attend beside it", "ratio", "peer's error", "our error"],
                  rows)


def _not_run(results):
    """Reasons, each with the problems that it is about."""
    reasons = {}
    for r in results:
        for p in r["peers"]:
            reason = p.get("failed") or p.get("not_offered")
            if reason:
                names = reasons.setdefault((p["label"], reason), [])
                names.append(r["problem"]) if r["problem"] not in names else None
    every = len({r["problem"] for r in results})
    rows = [[label, "all" if len(names) == every else ", ".join(f"`{n}`" for n in names),
             reason.replace("|", "\\|").replace("<", "\\<")]
            for (label, reason), names in sorted(reasons.items())]
    return _table(["peer", "problems", "why there is no figure"], rows) if rows else "Everything ran."


def _versions(results):
    """What each peer says of itself, and the settings that were fastest."""
    seen = {}
    for r in results:
        for p in r["peers"]:
            if "version" in p:
                seen.setdefault(p["label"], {}).setdefault(p["version"], []).append(r["problem"])
    rows = []
    for label, versions in sorted(seen.items()):
        for version, problems in versions.items():
            kinds = sorted({re.split(r"_(?=gqa4|8x|64x|128$|4k$)", n)[0] for n in problems})
            rows.append([label, version, ", ".join(f"`{k}`" for k in kinds)])
    return _table(["peer", "version and settings", "used for"], rows)


def machine():
    """The CPU without the machine's name."""
    with open("/proc/cpuinfo") as file:
        text = file.read()
    model = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    flags = set(re.search(r"^flags\s*: (.*)", text, re.MULTILINE).group(1).split())
    wanted = ("avx2 fma avx512f avx512bw avx512_vnni avx512_bf16 avx512_fp16 avx512vbmi avx_vnni amx_tile "
              "amx_bf16 amx_int8").split()
    family = [re.search(rf"^{key}\s*: (\d+)", text, re.MULTILINE).group(1)
              for key in ("cpu family", "model", "stepping")]
    return (f"{model.group(1)}, family {family[0]} model {family[1]} stepping {family[2]}, "
            f"{text.count('processor')} CPUs, {' '.join(f for f in wanted if f in flags)}; "
            f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}")


def _ceilings(results, threads):
    measured = [r["ceilings"] for r in results if r["threads"] == threads and "ceilings" in r]
    if not measured:
        return "attend did not run."
    fma, dot, int8, read = (statistics.median(float(c[i]) for c in measured) for i in range(4))
    return (f"Ceilings beside it: float32 FMA {fma:.0f} GFLOP/s, bf16 dot products {dot:.0f} GFLOP/s, int8 "
            f"dot products {int8:.0f} GOP/s (vector instructions, not tiles), reading {read:.1f} GB/s.")


def _disturbance(results):
    """A warning where other programs took much of the time, else nothing."""
    timed = [p["lost"] for r in results for p in _timed(r)]
    lost = statistics.median(timed) if timed else 0
    if lost <= NOISY_ABOVE:
        return []
    return [f"**Other programs took {100 * lost:.0f} % of the time** (median of the spin checks): times and rates "
            "are far from what this machine can do, and ratios are rough. Repeat it on a quiet machine."]


def markdown(results, options):
    command = "scripts/peers" + (" --quick" if options.quick else "")
    version = next((r["version"] for r in results if "version" in r), "did not run")
    parts = [f"Command: `{command}`; {options.rounds} rounds. Machine: {machine()}. attend: {version}.",
             *_disturbance(results)]
    counts = sorted({r["threads"] for r in results}, reverse=True)
    for threads in counts:
        parts += [f"### {threads} thread{'s' if threads > 1 else ''}", _ceilings(results, threads),
                  _summary(results, threads)]
    for threads in counts:
        parts += [f"### Every peer, {threads} thread{'s' if threads > 1 else ''}", _details(results, threads)]
    parts += ["### Versions and settings", _versions(results), "### What did not run", _not_run(results)]
    return "\n\n".join(parts)


def insert(text, path):
    """Replaces what is between the markers."""
    old = path.read_text()
    before, rest = old.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
