"""Seconds and memory that one clip of a checkpoint takes on this machine, without a server.

    python benchmarks/generate.py [--checkpoint lung-ultrasound-small] [--clips 3] [--steps N] [--device cpu]

The first clip is not counted: it also pays for what torch sets up once. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from medsora.manifest import find_checkpoint, read_manifest
from medsora.request import GenerationRequest, resolve_request

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = parse_options()
    directory = find_checkpoint(options.checkpoint)
    manifest = read_manifest(directory)

    started = time.perf_counter()
    from medsora.pipeline import VideoPipeline

    imported = time.perf_counter()
    pipeline = VideoPipeline.from_checkpoint(directory, device=options.device)
    loaded = time.perf_counter()
    requests = [
        resolve_request(
            manifest,
            label=manifest.labels[seed % len(manifest.labels)].name,
            seed=seed,
            num_inference_steps=options.steps,
        )
        for seed in range(options.clips + 1)
    ]
    clips = [measure(pipeline, request) for request in requests]
    write_s = [clip.pop("write_s") for clip in clips]
    counted = clips[1:]
    result = {
        "checkpoint": manifest.name,
        "manifest_files": {name: record.sha256 for name, record in manifest.files.items()},
        "num_frames": requests[0].num_frames,
        "size": f"{requests[0].width}x{requests[0].height}",
        "num_inference_steps": requests[0].num_inference_steps,
        "guidance_scale": requests[0].guidance_scale,
        "sampler": requests[0].sampler,
        "machine": describe_machine(str(pipeline.device)),
        "import_s": imported - started,
        "load_s": loaded - imported,
        "first_clip_s": clips[0]["total_s"],
        "clip_s": spread([clip["total_s"] for clip in counted]),
        "step_s": spread([clip["sample_s"] / requests[0].num_inference_steps for clip in counted]),
        "decode_s": spread([clip["decode_s"] for clip in counted]),
        "write_mp4_s": spread(write_s[1:]),
        # kilobytes on Linux
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print_result(result)
    save(result, options.json or RESULTS / f"generate-{manifest.name}.json")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure seconds and memory of one clip, without a server.")
    parser.add_argument("--checkpoint", default="lung-ultrasound-small", help="a directory, or a shipped name")
    parser.add_argument("--clips", type=int, default=3, help="clips to count, after one that is not (default: 3)")
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--device", default="auto", help="default: a GPU when there is one")
    parser.add_argument("--json", type=Path, help="file for the figures (default: in benchmarks/results)")
    options = parser.parse_args()
    if options.clips < 1:
        parser.error("--clips must be at least 1")
    return options


def measure(pipeline: Any, request: GenerationRequest) -> dict[str, float]:
    """Times of one clip: up to the last step, from there to pixels, and the file."""
    from medsora.video_io import write_mp4

    last_step = [0.0]

    def on_step(done: int, total: int) -> None:
        last_step[0] = time.perf_counter()

    started = time.perf_counter()
    clip = pipeline([request], on_step=on_step)[0]
    ended = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_mp4(Path(folder) / "clip.mp4", clip, fps=pipeline.manifest.limits.fps)
    written = time.perf_counter()
    return {
        "total_s": ended - started,
        "sample_s": last_step[0] - started,
        "decode_s": ended - last_step[0],
        "write_s": written - ended,
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "count": len(values)}


def describe_machine(device: str) -> dict[str, Any]:
    """What figures depend on: processor, cores, torch and its threads, GPU."""
    import os
    import platform

    import torch

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    described = {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "device": device,
    }
    if device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name(torch.device(device))
    return described


def print_result(result: dict[str, Any]) -> None:
    machine = result["machine"]
    title = (
        f"{result['checkpoint']}: {result['num_frames']} frames {result['size']}, "
        f"{result['num_inference_steps']} steps ({result['sampler']}, guidance {result['guidance_scale']:g}) "
        f"on {machine['device']}; {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}"
    )
    from rich.console import Console
    from rich.table import Table

    table = Table("seconds", "median", "least", "most")
    for name in ("clip_s", "step_s", "decode_s", "write_mp4_s"):
        values = result[name]
        table.add_row(name.removesuffix("_s"), *(f"{values[key]:.3f}" for key in ("median", "least", "most")))
    for name in ("import_s", "load_s", "first_clip_s"):
        table.add_row(name.removesuffix("_s"), f"{result[name]:.3f}")
    console = Console(highlight=False)
    console.print(title)
    console.print(table)
    console.print(f"peak memory: {result['peak_memory_mib']:.0f} MiB; {result['clip_s']['count']} clips counted")


def save(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
