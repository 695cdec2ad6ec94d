"""What the server adds to the sampler, and what its processes weigh.

    python benchmarks/server_overhead.py [--checkpoint lung-ultrasound-small] [--clips 5] [--steps N]

Starts the embedded server (medsora-server serve) in a temporary folder and asks it for clips over HTTP, one after
the other; before each, makes the same clip with the same pipeline in this process, for comparison in the same
minute. Added by the server: seconds from sending the POST until the answer says completed, less the seconds that the
worker reports for sampler and decoder. That is queue, claims, progress, writing the MP4, and polling (every 10 ms).
Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from generate import RESULTS, describe_machine, save, spread
from rich.console import Console
from rich.table import Table

from medsora.manifest import find_checkpoint, read_manifest
from medsora.request import GenerationRequest, resolve_request

POLL_S = 0.01
START_TIMEOUT_S = 300
CLIP_TIMEOUT_S = 1800


def main() -> None:
    options = parse_options()
    directory = find_checkpoint(options.checkpoint).resolve()
    manifest = read_manifest(directory)
    requests = [
        resolve_request(
            manifest,
            label=manifest.labels[seed % len(manifest.labels)].name,
            seed=seed,
            num_inference_steps=options.steps,
        )
        for seed in range(options.clips + 1)
    ]
    from medsora.pipeline import VideoPipeline

    pipeline = VideoPipeline.from_checkpoint(directory, device=options.device)
    with tempfile.TemporaryDirectory(prefix="medsora-bench-") as folder:
        started = time.perf_counter()
        with running_server(options.checkpoint, Path(folder), options.device) as (client, process):
            ready_s = time.perf_counter() - started
            idle = memory_by_role(process)
            clips = []
            for request in requests:
                direct_s = seconds_of(pipeline, request)
                clips.append({"direct_s": direct_s, **through_http(client, request, expected_s=direct_s)})
            loaded = memory_by_role(process)
    # The first clip of each process also pays for what torch sets up once.
    counted = clips[1:]
    result = {
        "checkpoint": manifest.name,
        "num_inference_steps": requests[0].num_inference_steps,
        "machine": describe_machine(str(pipeline.device)),
        "poll_s": POLL_S,
        "server_ready_s": ready_s,
        "added_ms": spread([1000 * (clip["http_s"] - clip["worker_s"]) for clip in counted]),
        "http_s": spread([clip["http_s"] for clip in counted]),
        "worker_s": spread([clip["worker_s"] for clip in counted]),
        "direct_s": spread([clip["direct_s"] for clip in counted]),
        "download_ms": spread([1000 * clip["download_s"] for clip in counted]),
        "memory_mib_idle": idle,
        "memory_mib_after_clips": loaded,
    }
    print_result(result)
    save(result, options.json or RESULTS / f"server-overhead-{manifest.name}.json")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what the server adds to the sampler, and its memory.")
    parser.add_argument("--checkpoint", default="lung-ultrasound-small", help="a directory, or a shipped name")
    parser.add_argument("--clips", type=int, default=5, help="clips to count, after one that is not (default: 5)")
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--device", default="auto", help="default: a GPU when there is one")
    parser.add_argument("--json", type=Path, help="file for the figures (default: in benchmarks/results)")
    options = parser.parse_args()
    if options.clips < 1:
        parser.error("--clips must be at least 1")
    return options


@contextmanager
def running_server(
    checkpoint: str, folder: Path, device: str
) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """The embedded server on a free port, ready to work; stopped as Ctrl-C would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEDSORA_")}
    environment |= {
        "MEDSORA_HOST": "127.0.0.1",
        "MEDSORA_PORT": str(port),
        "MEDSORA_DATA_DIR": str(folder / "data"),
        "MEDSORA_CHECKPOINTS": checkpoint if not Path(checkpoint).is_dir() else str(Path(checkpoint).resolve()),
        "MEDSORA_DEVICE": device,
    }
    command = [str(Path(sys.executable).with_name("medsora-server")), "serve"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                wait_until_ready(client, process, folder / "server.log")
                yield client, process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if client.get("/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"the server did not become ready; its log ends:\n{log.read_text(errors='replace')[-3000:]}")


def seconds_of(pipeline: Any, request: GenerationRequest) -> float:
    started = time.perf_counter()
    pipeline([request])
    return time.perf_counter() - started


def through_http(client: httpx.Client, request: GenerationRequest, *, expected_s: float) -> dict[str, float]:
    """One clip through the server. Polls only near the expected end, so as not to take the sampler's processor."""
    body = {
        "prompt": request.label,
        "seed": request.seed,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "sampler": request.sampler,
    }
    started = time.perf_counter()
    video = client.post("/v1/videos", json=body).raise_for_status().json()
    time.sleep(0.8 * expected_s)
    while video["status"] in ("queued", "in_progress"):
        if time.perf_counter() - started > CLIP_TIMEOUT_S:
            raise SystemExit(f"no end after {CLIP_TIMEOUT_S} s: {video}")
        time.sleep(POLL_S)
        video = client.get(f"/v1/videos/{video['id']}").raise_for_status().json()
    http_s = time.perf_counter() - started
    if video["status"] != "completed":
        raise SystemExit(f"the job failed: {video['error']}")
    content = client.get(f"/v1/videos/{video['id']}/content").raise_for_status().content
    download_s = time.perf_counter() - started - http_s
    if hashlib.sha256(content).hexdigest() != video["sha256"]:
        raise SystemExit(f"the file of {video['id']} is not the one that the worker wrote")
    return {"http_s": http_s, "worker_s": video["inference_time_s"], "download_s": download_s}


def memory_by_role(process: subprocess.Popen[bytes]) -> dict[str, dict[str, float]]:
    """Resident memory of the supervisor and, summed over their descendants, of each process it started.

    PSS shares pages that several processes map; RSS counts them for each.
    """
    supervisor = psutil.Process(process.pid)
    groups = {"supervisor": [supervisor]}
    for child in supervisor.children():
        groups.setdefault(role_of(child), []).extend([child, *child.children(recursive=True)])
    figures = {}
    for role, members in groups.items():
        memory = [member.memory_full_info() for member in members]
        figures[role] = {
            "processes": len(members),
            "rss_mib": sum(one.rss for one in memory) / 2**20,
            "pss_mib": sum(one.pss for one in memory) / 2**20,
        }
    return figures


def role_of(process: psutil.Process) -> str:
    words = " ".join(process.cmdline()).lower()
    for role in ("redis", "worker", "reaper", "api"):
        if role in words:
            return role
    return str(process.name())


def print_result(result: dict[str, Any]) -> None:
    machine = result["machine"]
    console = Console(highlight=False)
    console.print(
        f"{result['checkpoint']}, {result['num_inference_steps']} steps on {machine['device']}; "
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}"
    )
    table = Table("", "median", "least", "most")
    rows = {
        "added_ms": "added by the server, ms a clip",
        "http_s": "post to completed, s",
        "worker_s": "sampler and decoder in the worker, s",
        "direct_s": "the same in this process, s",
        "download_ms": "download, ms",
    }
    for name, words in rows.items():
        table.add_row(words, *(f"{result[name][key]:.2f}" for key in ("median", "least", "most")))
    console.print(table)
    memory = Table("process", "processes", "RSS MiB", "PSS MiB", "RSS MiB before the first clip")
    for role, figures in result["memory_mib_after_clips"].items():
        before = result["memory_mib_idle"].get(role)
        memory.add_row(
            role,
            str(figures["processes"]),
            f"{figures['rss_mib']:.0f}",
            f"{figures['pss_mib']:.0f}",
            f"{before['rss_mib']:.0f}" if before else "",
        )
    console.print(memory)
    console.print(f"ready after {result['server_ready_s']:.1f} s; {result['added_ms']['count']} clips counted")


if __name__ == "__main__":
    main()
