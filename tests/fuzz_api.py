"""Try every endpoint of a real server with requests that schemathesis makes up from the OpenAPI document.

Starts a server with the tiny checkpoint in a temporary folder; options go to ``schemathesis run``. Without any it makes
up to 500 requests of each kind for each endpoint, which takes minutes. The exit code is that of schemathesis, or 1 when
the server did not outlive it.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONG_RUN = ("--max-examples", "500", "--continue-on-failure")
START_LIMIT_S = 90.0


def start(folder: Path) -> tuple[subprocess.Popen[bytes], str, str]:
    """Start a server that is ready to generate; returns it, its URL, and a key that it asks for."""
    from medsora.checkpoint import write_tiny_checkpoint

    checkpoint = write_tiny_checkpoint(folder / "tiny")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEDSORA_")}
    environment |= {
        "MEDSORA_DATA_DIR": str(folder / "data"),
        "MEDSORA_CHECKPOINTS": str(checkpoint),
        "MEDSORA_MAX_QUEUED_JOBS": "1000000",
        "MEDSORA_MAX_ACTIVE_BATCHES": "10000",
        "MEDSORA_MIN_FREE_BYTES": "0",
        "MEDSORA_LOG_LEVEL": "warning",
        "OMP_NUM_THREADS": "1",
    }
    make_key = [sys.executable, "-m", "server.cli", "keys", "create", "--name", "fuzz"]
    made = subprocess.run(make_key, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    log = folder / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "serve", "--port", "0"],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        text = log.read_text(errors="replace")
        match = re.search(r"is ready: POST (http://\S+)/v1/videos", text)
        if match is not None:
            return server, match[1], made.stdout.strip()
        if server.poll() is not None or time.monotonic() > deadline:
            stop(server)
            raise SystemExit(f"the server did not start:\n{text[-4000:]}")
        time.sleep(0.1)


def stop(server: subprocess.Popen[bytes]) -> int:
    """Stop a server; returns its exit code."""
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
    try:
        return server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


def main(options: list[str]) -> int:
    """Run schemathesis against a server of our own."""
    program = Path(sys.executable).with_name("schemathesis")
    with tempfile.TemporaryDirectory(prefix="medsora-fuzz-") as name:
        folder = Path(name)
        server, url, key = start(folder)
        try:
            command = [str(program), "--config-file", str(ROOT / "schemathesis.toml"), "run", f"{url}/openapi.json"]
            command += ["--header", f"Authorization: Bearer {key}"]
            environment = os.environ | {"SCHEMATHESIS_HOOKS": str(ROOT / "tests" / "fuzz_hooks.py")}
            done = subprocess.run([*command, *(options or LONG_RUN)], cwd=folder, env=environment, check=False)
            with urllib.request.urlopen(f"{url}/health/live", timeout=10.0) as answer:
                is_alive = answer.status == 200
        finally:
            code_of_server = stop(server)
        failures = [line for line in (folder / "server.log").read_text().splitlines() if "Traceback" in line]
        print(f"server: ended with {code_of_server}, {len(failures)} tracebacks in its log")
        return done.returncode or int(not is_alive or code_of_server != 0 or bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
