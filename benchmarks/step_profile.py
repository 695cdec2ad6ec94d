"""Where the time of a compiled denoiser step goes on a GPU: milliseconds of each kernel.

python benchmarks/step_profile.py [--preset base] [--batch 64] [--frames 16] [--steps 12]
"""

import argparse
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

from medsora.bench import preset_pipeline
from medsora.request import GenerationRequest

MIN_SHARE = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    pipeline = preset_pipeline(options.preset, device="cuda", compiled="on", batch_sizes=(options.batch,))
    request = GenerationRequest(
        label=pipeline.manifest.labels[0].name,
        seed=0,
        num_frames=options.frames,
        height=128,
        width=128,
        num_inference_steps=options.steps,
        guidance_scale=1.0,
        sampler=pipeline.manifest.limits.samplers[0],
    )
    requests = [request] * options.batch
    pipeline.sample_latents(requests)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        pipeline.sample_latents(requests)
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events() or ():
        if event.device_type.name == "CUDA":
            times[event.name].append(event.device_time)
    total = sum(sum(values) for values in times.values())
    print(f"{options.preset}, batch {options.batch}, {options.frames} frames, {torch.cuda.get_device_name()}")
    print(f"{total / options.steps / 1000:.2f} ms a step in kernels")
    print("ms a step   calls a step   us a call")
    for name, values in sorted(times.items(), key=lambda item: -sum(item[1])):
        if sum(values) >= MIN_SHARE * total:
            milliseconds, calls = sum(values) / options.steps / 1000, len(values) / options.steps
            print(f"{milliseconds:9.3f}   {calls:12.1f}   {sum(values) / len(values):9.1f}   {name[:100]}")


if __name__ == "__main__":
    main()
