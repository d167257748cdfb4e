#!/usr/bin/env python3
"""Makes the linker see an older glibc than the machine has.

glibc keeps every old version of a symbol for programs that were linked long ago, but the linker takes the newest. So
this writes libraries without code that stand for libc, libm, libpthread, libdl and librt while linking: each has the
symbols of the machine's own libraries in the newest version that the floor has, read with readelf. What has no version
that old must come from glibc_shim.c.

Usage: glibc_floor.py VERSION FOLDER    writes FOLDER/lib*.so, and the linker scripts that g++ looks for
       glibc_floor.py VERSION --check FILE.so    which symbols of FILE.so are too new for the floor
"""

import collections
import pathlib
import re
import subprocess
import sys

SYMBOL = re.compile(r"^\s*\d+: [0-9a-f]+\s+(\S+) (\w+)\s+(\w+)\s+(\w+)\s+(\w+) (\S+?)@@?([\w.]+)?(?: \(\d+\))?$")
LIBRARIES = {"libc.so.6": "c", "libm.so.6": "m", "libpthread.so.0": "pthread", "libdl.so.2": "dl", "librt.so.1": "rt"}
# glibc 2.34 moved four libraries into libc; before, a symbol was in one whose name it tells.
MOVED_IN = (2, 34)
REALTIME = ("aio_", "clock_", "lio_", "mq_", "shm_", "timer_")


def number(version):
    """(2, 28) of GLIBC_2.28; None of versions that are no number, such as GLIBC_PRIVATE."""
    match = re.fullmatch(r"GLIBC_(\d+(?:\.\d+)*)", version or "")
    return tuple(int(x) for x in match.group(1).split(".")) if match else None


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def symbols(path, defined):
    """(name, version, type, size) of the dynamic symbols of a library."""
    for line in run("readelf", "--dyn-syms", "--wide", str(path)).splitlines():
        match = SYMBOL.match(line)
        if match and (match.group(5) != "UND") == defined and match.group(5) != "ABS":
            yield match.group(6), match.group(7), match.group(2), match.group(1)


def home(name, versions):
    """The library that had a symbol of today's libc before glibc 2.34."""
    if max(versions) != MOVED_IN or len(versions) == 1:
        return "libc.so.6"
    if name.startswith("dl"):
        return "libdl.so.2"
    return "librt.so.1" if name.startswith(REALTIME) else "libpthread.so.0"


def write_library(folder, soname, found):
    """found: {name: (version, type, size)}."""
    source, by_version = [], collections.defaultdict(list)
    for name, (version, kind, size) in sorted(found.items()):
        kind = {"OBJECT": "object", "TLS": "tls_object"}.get(kind, "function")
        section = {"object": ".data", "tls_object": '.section .tdata,"awT"'}.get(kind, ".text")
        source.append(f"{section}\n.globl {name}\n.type {name}, @{kind}\n.size {name}, {int(size, 0)}\n{name}: .skip 8")
        by_version[version].append(name)
    script = "".join(f"GLIBC_{'.'.join(map(str, v))} {{ {' '.join(f'{n};' for n in names)} }};\n"
                     for v, names in sorted(by_version.items()))
    assembly, versions = folder / f"{soname}.s", folder / f"{soname}.versions"
    assembly.write_text("\n".join(source) + '\n.section .note.GNU-stack,"",@progbits\n')
    versions.write_text(script)
    run("gcc", "-shared", "-nostdlib", f"-Wl,-soname,{soname}", f"-Wl,--version-script={versions}",
        "-o", str(folder / soname), str(assembly))


def make(floor, folder):
    folder.mkdir(parents=True, exist_ok=True)
    paths = {soname: run("gcc", f"-print-file-name={soname}").strip() for soname in LIBRARIES}
    found = {soname: {} for soname in LIBRARIES}
    for soname in ("libc.so.6", "libm.so.6"):
        versions = collections.defaultdict(dict)
        for name, version, kind, size in symbols(paths[soname], defined=True):
            if number(version):
                versions[name][number(version)] = (kind, size)
        for name, known in versions.items():
            old = [v for v in known if v <= floor]
            if old:
                library = home(name, known) if soname == "libc.so.6" else soname
                found[library][name] = (max(old), *known[max(old)])
    for soname, known in found.items():
        write_library(folder, soname, known)
        (folder / f"lib{LIBRARIES[soname]}.so").write_text(f"INPUT({folder / soname})\n")
    static = run("gcc", "-print-file-name=libc_nonshared.a").strip()
    loader = run("gcc", "-print-file-name=ld-linux-x86-64.so.2").strip()
    others = " ".join(str(folder / s) for s in ("libpthread.so.0", "libdl.so.2", "librt.so.1"))
    # The shim goes first: libc_nonshared.a and the loader may have what it replaces.
    (folder / "libc.so").write_text(
        f"GROUP({folder / 'glibc_shim.o'} {folder / 'libc.so.6'} AS_NEEDED({others}) {static} AS_NEEDED({loader}))\n")
    shim = pathlib.Path(__file__).with_name("glibc_shim.c")
    run("gcc", "-O2", "-fPIC", "-fvisibility=hidden", "-c", str(shim), "-o", str(folder / "glibc_shim.o"))
    print(f"{folder}: " + ", ".join(f"{len(known)} symbols of {soname}" for soname, known in found.items()))


def check(floor, path):
    """Symbols that the floor lacks, and undefined ones without a version: Python's are all that may be."""
    wrong = []
    for name, version, _, _ in symbols(path, defined=False):
        if version and not version.startswith("GCC_") and (number(version) or (99,)) > floor:
            wrong.append(f"{name}@{version}")
    text = run("nm", "--dynamic", "--undefined-only", str(path))
    wrong += [name for kind, name in re.findall(r"^\s+(\w) (\S+)$", text, re.MULTILINE)
              if kind == "U" and "@" not in name and not re.match(r"_?Py", name)]
    for name in wrong:
        print(f"{path}: {name} is not in glibc {'.'.join(map(str, floor))}", file=sys.stderr)
    return 1 if wrong else 0


def main():
    floor = tuple(int(x) for x in sys.argv[1].split("."))
    if sys.argv[2] == "--check":
        return check(floor, pathlib.Path(sys.argv[3]))
    make(floor, pathlib.Path(sys.argv[2]).resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
