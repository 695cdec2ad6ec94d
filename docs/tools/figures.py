"""Draw the pictures of the documentation from the code that they are about.

python docs/tools/figures.py    # writes docs/images/*.svg; a test compares them with what this would write
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from drawing import ACCENT, CALM, INK, PAPER, SHADE, WARM, Drawing

from medsora.geometry import SPATIAL_STRIDE, TEMPORAL_STRIDE, latent_shape
from medsora.models.scans import NUM_SPIRALS, spiral_order
from medsora.presets import AUTOENCODERS, DENOISERS

IMAGES = Path(__file__).parents[1] / "images"
FRAMES, SIDE = 16, 128  # of a clip of the shipped checkpoint
PRESET = "small"


def system() -> Drawing:
    """Processes and what lies between them."""
    d = Drawing(860, 400, "Clients talk to the API; the API and workers meet in the database; Redis carries hints")
    d.box(20, 150, 130, 80, ["clients", "openai package,", "curl, playground"], fill=PAPER)
    d.box(240, 150, 150, 80, ["API processes", "checks, answers;", "no torch"], fill="#e3f4f6", stroke=ACCENT)
    d.box(480, 40, 160, 70, ["database", "rows are the truth"], fill="#fdf1e7", stroke=WARM)
    d.box(480, 155, 160, 70, ["Redis (Celery)", "hints: work exists"])
    d.box(480, 270, 160, 70, ["artifact store", "folder or S3"], fill="#fdf1e7", stroke=WARM)
    d.box(720, 150, 130, 80, ["worker", "one a GPU;", "sampler, decoder"], fill="#e3f4f6", stroke=ACCENT)
    d.box(240, 300, 150, 70, ["reaper", "leases, webhooks,", "expiry"], fill="#e3f4f6", stroke=ACCENT)
    d.arrow((150, 180), (240, 180), text="requests")
    d.arrow((240, 205), (150, 205), text="video, events", above=-18)
    d.arrow((315, 150), (315, 75), (480, 75), both=True)
    d.words(398, 66, "jobs", size=12)
    d.arrow((390, 190), (480, 190))
    d.words(426, 184, "job id", size=12)
    d.arrow((640, 190), (720, 190), text="job id")
    d.arrow((782, 150), (782, 75), (640, 75), both=True)
    d.words(712, 66, "claim, progress", size=12)
    d.arrow((782, 230), (782, 290), (640, 290))
    d.words(712, 281, "files", size=12)
    d.arrow((480, 290), (425, 290), (425, 215), (390, 215))
    d.words(445, 284, "files", size=12)
    d.arrow((240, 335), (85, 335), (85, 230))
    d.words(160, 326, "webhooks", size=12)
    d.arrow((390, 335), (465, 335), (465, 95), (480, 95), both=True)
    told = "Any process may die at any time: what it held is claimed again when its lease has run out."
    d.words(430, 392, told, size=12, fill=CALM)
    return d


def request() -> Drawing:
    """How a request becomes a video."""
    names = ["client", "API (no torch)", "database", "Redis", "worker (torch)", "artifact store"]
    steps: list[tuple[int, int, str]] = [
        (0, 1, "POST /v1/videos: label"),
        (1, 1, "check against the checkpoint's limits, or refuse"),
        (1, 2, "insert job (queued)"),
        (1, 3, "publish its id: a hint"),
        (1, 0, "200, id"),
        (3, 4, "job id"),
        (4, 2, "claim alike jobs: a lease and a token each"),
        (4, 2, "each step: progress, lease renewed, cancelled?"),
        (4, 5, "files: aside, hashed, renamed"),
        (4, 2, "completed, if the token still holds"),
        (0, 1, "GET \u2026/{id}, then /content"),
    ]
    step, top = 40, 92
    d = Drawing(980, top + step * len(steps) + 10, "Sequence of a request, from POST to the stored video")
    places = [85 + 162 * index for index in range(len(names))]
    for x, name in zip(places, names, strict=True):
        d.line((x, 60), (x, top + step * len(steps) - 12), dashed=True)
        d.box(x - 72, 20, 144, 38, [name], fill="#e3f4f6" if name.endswith("torch)") else SHADE)
    for index, (start, end, text) in enumerate(steps):
        y = top + step * index + 8
        x0, x1 = places[start], places[end]
        if start == end:
            d.line((x0, y - 10), (x0 + 24, y - 10), (x0 + 24, y + 4), stroke=INK, width=1.5)
            d.arrow((x0 + 24, y + 4), (x0 + 3, y + 4))
            d.words(x0 + 32, y, text, size=12, anchor="start")
            continue
        d.arrow((x0, y), (x1, y))
        middle = (x0 + x1) / 2
        d.polygon(*_around(middle, y - 10, 3.2 * len(text), 7), fill=PAPER, stroke=PAPER)
        d.words(middle, y - 6, text, size=12)
    return d


def _around(x: float, y: float, half_width: float, half_height: float) -> tuple[tuple[float, float], ...]:
    return ((x - half_width, y - half_height), (x + half_width, y - half_height),
            (x + half_width, y + half_height), (x - half_width, y + half_height))  # fmt: skip


def training() -> Drawing:
    """How videos become a checkpoint."""
    d = Drawing(900, 270, "From videos to a checkpoint: prepare, autoencoder, latents, denoiser, export, evaluate")
    d.box(15, 40, 135, 60, ["your videos", "folders, CSV, DICOM"], fill=PAPER)
    d.box(210, 40, 110, 60, ["cache", "windows, labels"], fill="#fdf1e7", stroke=WARM)
    d.box(365, 40, 145, 60, ["autoencoder", f"{FRAMES} frames a window"], fill="#e3f4f6", stroke=ACCENT)
    d.box(555, 40, 100, 60, ["latents", "cached"], fill="#fdf1e7", stroke=WARM)
    d.box(695, 40, 130, 60, ["denoiser", "labels, flow"], fill="#e3f4f6", stroke=ACCENT)
    d.box(530, 175, 130, 60, ["export", "average, manifest"], fill=PAPER)
    d.box(285, 175, 170, 60, ["checkpoint directory", "safetensors and JSON"], fill="#fdf1e7", stroke=WARM)
    d.box(60, 175, 150, 60, ["server, medsora", "generate"], fill="#e3f4f6", stroke=ACCENT)
    for x0, x1 in ((150, 210), (320, 365), (510, 555), (655, 695)):
        d.arrow((x0, 70), (x1, 70))
    d.words(180, 62, "prepare", size=12)
    d.arrow((760, 100), (760, 195), (660, 195))
    d.arrow((437, 100), (437, 135), (595, 135), (595, 175))
    d.arrow((530, 205), (455, 205))
    d.arrow((285, 205), (210, 205))
    d.arrow((372, 235), (372, 258), (595, 258), (595, 235), dashed=True)
    d.words(483, 252, "evaluate: figures into the manifest", size=12)
    return d


def latents() -> Drawing:
    """From pixels to latents and back."""
    f, h, w = latent_shape(FRAMES, SIDE, SIDE)
    channels, patch = AUTOENCODERS[PRESET].latent_channels, DENOISERS[PRESET].patch_size
    d = Drawing(880, 250, "A clip is encoded to latents, denoised there, and decoded")
    _stack(d, 30, 60, 90, FRAMES, SHADE)
    _stack(d, 330, 85, 62, f, "#cdeaee")
    _stack(d, 600, 85, 62, f, "#cdeaee")
    d.words(110, 215, f"clip: {FRAMES} frames of {SIDE}x{SIDE}, RGB", size=13)
    d.words(375, 215, f"latents: {f} x {h} x {w}, {channels} channels", size=13)
    d.words(650, 215, f"tokens: {f} x {h // patch} x {w // patch}", size=13)
    d.words(650, 233, f"{DENOISERS[PRESET].hidden_size} numbers each", size=12, fill=CALM)
    d.arrow((200, 118), (310, 118), text="encode", both=True)
    d.words(255, 138, "decode", size=12)
    d.words(255, 160, f"{TEMPORAL_STRIDE}x in time,", size=12, fill=CALM)
    d.words(255, 176, f"{SPATIAL_STRIDE}x each way", size=12, fill=CALM)
    d.arrow((450, 118), (580, 118), text=f"patches of {patch}x{patch}", both=True)
    d.box(750, 85, 115, 66, ["denoiser", f"{DENOISERS[PRESET].depth} blocks"], fill="#e3f4f6", stroke=ACCENT)
    d.arrow((715, 118), (750, 118), both=True)
    return d


def _stack(d: Drawing, x: float, y: float, side: float, count: int, fill: str) -> None:
    """Frames one behind another."""
    step = 60 / count if count > 6 else 10
    for index in reversed(range(count)):
        dx, dy = x + step * index, y - step * index * 0.5 + 20
        d.polygon((dx, dy), (dx + side, dy), (dx + side, dy + side), (dx, dy + side), fill=fill)


def block() -> Drawing:
    """One block of the denoiser."""
    config = DENOISERS[PRESET]
    f, h, w = latent_shape(FRAMES, SIDE, SIDE)
    rows, columns = h // config.patch_size, w // config.patch_size
    ways = "both ways" if config.temporal_directions == 2 else "forwards"
    d = Drawing(900, 300, "A block: local attention, spatial Mamba over two planes, temporal Mamba")
    d.box(20, 80, 100, 60, ["tokens", f"{f} x {rows} x {columns}"], fill=PAPER)
    d.box(160, 60, 150, 100, ["local attention", "within a frame,", f"window {config.local_window}"])
    d.box(350, 30, 290, 160, [], fill="#f4fafb", stroke=ACCENT)
    d.words(495, 52, "spatial Mamba, one set of weights", bold=True)
    d.box(362, 65, 185, 46, [f"frame x width: {f} x {columns}", f"{rows} rows, a spiral both ways"], bold=False)
    d.box(362, 130, 185, 46, [f"frame x height: {f} x {rows}", f"{columns} columns, the same"], bold=False)
    d.box(572, 95, 60, 50, ["gates"], fill=PAPER)
    d.arrow((547, 88), (572, 110))
    d.arrow((547, 153), (572, 130))
    d.box(680, 60, 150, 100, ["temporal Mamba", f"{rows * columns} places,", f"{f} frames, {ways}"])
    d.arrow((120, 110), (160, 110))
    d.arrow((310, 110), (350, 110))
    d.arrow((640, 110), (680, 110))
    d.arrow((830, 110), (885, 110))
    for x in (235, 495, 745):
        d.arrow((x, 240), (x, 190 if x == 495 else 160), stroke=ACCENT)
    d.box(120, 240, 690, 40, ["adaLN-Zero: time of each frame and the label shift, scale and gate each part"],
          fill="#e3f4f6", stroke=ACCENT, bold=False)  # fmt: skip
    return d


def planes() -> Drawing:
    """Which planes are scanned."""
    config = DENOISERS[PRESET]
    f, h, _ = latent_shape(FRAMES, SIDE, SIDE)
    side = h // config.patch_size
    d = Drawing(760, 262, "The volume of tokens is cut into planes frame x width and frame x height")
    for x, words, is_width in (
        (60, f"{side} planes frame x width", True),
        (420, f"{side} planes frame x height", False),
    ):
        _volume(d, x, 70, f, side, is_width)
        d.words(x + 120, 244, words, bold=True)
    return d


def _volume(d: Drawing, x: float, y: float, frames: int, side: int, is_width: bool) -> None:
    """A box of tokens, frames to the back, with one plane coloured."""
    cell, depth = 16.0, 26.0
    size = cell * side

    def at(frame: float, row: float, column: float) -> tuple[float, float]:
        return x + cell * column + depth * frame, y + cell * row - depth * 0.45 * frame + 10

    for frame in reversed(range(frames)):
        corners = (at(frame, 0, 0), at(frame, 0, side), at(frame, side, side), at(frame, side, 0))
        d.polygon(*corners, fill=SHADE, opacity=0.75)
    last, chosen = frames - 1, side * 0.5
    strip = [at(0, chosen, 0), at(0, chosen, side), at(last, chosen, side), at(last, chosen, 0)]
    if not is_width:
        strip = [at(0, 0, chosen), at(0, side, chosen), at(last, side, chosen), at(last, 0, chosen)]
    d.polygon(*strip, fill=ACCENT, stroke=ACCENT, opacity=0.55)
    d.words(x + size / 2, y + size + 26, "width", size=12, fill=CALM)
    d.words(x - 8, y + size / 2, "height", size=12, fill=CALM, anchor="end")
    d.words(x + size + 70, y + size - 20, "frames", size=12, fill=CALM, anchor="start")


def scans() -> Drawing:
    """The eight spirals over a plane of the shipped checkpoint."""
    f, h, _ = latent_shape(FRAMES, SIDE, SIDE)
    columns, cell, gap = h // DENOISERS[PRESET].patch_size, 23, 26
    width, height = cell * columns, cell * f
    d = Drawing(4 * (width + gap) + gap, 2 * (height + 52) + 20, "The eight spiral scan orders")
    for index in range(NUM_SPIRALS):
        x, y = gap + (index % 4) * (width + gap), 34 + (index // 4) * (height + 52)
        d.words(x, y - 9, f"spiral {index}", anchor="start", bold=True)
        _spiral(d, x, y, f, columns, cell, index)
    return d


def _spiral(d: Drawing, x: float, y: float, rows: int, columns: int, cell: float, index: int) -> None:
    for row in range(rows + 1):
        d.line((x, y + cell * row), (x + cell * columns, y + cell * row), stroke="#d5dce3")
    for column in range(columns + 1):
        d.line((x + cell * column, y), (x + cell * column, y + cell * rows), stroke="#d5dce3")
    order = spiral_order(rows, columns, index)
    places = [(x + cell * (position % columns + 0.5), y + cell * (position // columns + 0.5)) for position in order]
    d.line(*places, stroke=ACCENT, width=2.5)
    d.dot(*places[0], 5, WARM)
    d.arrow(places[-2], places[-1])


FIGURES: dict[str, Callable[[], Drawing]] = {
    "system": system,
    "request": request,
    "training": training,
    "latents": latents,
    "block": block,
    "planes": planes,
    "scans": scans,
}


def main() -> None:
    for name, draw in FIGURES.items():
        (IMAGES / f"{name}.svg").write_text(draw().render(), encoding="utf-8")
        print(IMAGES / f"{name}.svg", file=sys.stderr)


if __name__ == "__main__":
    main()
