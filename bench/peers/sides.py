"""The processes whose runs alternate. Each answers one line a command; whoever does not run is stopped, so
that threads which wait actively take no time from the other side."""
import ctypes
import os
import queue
import signal
import subprocess
import threading

PR_SET_PDEATHSIG = 1


def _die_with_parent():
    """A stopped side would outlive a runner that was killed, with all its memory."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class SideFailed(Exception):
    """No answer, or one that says failed; the text is the reason."""


class SideProcess:
    def __init__(self, command, environment, log, timeout):
        self.timeout = timeout
        self.log = open(log, "w")
        self.process = subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True, bufsize=1, env=os.environ | environment, start_new_session=True,
            preexec_fn=_die_with_parent)
        self.answers = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.version = self._answer()
        self.pause()

    def _read(self):
        for line in self.process.stdout:
            self.answers.put(line.strip())
        self.answers.put(None)

    def _answer(self):
        """What follows the first word of the answer."""
        try:
            line = self.answers.get(timeout=self.timeout)
        except queue.Empty:
            self.close()
            raise SideFailed(f"no answer in {self.timeout} s") from None
        if line is None:
            code = self.process.wait()
            self.log.flush()
            raise SideFailed(f"ended with status {code}")
        word, _, rest = line.partition(" ")
        if word in ("failed", "unsupported"):
            raise SideFailed(rest)
        return rest

    def pause(self):
        os.killpg(self.process.pid, signal.SIGSTOP)

    def ask(self, command):
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            self.process.stdin.write(command + "\n")
        except BrokenPipeError:
            raise SideFailed("has ended") from None
        rest = self._answer()
        self.pause()
        return rest

    def milliseconds(self, seconds):
        return float(self.ask(f"run {seconds}").split()[0])

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
