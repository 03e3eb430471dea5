"""A real PostgreSQL and a real MLflow server on loopback, each in a temporary folder, each stopped by its own pid."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PASSWORD = "planted-secret-7f3a"


def binaries() -> Path | None:
    """The folder of PostgreSQL's server binaries, if this machine has them."""
    on_path = Path(shutil.which("initdb") or "/none/initdb").resolve().parent
    places = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), on_path]
    return next((place for place in places if (place / "postgres").exists() and (place / "createdb").exists()), None)


def free_port() -> int:
    """A port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], what: str, seconds: float = 180) -> None:
    """Wait for a server to answer, or say that it died."""
    until = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"{what} did not start (exit code {process.poll()})")
        time.sleep(0.1)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Run PostgreSQL with one empty database `mlflow`; yields its URL, password and all."""
    bin_, port = binaries(), free_port()
    assert bin_ is not None
    owner = "postgres" if os.getuid() == 0 else None  # the server refuses root
    folder = Path(tempfile.mkdtemp(prefix="octofold-pg-", dir="/tmp"))
    try:
        (folder / "password").write_text(PASSWORD)
        if owner:
            shutil.chown(folder, owner)
            shutil.chown(folder / "password", owner)
        data = folder / "data"
        subprocess.run(
            [bin_ / "initdb", "-D", data, "-U", "octofold", "-A", "scram-sha-256", "--no-sync",
             f"--pwfile={folder / 'password'}"],
            check=True, stdout=subprocess.DEVNULL, user=owner, cwd=folder,
        )  # fmt: skip
        log = (folder / "log").open("wb")
        process = subprocess.Popen(
            [bin_ / "postgres", "-D", data, "-p", str(port), "-k", folder, "-c", "listen_addresses=127.0.0.1",
             "-c", "fsync=off"],
            stderr=log, user=owner, cwd=folder,
        )  # fmt: skip
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        address = ["-h", "127.0.0.1", "-p", str(port), "-U", "octofold"]
        try:
            create = [bin_ / "createdb", *address, "mlflow"]
            wait_until(
                lambda: subprocess.run(create, env=environment, stderr=subprocess.DEVNULL).returncode == 0,
                process, "postgres",
            )  # fmt: skip
            yield f"postgresql://octofold:{PASSWORD}@127.0.0.1:{port}/mlflow"
        finally:
            process.send_signal(signal.SIGINT)  # "fast shutdown"
            process.wait()
            log.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class MlflowServer:
    """`mlflow server` over a database, with proxied artifacts; may be stopped and started again."""

    store: str
    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "MlflowServer":
        """Start it and wait until it answers."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=self.folder, start_new_session=True, stdout=log, stderr=log
            )
        wait_until(self._answers, self.process, "mlflow server")
        return self

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        """Stop it and the processes it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait()
        self.process = None
