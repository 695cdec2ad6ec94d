"""What the documentation and examples/ show, as a reader would run it: the recipes, and whole programs."""

import base64
import csv
import hashlib
import hmac
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medsora.manifest import read_manifest
from medsora.video_io import probe_video, read_video, write_mp4
from training.cli import app

if TYPE_CHECKING:
    from conftest import RunningServer

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
EXAMPLES, DOCS = ROOT / "examples", ROOT / "docs"
TOKEN = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> "Iterator[RunningServer]":
    from tests.integration.conftest import RunningServer

    running = RunningServer(
        tmp_path_factory.mktemp("served") / "data",
        tiny_checkpoint,
        MEDSORA_WEBHOOK_PRIVATE_HOSTS="127.0.0.1",
        MEDSORA_WEBHOOK_INTERVAL_S="0.1",
    )
    yield running
    assert running.stop() == 0, "\n".join(running.lines[-40:])


def blocks(page: str, language: str) -> str:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found
    return "\n".join(found)


def run(command: list[str | Path], folder: Path, *, script: str | None = None, **variables: str) -> str:
    environment = {**os.environ, "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        command, input=script, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_recipes_in_the_shell(server: "RunningServer", tmp_path: Path) -> None:
    command: list[str | Path] = ["bash", "-eu", "-o", "pipefail"]
    told = run(command, tmp_path, script=blocks("recipes.md", "bash"), SERVER=server.url.removesuffix("/v1"))
    assert "is completed" in told
    assert probe_video(tmp_path / "clip.mp4").num_frames == 16
    for name in ("frames.jpg", "thumbnail.webp"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
    assert "event: video.completed" in told
    remixed, first, second = re.findall(r"^video_\w+$", told, re.MULTILINE)
    assert remixed != first == second  # the request that is sent twice
    assert "allowed: regular-convex, covid-convex" in told  # instead of a brain
    assert zipfile.ZipFile(tmp_path / "dataset.zip").testzip() is None


def test_recipes_in_python(server: "RunningServer", tmp_path: Path) -> None:
    command: list[str | Path] = [sys.executable, "-"]
    told = run(command, tmp_path, script=blocks("recipes.md", "python"), SERVER=server.url.removesuffix("/v1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"seed-{seed}.mp4" for seed in (0, 1, 2, 3, 7)]
    assert "16 (32, 32, 3)" in told
    assert "size invalid_size" in told
    assert told.count("covid-convex/clip_") == told.count("regular-convex/clip_") == 2


def test_the_quickstart_in_python(server: "RunningServer", tmp_path: Path) -> None:
    script = blocks("quickstart.md", "python").replace("http://127.0.0.1:8000/v1", server.url)
    run([sys.executable, "-"], tmp_path, script=script)
    assert probe_video(tmp_path / "clip.mp4").num_frames == 16


class Receiver:
    """examples/webhook_receiver.py, running."""

    def __init__(self, folder: Path, secret: str, url: str = "http://127.0.0.1:1") -> None:
        options = ("--secret", secret, "--port", "0", "--url", url, "--database", "events.db", "--download", "clips")
        self.log = folder / "receiver.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, EXAMPLES / "webhook_receiver.py", *options], cwd=folder, stdout=log, stderr=log
            )
        self.address = f"http://127.0.0.1:{self.wait_for(r'listening on port ([0-9]+)')}/"

    def wait_for(self, pattern: str) -> str:
        deadline = time.monotonic() + 60
        while not (match := re.search(pattern, self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"no {pattern} in {self.log.read_text()}"
            time.sleep(0.02)
        return match.group(match.lastindex or 0)

    def send(self, message: str, body: str, *, key: str = TOKEN, sent_at: float | None = None) -> int:
        """A message signed by Standard Webhooks, by hand; returns the status."""
        timestamp = str(int(sent_at or time.time()))
        secret = base64.b64decode(key.removeprefix("whsec_"))
        signed = hmac.digest(secret, f"{message}.{timestamp}.{body}".encode(), hashlib.sha256)
        headers = {
            "webhook-id": message,
            "webhook-timestamp": timestamp,
            "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
        }
        return httpx.post(self.address, content=body, headers=headers, timeout=30).status_code

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)


def test_the_webhook_receiver_keeps_what_is_genuine_and_works_once(tmp_path: Path) -> None:
    body = json.dumps({"type": "video.failed", "data": {"id": "video_1"}})
    first = Receiver(tmp_path, TOKEN)
    try:
        assert first.send("msg_1", body) == 204
        first.wait_for("msg_1: video.failed video_1")
        assert first.send("msg_1", body) == 204
        first.wait_for("msg_1: again")
        assert first.send("msg_2", body, key="whsec_" + base64.b64encode(b"x" * 32).decode()) == 400
        assert first.send("msg_3", body, sent_at=time.time() - 3600) == 400
        assert httpx.post(first.address, content=body, timeout=30).status_code == 400
        assert first.log.read_text().count("video.failed") == 1
        # its work cannot be done, the server is not there: it is left for the next start
        assert first.send("msg_4", json.dumps({"type": "video.completed", "data": {"id": "video_2"}})) == 204
        first.wait_for("URLError")
    finally:
        first.kill()
    second = Receiver(tmp_path, TOKEN)
    try:
        second.wait_for("URLError")
        assert "msg_1" not in second.log.read_text()
    finally:
        second.kill()


def test_the_webhook_receiver_downloads_what_the_server_tells_of(server: "RunningServer", tmp_path: Path) -> None:
    made = server.http.post("/v1/webhooks", json={"url": "http://127.0.0.1:1/"}).json()
    receiver = Receiver(tmp_path, made["secret"], server.url.removesuffix("/v1"))
    try:
        changed = server.http.post(f"/v1/webhooks/{made['id']}", json={"url": receiver.address})
        assert changed.status_code == 200, changed.text
        video_id = server.submit(seed=3)
        receiver.wait_for(f"video.completed {video_id}")
        assert probe_video(tmp_path / "clips" / f"{video_id}.mp4").num_frames == 16
    finally:
        receiver.kill()
        server.http.delete(f"/v1/webhooks/{made['id']}")


def write_clips(folder: Path, patients: int) -> Path:
    """A table of clips of two classes, three patients each: bright on one side or in the middle."""
    rng = np.random.default_rng(0)
    with (folder / "clips.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "label", "probe", "split", "group", "fps"])
        for label in ("regular", "covid"):
            for number in range(2 * patients):
                frames = rng.integers(0, 90, (24, 32, 32, 3), dtype=np.uint8)
                frames[:, :, 10 : 22 if label == "covid" else 12] += 120
                name = f"{label}-{number}.mp4"
                write_mp4(folder / name, frames, fps=8)
                split = "test" if number >= 2 * patients - 2 else "train"
                table.writerow([name, label, "convex", split, f"{label}:{number // 2}", 8])
    return folder / "clips.csv"


def test_augmentation_of_a_classifier(server: "RunningServer", tmp_path: Path) -> None:
    data = write_clips(tmp_path, patients=4)
    command: list[str | Path] = [
        sys.executable, EXAMPLES / "augment_classifier.py", "--data", data, "--where", "probe=convex",
        "--classes", "regular=regular-convex", "covid=covid-convex", "--generated", "2", "--draws", "4",
        "--labelled", "1", "2", "--url", server.url.removesuffix("/v1"), "--output", "out",
    ]  # fmt: skip
    told = run(command, tmp_path)
    assert "class covid: 8 clips of 4 patients, 1 of them in the test split" in told
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    figures = {(one["patients"], one["labelled"], one["figure"]): one for one in report["figures"]}
    assert len(figures) == 2 * 2 * 4
    for one in figures.values():
        assert one["low"] <= one["value"] <= one["high"]
    both = ("all held-out patients", 2)
    assert figures[(*both, "labelled")]["value"] > 0.9  # these classes are easy to tell apart
    gain = figures[(*both, "labelled and generated")]["value"] - figures[(*both, "labelled")]["value"]
    assert figures[(*both, "gain by generated clips")]["value"] == pytest.approx(gain)
    # again: the same dataset is found, the same figures come out
    run(command, tmp_path)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    named = [one for one in server.http.get("/v1/datasets").json()["data"] if one["name"].startswith("augmentation")]
    assert len(named) == 1
    refused = subprocess.run([*command, "--labelled", "9"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "no division of the patients leaves 9 clips of each class" in refused.stderr


def write_videos(folder: Path) -> None:
    """Three drifting scenes of each of two labels, 48x40 pixels, 8 frames a second."""
    rng = np.random.default_rng(0)
    for label in ("normal", "polyp"):
        (folder / label).mkdir(parents=True)
        for number in range(3):
            coarse = Image.fromarray(rng.integers(0, 255, (6, 12, 3), dtype=np.uint8))
            scene = np.asarray(coarse.resize((72, 40), Image.Resampling.BICUBIC))
            clip = np.stack([scene[:, index : index + 48] for index in range(24)])
            write_mp4(folder / label / f"{number}.mp4", clip, fps=8, crf=12)


def test_training_on_own_videos_by_the_script(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos")
    scripts = str(Path(sys.executable).parent)
    told = run(
        ["sh", EXAMPLES / "train_on_own_videos.sh", "videos", "out"], tmp_path,
        TINY="1", STEPS="2", PATH=f"{scripts}:{os.environ['PATH']}",
    )  # fmt: skip
    assert "MEDSORA_CHECKPOINTS=out/mine" in told
    assert read_manifest(tmp_path / "out" / "mine").label_names == ("normal", "polyp")
    frames, _ = read_video(tmp_path / "out" / "clip.mp4")
    assert frames.shape == (16, 32, 32, 3)


def test_training_on_own_videos_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the page, with recipes that take seconds in place of those that want a GPU."""
    write_videos(tmp_path / "videos")
    monkeypatch.chdir(tmp_path)
    instead = [
        ("--squeezenet squeezenet1_0.pth", "--set autoencoder_loss.perceptual=0"),  # as the page says for who has none
        ("--raft raft-small.pth", "--set alignment.kind=none"),
        ("_small", "_tiny"),
        ("prepare videos", "prepare videos --height 32 --width 32"),
    ]
    commands = blocks("own-videos.md", "sh")
    done = []
    for line in commands.splitlines():
        program, _, rest = line.partition(" ")
        if program != "medsora-train" or rest.startswith("evaluate"):  # which wants SqueezeNet: tests of its own
            continue
        for before, after in instead:
            rest = rest.replace(before, after)
        arguments = shlex.split(rest)
        if arguments[0] in ("autoencoder", "denoiser"):
            arguments += ["--device", "cpu", "--set", "loop.steps=2", "--set", "loop.checkpoint_every=2"]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, f"{line}: {result.output}"
        done.append(arguments[0])
    assert done == ["prepare", "prepare", "verify", "autoencoder", "denoiser", "export"]
    assert (tmp_path / "look.html").is_file()
    assert read_manifest(tmp_path / "mine").label_names == ("normal", "polyp")
