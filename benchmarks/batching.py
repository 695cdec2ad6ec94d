"""How much of the sampler's throughput is left with the whole server around it, and many clients at once.

    python benchmarks/batching.py [--checkpoint tiny] [--clients 64] [--batch N] [--clips 1024] [--steps N]
    python benchmarks/batching.py --checkpoint lung-ultrasound-small          # the figure of a GPU, where there is one
    python benchmarks/batching.py --checkpoint lung-ultrasound-small --sampler euler --steps 50
    python benchmarks/batching.py --setting KEEP_LOSSLESS=false       # without the exact files, half of the encoding

Starts the embedded server (medsora-server serve, with its own Redis) in a temporary folder. Clients, each a thread with
a connection of its own, post requests and poll as the headers of the answers tell, each with a few outstanding; the
rate is that of finished clips, each encoded, stored and committed, from the middle part of the run, when nobody is
starting or running out of work. Before and after that, with no server there, the same pipeline samples batches of the
same size in a process of its own, for what it can do alone. On a GPU it is compiled, as in the server. No network.

The CPU seconds of every process are counted as well, the clients' included: on a machine of few cores all of them share
these with the sampler, and cores / (CPU seconds a clip) is the most that any server could make of them. They say
something on a busy machine, too, where the ratio does not. Prints a table last, writes JSON.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from clients import Clients
from generate import RESULTS, describe_machine, save
from process_times import cpu_seconds

from medsora.manifest import Manifest, find_checkpoint, read_manifest
from medsora.request import GenerationRequest, resolve_request

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 900
BEGAN = time.perf_counter()


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="medsora-bench-") as folder:
        checkpoint = find(options.checkpoint, Path(folder))
        before = raw_rate(checkpoint, options)
        say(f"sampler alone: {before['clips_per_s']:.2f} clips/s")
        with running_server(checkpoint, Path(folder), options, before["batch"]) as (url, process):
            database = Path(folder) / "data" / "medsora.db"
            say("the server is ready")
            served = load(url, process, database, checkpoint, options, before["batch"])
            say(f"server: {served['clips_per_s']:.2f} clips/s")
        after = raw_rate(checkpoint, options, batch=before["batch"])
        say(f"sampler alone: {after['clips_per_s']:.2f} clips/s")
        raw = (before["clips_per_s"] + after["clips_per_s"]) / 2
        result = {
            "checkpoint": read_manifest(checkpoint).name,
            "machine": describe_machine(before["device"]),
            "settings": options.setting,
            "clients": options.clients,
            "outstanding": options.outstanding,
            "batch": before["batch"],
            "num_inference_steps": request_of(checkpoint, options.sampler, options.steps, 0).num_inference_steps,
            "raw_before": before["clips_per_s"],
            "raw_after": after["clips_per_s"],
            "raw_clips_per_s": raw,
            "raw_cpu_ms": (before["cpu_ms"] + after["cpu_ms"]) / 2,
            **served,
            "ratio": served["clips_per_s"] / raw,
        }
    save(result, options.json or RESULTS / f"batching-{result['checkpoint']}.json")
    print_result(result)


def say(text: str) -> None:
    print(f"{time.perf_counter() - BEGAN:6.1f} s  {text}", file=sys.stderr, flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Throughput of the server against that of the sampler alone.")
    parser.add_argument("--checkpoint", default="tiny", help="a directory, a shipped name, or tiny (random weights)")
    parser.add_argument("--clients", type=int, default=64, help="threads that ask (default: 64)")
    parser.add_argument("--outstanding", type=int, default=4, help="requests of a client at a time (default: 4)")
    parser.add_argument("--batch", type=int, help="clips sampled at once (default: 64 on a GPU, 16 else)")
    parser.add_argument("--clips", type=int, default=1024, help="clips in all (default: 1024)")
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--sampler", help="default: the checkpoint's")
    parser.add_argument("--device", default="auto", help="default: a GPU when there is one")
    parser.add_argument("--threads", type=int, help="threads of torch, in the server as well as alone")
    parser.add_argument(
        "--setting", action="append", default=[], metavar="NAME=VALUE", help="of the server, e.g. KEEP_LOSSLESS=false"
    )
    parser.add_argument("--json", type=Path, help="file for the figures (default: in benchmarks/results)")
    options = parser.parse_args()
    if min(options.clients, options.outstanding, options.clips) < 1:
        parser.error("numbers must be at least 1")
    if not all("=" in setting for setting in options.setting):
        parser.error("--setting wants NAME=VALUE")
    return options


def find(name: str, folder: Path) -> Path:
    if name != "tiny":
        return find_checkpoint(name).resolve()
    from medsora.checkpoint import write_tiny_checkpoint

    return write_tiny_checkpoint(folder / "tiny")


@lru_cache
def manifest_of(checkpoint: Path) -> Manifest:
    return read_manifest(checkpoint)


def request_of(checkpoint: Path, sampler: str | None, steps: int | None, seed: int) -> GenerationRequest:
    manifest = manifest_of(checkpoint)
    label = manifest.labels[seed % len(manifest.labels)].name
    return resolve_request(manifest, label=label, seed=seed, sampler=sampler, num_inference_steps=steps)


# -- the sampler alone ---------------------------------------------------------------------------------------


def raw_rate(checkpoint: Path, options: argparse.Namespace, batch: int | None = None) -> dict[str, Any]:
    """Clips a second of sampler and decoder, in a process of their own, which is gone afterwards."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=measure_raw,
        args=(
            theirs,
            str(checkpoint),
            options.device,
            options.sampler,
            options.steps,
            batch or options.batch,
            options.threads,
        ),
    )
    process.start()
    theirs.close()
    try:
        answer: dict[str, Any] = ours.recv()
    finally:
        process.join()
    return answer


def measure_raw(
    answer: Any,
    directory: str,
    device: str,
    sampler: str | None,
    steps: int | None,
    batch: int | None,
    threads: int | None,
) -> None:
    import torch

    from medsora.pipeline import VideoPipeline, device_named

    if threads is not None:
        torch.set_num_threads(threads)
    place = device_named(device)
    size = batch or (64 if place.type == "cuda" else 16)
    pipeline = VideoPipeline.from_checkpoint(directory, device=device, batch_sizes=(size,))
    requests = [request_of(Path(directory), sampler, steps, seed) for seed in range(size)]
    for _ in range(2):
        pipeline(requests)
    began, cpu_began, clips = time.perf_counter(), time.process_time(), 0
    while clips < 3 * size or time.perf_counter() - began < 10:
        pipeline(requests)
        clips += size
    rate = clips / (time.perf_counter() - began)
    cpu_ms = 1000 * (time.process_time() - cpu_began) / clips
    answer.send({"clips_per_s": rate, "cpu_ms": cpu_ms, "batch": size, "device": str(pipeline.device)})


# -- the server ----------------------------------------------------------------------------------------------


@contextmanager
def running_server(
    checkpoint: Path, folder: Path, options: argparse.Namespace, batch: int
) -> Iterator[tuple[str, int]]:
    """The embedded server on a free port, ready to work: address and process id; stopped as Ctrl-C would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEDSORA_")}
    environment |= {
        "MEDSORA_HOST": "127.0.0.1",
        "MEDSORA_PORT": str(port),
        "MEDSORA_DATA_DIR": str(folder / "data"),
        "MEDSORA_CHECKPOINTS": str(checkpoint),
        "MEDSORA_DEVICE": options.device,
        "MEDSORA_BATCH_SIZES": str(batch),
        "MEDSORA_MAX_QUEUED_JOBS": str(2 * options.clients * options.outstanding + 100),
        "MEDSORA_LOG_LEVEL": "warning",
        **{f"MEDSORA_{name}": value for name, _, value in (setting.partition("=") for setting in options.setting)},
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if options.threads is not None:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    log_path = folder / "server.log"
    with log_path.open("wb") as log:
        command = [sys.executable, "-P", "-m", "server.cli", "serve"]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", process, log_path)
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"the server did not become ready; its log ends:\n{log.read_text(errors='replace')[-3000:]}")


def load(
    url: str, process: int, database: Path, checkpoint: Path, options: argparse.Namespace, batch: int
) -> dict[str, Any]:
    """Let the clients ask, and read from its table when which clip was done.

    Args:
        process: Id of the server.
    """

    def body_of(number: int) -> dict[str, Any]:
        request = request_of(checkpoint, options.sampler, options.steps, number)
        return {
            "prompt": request.label,
            "seed": number,
            "sampler": request.sampler,
            "num_inference_steps": request.num_inference_steps,
        }

    clients = Clients(
        url.removeprefix("http://"),
        body_of,
        clips=options.clips,
        clients=options.clients,
        outstanding=options.outstanding,
    )
    began, used, used_here = time.perf_counter(), cpu_seconds(process), time.process_time()
    clients.run()
    whole_s = time.perf_counter() - began
    spent = {kind: seconds - used.get(kind, 0.0) for kind, seconds in cpu_seconds(process).items()}
    spent["clients"] = time.process_time() - used_here
    ends, sizes, stages = finished(url, database)
    if len(ends) != options.clips:
        raise SystemExit(f"{len(ends)} clips of {options.clips} are completed")
    ends.sort()
    # without the first and the last clips: the queue is filling, or running dry
    margin = min(len(ends) // 4, 2 * batch)
    middle = ends[margin : len(ends) - margin]
    latencies = sorted(clients.latencies)
    return {
        "clips": options.clips,
        "polls": clients.polls,
        "refusals": clients.refusals,
        "cpu_ms": {kind: 1000 * seconds / options.clips for kind, seconds in spent.items()},
        "clips_per_s": (len(middle) - 1) / (middle[-1] - middle[0]),
        "whole_run_clips_per_s": options.clips / whole_s,
        "mean_batch": sizes,
        "latency_s_median": latencies[len(latencies) // 2],
        "latency_s_p99": latencies[int(len(latencies) * 0.99)],
        "seconds_by_stage": stages,
    }


def finished(url: str, database: Path) -> tuple[list[float], float, dict[str, float]]:
    """When each clip was completed (Unix seconds), mean batch, and seconds of the parts of the work by clip."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        text = client.get("/metrics").raise_for_status().text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))

    def total(name: str, **labels: str) -> float:
        return sum(
            float(value)
            for key, value in figures.items()
            if key.startswith(name + "{") and all(f'{label}="{text}"' in key for label, text in labels.items())
        )

    with sqlite3.connect(database) as connection:
        ends = [row[0] for row in connection.execute("select completed_at from jobs where status = 'succeeded'")]
    clips = max(1, len(ends))
    stages = {
        stage: total("medsora_stage_latency_seconds_sum", stage=stage) / clips
        for stage in ("sample", "encode", "store")
    }
    return ends, total("medsora_batch_size_sum") / max(1.0, total("medsora_batch_size_count")), stages


def print_result(result: dict[str, Any]) -> None:
    machine = result["machine"]
    stages = "  ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in result["seconds_by_stage"].items())
    used = {**result["cpu_ms"], "in all": sum(result["cpu_ms"].values())}
    cpu = "\n".join(f"    {kind:30} {ms:8.2f}" for kind, ms in used.items())
    print(
        f"\n{result['checkpoint']}, {result['num_inference_steps']} steps, batch {result['batch']}, "
        f"{result['clients']} clients with {result['outstanding']} requests each, {result['clips']} clips"
        f"{''.join(', ' + setting for setting in result['settings'])}\n"
        f"{machine['device']}; {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}\n"
        f"sampler alone, before and after    {result['raw_before']:8.2f} {result['raw_after']:8.2f} clips/s\n"
        f"server, while the queue is full    {result['clips_per_s']:8.2f} clips/s\n"
        f"server, first POST to last answer  {result['whole_run_clips_per_s']:8.2f} clips/s\n"
        f"mean batch                         {result['mean_batch']:8.2f}\n"
        f"latency, median and 99 %           {result['latency_s_median']:8.2f} {result['latency_s_p99']:8.2f} s\n"
        f"polls a clip, come-again answers   {result['polls'] / result['clips']:8.2f} {result['refusals']:8d}\n"
        f"ms a clip in the worker            {stages}\n"
        f"ms of CPU a clip                   (sampler alone: {result['raw_cpu_ms']:.2f})\n{cpu}\n"
        f"{machine['cores']} cores could make at most     {1000 * machine['cores'] / used['in all']:8.2f} clips/s\n"
        f"ratio                              {100 * result['ratio']:8.1f} %"
    )


if __name__ == "__main__":
    main()
