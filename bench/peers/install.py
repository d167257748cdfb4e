"""Installs the peers into build/peers/env. Standard library only: it runs before there is an environment.

An adapter names what pip installs in REQUIRES, pinned, and in ALONE what it installs without dependencies;
one without a package has install(build, pip, run). The reason of a failure goes to
build/peers/install/NAME.failed, from where the report takes it.
"""
import importlib
import shutil
import subprocess
import sys
import venv

from cli import BUILD, parse

ENVIRONMENT = BUILD / "env"
PIP = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
# The common index has torch for CUDA under the same number; CPU builds say +cpu and may be here only.
CPU_TORCH = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
COMMON = ["numpy==2.4.6"]


def run(command, **options):
    """Raises with the last line of its errors."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    if done.returncode != 0:
        lines = [x for x in done.stderr.splitlines() if "rror" in x] or done.stderr.splitlines()
        raise RuntimeError(lines[-1].strip() if lines else f"{command[0]} failed")


def pip_install(requirements):
    command = [*PIP, "install", "-q", *requirements]
    try:
        run(command)
    except RuntimeError:
        run([*command, *CPU_TORCH])


def install(name):
    adapter = importlib.import_module(f"adapters.{name}")
    alone = getattr(adapter, "ALONE", [])
    wanted = " ".join([*adapter.REQUIRES, *alone, getattr(adapter, "SOURCE", "")]).strip()
    stamp, failed = (BUILD / "install" / f"{name}.{x}" for x in ("done", "failed"))
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"installing {adapter.LABEL}: {wanted}", file=sys.stderr, flush=True)
    failed.unlink(missing_ok=True)
    try:
        if adapter.REQUIRES:
            pip_install(adapter.REQUIRES)
        if alone:
            pip_install(["--no-deps", *alone])
        if hasattr(adapter, "install"):
            adapter.install(BUILD, PIP, run)
        stamp.write_text(wanted)
    except RuntimeError as e:
        failed.write_text(f"not installed: {e}")
        print(f"  {failed.read_text()}", file=sys.stderr)


def main():
    o = parse(sys.argv[1:])
    (BUILD / "install").mkdir(parents=True, exist_ok=True)
    if not (ENVIRONMENT / "bin" / "python").exists():
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        venv.create(ENVIRONMENT, with_pip=True)
        pip_install(COMMON)
    for name in o.only:
        install(name)


if __name__ == "__main__":
    main()
