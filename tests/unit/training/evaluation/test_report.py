"""The page: whole in itself, every table with its floor, nothing of the data taken for markup."""

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np

from training.evaluation.pictures import first_frame, moving, strip
from training.evaluation.report import Pair, render_report

ENTRY = {"value": 1234.5, "interval": [1000.0, 1500.0]}
SHARE = {"value": 0.25, "count": 1, "interval": [0.01, 0.8]}
COPIES = {"count": 4, "median": 0.5, "highest": 0.99, "copies": SHARE}
ABOUT = {"clips": 3, "patients": 1, "windows": 9}
CLIPS = {
    key: {"count": 4, "motion": ENTRY, "flicker": ENTRY, "warping_error": ENTRY} for key in ("samples", "train", "test")
}
FIGURES: dict[str, Any] = {
    "checkpoint": {"name": "lung <b>", "sha256": {"config.json": "ab" * 32}},
    "data": {"sha256": {"clips.csv": "cd" * 32}, "dataset": "lung", "splits": {"train": ABOUT, "test": ABOUT}},
    "samples": {
        "count": 4, "num_inference_steps": 30, "sampler": "euler", "guidance_scale": 1.5, "dtype": "float32",
        "first_seed": 5,
    },
    "bootstrap": {"resamples": 100, "seed": 1},
    "networks": {"SqueezeNet": {"file": "net.pth", "sha256": "ef" * 32, "protocol": "pooled & averaged"}},
    "absent": {"FVD": "no network given with --i3d"},
    "environment": {"device": "cpu", "torch": "2"},
    "warnings": ["The test split has 1 patient."],
    "reconstruction": {
        "psnr_db": 37.1, "psnr_db_worst": 32.9, "ssim": 0.93, "high_frequency_ratio": 0.55, "num_windows": 9
    },
    "reconstruction_train": {
        "psnr_db": 38.1, "psnr_db_worst": 31.9, "ssim": 0.94, "high_frequency_ratio": 0.56, "num_windows": 9
    },
    "frechet": {
        "all_labels": {
            "title": "All labels", "samples": 4, "train_windows": 4, "test_windows": 9, "train_units": "8 patients",
            "test_units": "6 clips",
            "metrics": {
                "fvd": {
                    "title": "FVD",
                    "pairs": {
                        "samples_to_test": {
                            **ENTRY, "interval_samples": [1100.0, 1300.0],
                            "over_floor": {"value": 2.5, "interval": [2.0, 3.1]},
                        },
                        "train_to_test": ENTRY, "samples_to_train": ENTRY, "reconstruction_to_test": {"value": 3.0},
                    },
                },
            },
        }
    },
    "inception_score": {
        key: {"value": 2.5, "interval": [2.0, 3.0], "splits_mean": 2.4, "splits_std": 0.1}
        for key in ("samples", "train", "test")
    },
    "clips": {"all_labels": CLIPS, "by_label": {"regular-convex": CLIPS}},
    "memorisation": {
        "windows": 100,
        "threshold": {"value": 0.93, "set_by": "p1 (test)", "false_alarms": {"p1 (test)": 0.05, "p2 (train)": 0.0}},
        "samples": COPIES, "unseen": COPIES, "by_label": {"regular-convex": COPIES},
        "planted": {"mirrored": {"count": 4, "lowest": 0.9, "recall": SHARE}},
    },
    "shown_training_clips": [
        {"file": "a.mp4", "licence": "CC BY 4.0", "source": "https://example.org/?a=1&b=2", "attribution": "A <x>"}
    ],
}  # fmt: skip


class Page(HTMLParser):
    """Collects tables with their kinds of rows, addresses of pictures, and whether tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[str]] = []
        self.pictures: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        options = dict(attrs)
        self.tags.add(tag)
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append(options.get("class") or "")
        self.pictures += [str(options[name]) for name in ("src", "srcset") if name in options]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def pair() -> Pair:
    clip = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)
    shown = (moving(clip, fps=8), first_frame(clip), strip(clip, columns=4))
    return Pair(
        title="regular-convex, seed 5", is_copy=True, sample_caption="Generated", training_caption="a.mp4 <1>",
        sample=shown, training=shown,
    )  # fmt: skip


def test_the_page_is_whole_in_itself() -> None:
    text = render_report(FIGURES, {"Unselected": [pair()]})
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe"} & page.tags
    assert len(page.pictures) == 6
    assert all(address.startswith("data:image/webp;base64,") for address in page.pictures)
    assert not re.search(r"url\(|@import", text)
    assert "prefers-color-scheme: dark" in text


def test_every_table_of_figures_has_its_floor() -> None:
    page = Page(render_report(FIGURES, {}))
    tables = page.tables[:-3]  # the protocol, hashes and licences have none
    assert len(tables) == 8
    for number, rows in enumerate(tables):
        # motion has its real clips in columns
        assert "floor" in rows or number == 2, rows


def test_texts_of_the_data_are_no_markup() -> None:
    text = render_report(FIGURES, {"Unselected": [pair()]})
    assert "lung &lt;b&gt;" in text
    assert "A &lt;x&gt;" in text
    assert "a.mp4 &lt;1&gt;" in text
    assert "counts as a copy" in text


def test_what_was_not_measured_is_named_and_intervals_are_shown() -> None:
    text = render_report({key: value for key, value in FIGURES.items() if key != "inception_score"}, {})
    assert "FVD: not measured, no network given with --i3d." in text
    assert "<li>FVD: 2.50 times the floor (2.00 to 3.10).</li>" in text
    assert "Copies of training clips: 1 of 4 generated clips (1.0 % to 80.0 %)." in text
    assert "Inception score" not in text
    assert "1,000 to 1,500" in text
    assert "1,100 to 1,300" in text
    assert "1.0 % to 80.0 %" in text
    assert "ef" * 32 in text
