"""TensorBoard beside a run: its own process, the next free port, ended by its own pid. Never a reason to stop."""

from __future__ import annotations

import getpass
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from gadcli.config.schema import GadConfig
from gadcli.launch import environment

PORTS_TO_TRY = 64
STOP_WAIT_S = 3.0


def wanted(config: GadConfig) -> bool:
    """Whether this stage's settings ask for a TensorBoard."""
    when = config.trainer.tensorboard.auto_start
    return "tensorboard" in config.trainer.logger and (when == "always" or when == config.stage)


def next_free_port(host: str, first: int) -> int | None:
    """The first port from `first` on that nobody listens on; None when a whole row of them is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(first, min(first + PORTS_TO_TRY, 65536)):
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    return None


class TensorBoard:
    """One TensorBoard process. Everything that can go wrong with it becomes a line of text, never an error."""

    def __init__(
        self, log_dir: Path, output: Path, host: str = environment.LOOPBACK, port: int = 6006, keep: bool = False
    ) -> None:
        self.log_dir = log_dir
        self.output = output
        self.host = host
        self.first_port = port
        self.keep = keep
        self.port: int | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._told = False

    def start(self, mark: Mapping[str, str]) -> str:
        """Start it; returns the line to show: where it is, its pid and the ssh line, or why there is none.

        `mark` are the variables that make it one of the run's processes, to be ended with them (unless `keep`).
        """
        if self.process is not None and self.process.poll() is None:
            return ""
        if importlib.util.find_spec("tensorboard") is None:
            return "warning: TensorBoard is not installed, the run goes on without it (pip install tensorboard)"
        self.port = next_free_port(self.host, self.first_port)
        if self.port is None:
            return f"warning: no TensorBoard: ports from {self.first_port} on are taken (trainer.tensorboard.port=…)"
        self.log_dir.mkdir(parents=True, exist_ok=True)
        # load_fast=false: its data server is a process of its own that may outlive it.
        words = ["--logdir", str(self.log_dir), "--host", self.host, "--port", str(self.port),
                 "--load_fast", "false", "--reload_interval", "10"]  # fmt: skip
        module = "tensorboard.main"
        launcher = [sys.executable, "-P", "-m"]
        if not self.keep:  # the same tie to our life that a worker has
            launcher += ["gadcli.launch.lifetime"]
        env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": environment.python_path()}
        if not self.keep:
            env |= mark
        with self.output.open("ab") as file:
            self.process = subprocess.Popen(
                [*launcher, module, *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env=env,
            )
        return self.where()

    def where(self) -> str:
        """Its address, its pid and how to see it from another machine."""
        assert self.process is not None
        url = f"http://{self.host}:{self.port}/"
        tunnel = f"ssh -N -L {self.port}:{environment.LOOPBACK}:{self.port} {getpass.getuser()}@{socket.gethostname()}"
        kept = f", stays after the run: kill {self.process.pid}" if self.keep else ""
        return f"TensorBoard {url} (pid {self.process.pid}{kept}); from elsewhere: {tunnel}"

    def trouble(self) -> str:
        """A warning, once, when it has died."""
        if self.process is None or self._told or self.process.poll() is None:
            return ""
        self._told = True
        return f"warning: TensorBoard ended with code {self.process.returncode}, the run goes on ({self.output})"

    def stop(self) -> None:
        """End it by its own pid, unless it is to be kept."""
        if self.process is None or self.keep:
            return
        self._told = True
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                deadline = time.monotonic() + STOP_WAIT_S
                while self.process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.02)
