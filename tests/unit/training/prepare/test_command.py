"""The command line: from a folder of one's own videos to a trained network, and clear refusals."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from training.cli import app
from training.prepare.cache import open_cache

Put = Callable[..., Path]
SMALL = ["--height", "32", "--width", "32"]


def run(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, put_video: Put) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for number in range(3):
        put_video(root / "polyp" / f"p{number}.mp4", number, 40)
        put_video(root / "normal" / f"n{number}.mp4", 10 + number, 40)
    (root / "normal" / "broken.mp4").write_bytes(b"no video")
    return root


def test_from_a_folder_to_training(videos: Path, tmp_path: Path) -> None:
    said = run("prepare", videos, "--out", tmp_path / "c", *SMALL)
    assert "label: normal, polyp" in said
    assert "skipped: 1" in said
    assert "normal/broken.mp4: cannot be read" in said
    assert "all hashes match" in run("verify", tmp_path / "c")
    settings = ["--set", "loop.steps=1", "--set", "loop.evaluate_every=1", "--set", "loop.batch_size=1"]
    said = run(
        "autoencoder", "autoencoder_tiny", "--data", tmp_path / "c", "--out", tmp_path / "run", *settings,
        "--set", "data.test_window_step=100", "--device", "cpu",
    )  # fmt: skip
    assert "conditions label: normal, polyp" in said
    about = json.loads((tmp_path / "run" / "result" / "result.json").read_text(encoding="utf-8"))
    assert about["config"]["model"]["condition_names"] == {"label": ["normal", "polyp"]}
    assert {clip["labels"]["label"] for clip in about["clips"]} == {"normal", "polyp"}
    trained = {clip.name for clip in open_cache(tmp_path / "c").clips("train")}
    assert {clip["file"] for clip in about["clips"]} == trained


def test_a_dry_run_says_what_would_be(videos: Path, tmp_path: Path) -> None:
    said = run("prepare", videos, "--dry-run", *SMALL, "--html", tmp_path / "r.html", "--exclude-label", "polyp")
    assert "label: normal" in said
    assert "dry run, nothing written but" in said
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "give --out for the cache, or --dry-run"),
        (["--out", "c", "--dry-run"], "give --out for the cache, or --dry-run"),
        (["--dry-run", "--fit", "zoom"], "fit must be one of crop, pad, stretch, got 'zoom'"),
        (["--dry-run", "--height", "100"], "height and width must be multiples of 8"),
        (["--dry-run", "--crop", "1,2,3"], "--crop must be LEFT,TOP,WIDTH,HEIGHT"),
        (["--dry-run", "--mask", "a,b,c,d"], "holds no whole numbers"),
        (["--dry-run", "--burned-in", "accept"], "burned_in=accept is of use with deidentify only"),
        (["--dry-run", "--test-fraction", "1.5"], "test_fraction must be between 0 and 1"),
    ],
)
def test_mistakes_name_the_option_and_what_is_allowed(videos: Path, options: list[str], problem: str) -> None:
    said = run("prepare", videos, *options, status=2)
    assert problem.split()[0] in said
    plain = " ".join(said.replace("│", " ").split())
    assert problem in plain


def test_the_command_needs_no_torch(videos: Path) -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from training.cli import app\n"
        "assert not {'torch', 'numpy', 'pydicom', 'scipy'} & set(sys.modules), 'imported at once'\n"
        f"arguments = ['prepare', {str(videos)!r}, '--dry-run', '--height', '32', '--width', '32']\n"
        "result = CliRunner().invoke(app, arguments)\n"
        "assert result.exit_code == 0, result.output\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"
