"""Ask a running server for one clip and save it: post, follow the progress, download.

Needs nothing but Python's standard library; only --contact-sheet uses the medsora package to read the video back.
`./run demo` calls this. For the same with the openai package see the README.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def main() -> int:
    options = parse_options()
    try:
        wait_until_ready(options.url, timeout_s=options.timeout, server_pid=options.server_pid)
        video = create(options)
        video = follow(options.url, video, timeout_s=options.timeout)
        content = call(f"{options.url}/v1/videos/{video['id']}/content")
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_bytes(content)
    print(f"video:         {options.output} ({len(content):,} bytes, {video['seconds']} s, {video['size']})")
    if options.contact_sheet:
        write_sheet(options.output, options.contact_sheet, title=video["prompt"])
        print(f"contact sheet: {options.contact_sheet}")
    print(f"also at:       {options.url}/v1/videos/{video['id']}/content")
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="where the server listens (default: %(default)s)"
    )
    parser.add_argument("--label", default="covid-convex", help="what to show (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same clip (default: %(default)s)")
    parser.add_argument("--model", help="a checkpoint that the server has (default: its first)")
    parser.add_argument("--output", type=Path, default=Path("clip.mp4"), help="file to write (default: %(default)s)")
    parser.add_argument("--contact-sheet", type=Path, help="PNG of frames to write beside it")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait at most (default: %(default)s)")
    parser.add_argument("--server-pid", type=int, help="process to watch: when it ends, waiting is useless")
    return parser.parse_args()


def call(url: str, body: dict[str, Any] | None = None) -> bytes:
    """GET, or POST of JSON when there is a body; the server's own words on an error."""
    request = urllib.request.Request(url)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return bytes(response.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            message = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = text[:500]
        raise RuntimeError(f"the server answered {error.code}: {message}") from error


def wait_until_ready(url: str, *, timeout_s: float, server_pid: int | None) -> None:
    """Wait until the server can take and finish jobs: its worker has loaded the model."""
    started = time.monotonic()
    said = False
    while True:
        try:
            call(f"{url}/health/ready")
            return
        except (RuntimeError, OSError) as error:
            if server_pid is not None and not is_alive(server_pid):
                raise RuntimeError("the server ended while it was starting") from error
            if time.monotonic() - started > timeout_s:
                raise RuntimeError(f"the server at {url} was not ready after {timeout_s:g} s: {error}") from error
        if not said:
            print(f"Waiting for the server at {url} ...", flush=True)
            said = True
        time.sleep(0.2)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def create(options: argparse.Namespace) -> dict[str, Any]:
    body = {"prompt": options.label, "seed": options.seed}
    if options.model:
        body["model"] = options.model
    video: dict[str, Any] = json.loads(call(f"{options.url}/v1/videos", body))
    print(f"Posted {options.label!r} with seed {options.seed} to {video['model']}: job {video['id']}", flush=True)
    return video


def follow(url: str, video: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
    """Poll until the job has ended; one line that moves on a terminal, a few lines elsewhere."""
    started = time.monotonic()
    shown = -1
    while video["status"] in ("queued", "in_progress"):
        if time.monotonic() - started > timeout_s:
            raise RuntimeError(f"job {video['id']} was not done after {timeout_s:g} s")
        time.sleep(0.2)
        video = json.loads(call(f"{url}/v1/videos/{video['id']}"))
        progress = int(video["progress"])
        if sys.stdout.isatty():
            print(f"\r  {video['status']:<12} {progress:3d} %", end="", flush=True)
        elif progress // 20 > shown // 20 or shown < 0:
            print(f"  {video['status']:<12} {progress:3d} %", flush=True)
            shown = progress
    if sys.stdout.isatty():
        print()
    if video["status"] != "completed":
        error = video.get("error") or {}
        raise RuntimeError(f"job {video['id']} {video['status']}: {error.get('code')}: {error.get('message')}")
    print(f"  completed after {time.monotonic() - started:.1f} s", flush=True)
    return video


def write_sheet(video: Path, sheet: Path, *, title: str) -> None:
    from medsora.video_io import read_video, write_contact_sheet

    frames, _ = read_video(video)
    write_contact_sheet(sheet, [frames], columns=8, labels=[title])


if __name__ == "__main__":
    sys.exit(main())
