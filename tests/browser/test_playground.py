"""The playground as people use it: in a real browser, against a real server that makes real clips."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydicom
import pytest
from faulty_link import FaultyLink
from PIL import Image

from server.keys.model import ALL_SCOPES
from server.keys.repository import KeyRepository

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Route

    from tests.integration.conftest import RunningServer

pytestmark = [pytest.mark.browser, pytest.mark.integration]

SIZES = {"desk": {"width": 1280, "height": 900}, "phone": {"width": 360, "height": 740}}
PAGES = ("#/", "#/compare", "#/datasets", "#/status", "#/reference?at=create_video")
PIXELS = """video => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    const context = canvas.getContext("2d");
    context.drawImage(video, 0, 0);
    return [...new Set(context.getImageData(0, 0, canvas.width, canvas.height).data)].length;
}"""
"""How many different values the pixels of a video element have: 1 or 2 where nothing was decoded."""


def settings(page: Page, *, steps: int = 4, seed: int | str = "", count: int = 1, model: str = "tiny") -> None:
    """Fill in the form of the first page."""
    page.get_by_label("Checkpoint").select_option(model)
    if not page.get_by_label("Steps").is_visible():  # folded away
        page.locator("summary").click()
    page.get_by_label("Steps").fill(str(steps))
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_label("Videos", exact=True).fill(str(count))


def card(page: Page, seed: int) -> Locator:
    """The card of the video with this seed."""
    return page.locator(".card", has_text=re.compile(rf"seed {seed}(?!\d)"))


@pytest.fixture(scope="module")
def clips(server: RunningServer) -> list[str]:
    """Two finished clips with seeds 901 and 902, made by the API; their ids."""
    ids = [server.submit(seed=seed) for seed in (901, 902)]
    for video in ids:
        server.wait_for(video, "succeeded")
    return ids


def test_generate_follow_and_watch(page: Page) -> None:
    page.goto("/")
    page.get_by_label("Label", exact=True).select_option("covid-convex")
    settings(page, steps=1000, seed=7)  # long enough to be seen running on any machine
    page.get_by_role("button", name="Generate").click()
    made = card(page, 7)
    made.get_by_text(re.compile(r"Step \d+ of 1000")).wait_for()
    assert made.get_by_role("img", name="Running estimate").get_attribute("src").startswith("data:image/webp")  # type: ignore[union-attr]
    assert made.get_by_role("progressbar").is_visible()
    made.get_by_text("Finished").wait_for()
    loop = made.locator("video")
    page.wait_for_function("video => video.currentTime > 0.2 && !video.paused", arg=loop.element_handle())
    assert loop.evaluate(PIXELS) > 20

    made.get_by_role("button", name="Open synthetic video").click()
    dialog = page.get_by_role("dialog", name="covid-convex")
    video = dialog.locator("video")
    page.wait_for_function("video => video.currentTime > 0.3", arg=video.element_handle())
    assert video.evaluate("video => [video.videoWidth, video.videoHeight]") == [32, 32]
    assert video.evaluate(PIXELS) > 20
    assert "shows no patient" in dialog.inner_text()

    dialog.get_by_role("button", name="Pause").click()
    counter = dialog.locator(".counter")
    frame = int(counter.inner_text().split(" /")[0])
    dialog.get_by_role("button", name="Frame on").click()
    page.wait_for_function(
        "([counter, frame]) => counter.textContent === `${frame % 16 + 1} / 16`", arg=[counter.element_handle(), frame]
    )
    dialog.get_by_label("Speed").select_option("0.25")
    assert video.evaluate("video => video.playbackRate") == 0.25
    dialog.get_by_role("button", name="Play", exact=True).click()
    page.wait_for_function("video => !video.paused", arg=video.element_handle())


def test_spectrum_and_flow_of_the_shown_frame(page: Page, clips: list[str]) -> None:
    page.goto(f"/#/compare?ids={','.join(clips)}")
    page.get_by_label("Spectrum").check()
    page.get_by_label("Flow").check()
    for name in ("Spectrum", "Flow"):
        canvas = page.get_by_role("img", name=f"{name} of the frame").first
        colours = "canvas => new Set(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data).size"
        page.wait_for_function(f"canvas => canvas.width > 1 && ({colours})(canvas) > 10", arg=canvas.element_handle())
    assert page.get_by_role("img", name="Colour wheel").count() == 2

    drawn = page.locator(".screen canvas")  # over the videos, pixel on pixel
    assert drawn.count() == 4
    assert drawn.first.bounding_box() == page.locator(".screen video").first.bounding_box()
    page.get_by_label("Opacity").fill("25")
    assert drawn.evaluate_all("all => all.map(one => getComputedStyle(one).opacity)") == ["0.25"] * 4
    page.get_by_label("Place of overlays").select_option("beside it")
    assert (drawn.count(), page.locator(".overlays canvas:not(.wheel)").count()) == (0, 4)


def test_overlays_may_be_asked_for_before_the_videos_are_here(page: Page, clips: list[str]) -> None:
    held: "list[Route]" = []
    page.route("**/content*", lambda route: held.append(route))
    page.goto(f"/#/compare?ids={','.join(clips)}")
    page.get_by_label("Spectrum").check()
    assert page.get_by_role("img", name="Spectrum of the frame").count() == 0
    page.route("**/content*", lambda route: route.continue_())  # of two the later one is asked
    for route in held:
        route.continue_()
    page.get_by_role("img", name="Spectrum of the frame").first.wait_for()


def test_figures_of_spectrum_and_flow_are_right(page: Page) -> None:
    page.goto("/")
    peak = page.evaluate("""async () => {
        const { spectrum } = await import("/playground/js/spectrum.js");
        const phase = i => (2 * Math.PI * (5 * (i % 64) + 9 * Math.floor(i / 64))) / 64;
        const wave = new Float32Array(64 * 64).map((_, i) => 100 + 50 * Math.sin(phase(i)));
        const { side, magnitudes } = spectrum(wave, 64, 64);
        const place = magnitudes.indexOf(Math.max(...magnitudes));
        return [side, Math.abs(place % side - side / 2), Math.abs(Math.floor(place / side) - side / 2)];
    }""")
    assert peak == [64, 5, 9]
    motion = page.evaluate("""async () => {
        const { flow, colourOf } = await import("/playground/js/flow.js");
        const at = (x, y) => 128 + 60 * Math.sin(x / 2.3) * Math.cos(y / 3.1) + 40 * Math.sin((x + 2 * y) / 5);
        const frame = (dx, dy) => new Float32Array(64 * 64).map((_, i) => at(i % 64 - dx, Math.floor(i / 64) - dy));
        const found = flow(frame(0, 0), frame(2, -1), 64, 64);
        const still = flow(frame(0, 0), frame(0, 0), 64, 64);
        const median = values => [...values].sort((a, b) => a - b)[values.length >> 1];
        return { x: median(found.x), y: median(found.y), still: Math.max(...still.x.map(Math.abs)),
                 right: colourOf(3, 0), none: colourOf(0, 0) };
    }""")
    assert (motion["x"], motion["y"]) == pytest.approx((2, -1), abs=0.25)
    assert motion["still"] == 0
    assert (motion["right"], motion["none"]) == ([255, 0, 0], [0, 0, 0])


def test_downloads(page: Page, clips: list[str], tmp_path: Path) -> None:
    page.goto("/")
    card(page, 901).get_by_role("button", name="Open synthetic video").click()
    found = {}
    for title in ("MP4", "Lossless", "DICOM", "WebP"):
        with page.expect_download(timeout=60_000) as download:
            page.get_by_role("button", name=f"Download {title}").click()
        target = tmp_path / download.value.suggested_filename
        download.value.save_as(target)
        found[title] = target
    assert {path.name.removeprefix(clips[0]) for path in found.values()} == {
        ".mp4", ".lossless.mkv", ".dcm", ".preview.webp",
    }  # fmt: skip
    assert found["MP4"].read_bytes()[4:8] == b"ftyp"
    assert found["Lossless"].read_bytes()[:4] == b"\x1a\x45\xdf\xa3"
    assert pydicom.dcmread(found["DICOM"]).SyntheticData == "YES"
    with Image.open(found["WebP"]) as image:
        assert image.n_frames == 16  # type: ignore[attr-defined]


def test_code_to_copy_runs_as_it_is(page: Page, server: RunningServer, tmp_path: Path) -> None:
    page.goto("/")
    settings(page, seed=2**62 + 1)
    page.get_by_role("button", name="Copy as code").click()
    dialog = page.get_by_role("dialog", name="Copy as code")
    texts = {}
    for language in ("curl", "Python", "JavaScript"):
        dialog.get_by_label(language).check()
        dialog.get_by_role("button", name="Copy", exact=True).click()
        dialog.get_by_text("Copied.").wait_for()
        texts[language] = page.evaluate("navigator.clipboard.readText()")
    command = subprocess.run(["bash", "-c", texts["curl"]], capture_output=True, text=True, check=True)
    assert json.loads(command.stdout)["seed"] == 2**62 + 1
    subprocess.run([sys.executable, "-c", texts["Python"]], cwd=tmp_path, check=True)
    assert (tmp_path / "synthetic.mp4").read_bytes()[4:8] == b"ftyp"
    size = page.evaluate(f"(async () => {{ {texts['JavaScript']}; return file.size; }})()")
    videos = server.http.get("/v1/videos").json()["data"]
    made = [video for video in videos if video["seed"] == 2**62 + 1]
    assert len(made) == 3
    assert {video["sha256"] for video in made if video["status"] == "completed"} != set()
    assert size == (tmp_path / "synthetic.mp4").stat().st_size


def test_cancel_and_delete(page: Page, server: RunningServer, clips: list[str]) -> None:
    page.goto("/")
    settings(page, steps=1000, seed=31)
    page.get_by_role("button", name="Generate").click()
    running = card(page, 31)
    running.get_by_text(re.compile(r"Step \d+ of 1000")).wait_for()
    video = running.get_attribute("data-id")
    running.get_by_role("button", name="Cancel").click()
    running.wait_for(state="detached")
    assert server.http.get(f"/v1/videos/{video}").status_code == 404

    kept = server.submit(seed=32)
    server.wait_for(kept, "succeeded")
    card(page, 32).get_by_text("Finished").wait_for()  # it was asked for elsewhere, and is told
    card(page, 32).get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Keep").click()
    assert card(page, 32).is_visible()
    card(page, 32).get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    card(page, 32).wait_for(state="detached")
    assert server.http.get(f"/v1/videos/{kept}").status_code == 404


def test_compare_plays_in_step(page: Page, clips: list[str]) -> None:
    page.goto("/")
    for seed in (901, 902):
        card(page, seed).get_by_label("Compare").check()
    page.get_by_role("link", name="Compare", exact=True).last.click()
    page.get_by_role("heading", name="Compare").wait_for()
    videos = page.locator(".stage video")
    page.wait_for_function("() => document.querySelectorAll('.stage video').length === 2")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.stage video')].every(video => video.currentTime > 0.2)"
    )
    apart = page.evaluate("""async () => {
        const [one, other] = document.querySelectorAll(".stage video");
        let most = 0;
        const times = new Set();
        const end = performance.now() + 3000;
        while (performance.now() < end) {
            await new Promise(requestAnimationFrame);
            if (one.seeking || other.seeking) continue;
            times.add(Math.floor(one.currentTime * 8));
            most = Math.max(most, Math.abs(one.currentTime - other.currentTime) % 1.9);
        }
        return { frames: most * 8, seen: times.size };
    }""")
    assert apart["seen"] > 3
    assert apart["frames"] <= 1.0
    page.get_by_role("button", name="Pause").click()
    for _ in range(3):
        page.get_by_role("button", name="Frame on").click()
    page.wait_for_function("() => [...document.querySelectorAll('.stage video')].every(video => !video.seeking)")
    times = videos.evaluate_all("videos => videos.map(video => video.currentTime)")
    assert times[0] == times[1]
    marks = page.locator(".stage mark").all_inner_texts()
    assert sorted(marks) == ["901", "902"]  # what differs, and nothing else


def test_start_image_and_extension(page: Page, server: RunningServer, clips: list[str]) -> None:
    page.goto("/")
    settings(page)
    picture = page.get_by_label("Start image")
    assert picture.is_disabled()
    assert page.get_by_text("tiny was not trained to go on from given frames.").is_visible()
    card(page, 901).get_by_role("button", name="Open synthetic video").click()
    assert page.get_by_role("button", name="Extend").is_disabled()
    assert page.get_by_text("Extend: tiny was not trained").is_visible()
    page.keyboard.press("Escape")

    settings(page, seed=51, model="tiny-long")
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((32, 32)).convert("RGB").save(buffer, "PNG")
    picture.set_input_files({"name": "start.png", "mimeType": "image/png", "buffer": buffer.getvalue()})
    page.get_by_role("button", name="Generate").click()
    card(page, 51).get_by_text("Finished").wait_for()
    video = str(card(page, 51).get_attribute("data-id"))
    assert server.http.get(f"/v1/videos/{video}").json()["source"] == "reference"
    card(page, 51).get_by_role("button", name="Open synthetic video").click()
    page.get_by_role("button", name="Extend").click()
    page.get_by_role("dialog", name="Extend").get_by_role("button", name="Extend").click()
    page.get_by_text("The longer video is in the queue.").wait_for()
    newest = server.http.get("/v1/videos?limit=1").json()["data"][0]
    assert (newest["source"], newest["source_video_id"], newest["num_frames"]) == ("extension", video, 32)


def test_dataset_from_estimate_to_download(page: Page, server: RunningServer, clips: list[str], tmp_path: Path) -> None:
    page.goto("/#/datasets")
    page.get_by_label("Name").fill("Two labels")
    page.get_by_label("Clips of regular-convex").fill("2")
    page.get_by_label("Clips of covid-convex").fill("1")
    page.get_by_text(re.compile(r"3 clips: about .* on one worker, about .*B \(from your last")).wait_for()
    page.get_by_role("button", name="Make the dataset").click()
    made = page.locator(".dataset", has_text="Two labels")
    made.get_by_text("completed: 3 of 3 clips").wait_for(timeout=60_000)
    assert made.get_by_role("row", name="regular-convex 2 0 0 2").is_visible()
    made.locator(".sheet img").nth(2).wait_for()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.sheet img')].every(image => image.complete && image.naturalWidth === 32)"
    )
    with page.expect_download() as download:
        made.get_by_role("link", name="Download ZIP").click()
    download.value.save_as(tmp_path / "d.zip")
    names = zipfile.ZipFile(tmp_path / "d.zip").namelist()
    assert len([name for name in names if name.endswith(".mp4")]) == 3


def test_status_tells_health_queue_and_use(page: Page, server: RunningServer, clips: list[str]) -> None:
    page.goto("/#/status")
    page.get_by_text("Ready: a video that is asked for now is made.").wait_for()
    page.get_by_role("cell", name="able", exact=True).first.wait_for()
    page.get_by_text("Clips today:").wait_for()
    running = server.submit(seed=71, steps=1000)
    waiting = server.submit(seed=72, steps=999)
    page.get_by_text("seed 72").wait_for()
    page.get_by_role("button", name="Cancel covid-convex, seed 72").click()
    page.get_by_role("button", name="Cancel covid-convex, seed 71").click()
    server.wait_until(
        lambda: all(server.http.get(f"/v1/videos/{one}").status_code == 404 for one in (running, waiting)),
        timeout_s=20,
        what="the end of both",
    )


def test_what_is_refused_is_said_where_it_was_given(page: Page, server: RunningServer) -> None:
    page.goto("/")
    settings(page)
    page.get_by_label("Label", exact=True).select_option("Other words…")
    page.get_by_label("Name or synonym").fill("broken leg")
    page.get_by_role("button", name="Generate").click()
    words = page.get_by_label("Name or synonym")
    page.wait_for_function("box => box.getAttribute('aria-invalid') === 'true'", arg=words.element_handle())
    assert "covid-convex" in page.locator(".field", has=words).inner_text()
    words.fill("covid lung")

    page.get_by_label("Steps").fill("0")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("Give a number from 1 to 1000.").wait_for()
    page.get_by_label("Steps").fill("2")

    limits = [sys.executable, "-m", "server.cli", "keys", "limits", "default", "--data-dir", str(server.data_dir)]
    environment = {"MEDSORA_DATA_DIR": str(server.data_dir), "PATH": "/usr/bin"}
    root = Path(__file__).parents[2]
    subprocess.run([*limits, "--clips-per-day", "0"], cwd=root, env=environment, check=True, capture_output=True)
    try:
        page.get_by_role("button", name="Generate").click()
        page.get_by_text(re.compile(r"clips.*Try again in ")).wait_for()
    finally:
        subprocess.run([*limits, "--reset"], cwd=root, env=environment, check=True, capture_output=True)


def test_a_server_that_is_gone_and_comes_back(browser: Browser, server: RunningServer) -> None:
    """The page was loaded from a port that then nobody answers, as when the server ends."""
    link = FaultyLink(server.http.base_url.port or 0)
    context = browser.new_context(base_url=f"http://127.0.0.1:{link.port}", viewport=SIZES["desk"])  # type: ignore[arg-type]
    page = context.new_page()
    try:
        page.goto("/")
        settings(page, seed=81)
        page.get_by_text("Live", exact=True).wait_for()
        link.refuse()
        page.get_by_text("Connection lost. Trying again…").wait_for()
        page.get_by_role("button", name="Generate").click()
        page.locator(".order").get_by_text("The server cannot be reached. Is it running?").wait_for()
        page.get_by_role("link", name="Status").click()
        page.locator("main").get_by_text("The server cannot be reached. Is it running?").first.wait_for()
        page.get_by_role("link", name="Create").click()
        link.listen()
        page.get_by_text("Live", exact=True).wait_for()
        settings(page, seed=81)
        page.get_by_role("button", name="Generate").click()
        card(page, 81).get_by_text("Finished").wait_for()
    finally:
        context.close()
        link.close()


def endpoint(page: Page, operation: str) -> Locator:
    """The part of the reference that describes an endpoint, opened."""
    part = page.locator(f"#part-{operation}")
    part.locator("summary").click()
    part.get_by_role("button", name="Send").wait_for()
    return part


def test_every_endpoint_is_described_and_can_be_tried(page: Page, server: RunningServer, clips: list[str]) -> None:
    page.goto("/docs")
    page.get_by_role("heading", name="API", exact=True).wait_for()
    page.locator("#part-create_video").wait_for()
    document = server.http.get("/openapi.json").json()
    ids = {operation["operationId"] for one in document["paths"].values() for operation in one.values()}
    shown = page.locator(".part").evaluate_all("all => all.map(one => one.id.slice(5))")
    assert sorted(shown) == sorted(ids | set(document["components"]["schemas"]))

    create = endpoint(page, "create_video")
    create.get_by_label("Body (JSON)").fill(
        '{"prompt": "covid-convex", "seed": 9223372036854775807, "num_inference_steps": 2}'
    )
    command = create.get_by_label("The same in a terminal").inner_text()
    create.get_by_role("button", name="Send").click()
    create.get_by_text(re.compile("^200 OK, after")).wait_for()
    assert '"seed": 9223372036854775807' in create.get_by_label("Answer", exact=True).inner_text()
    again = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["seed"] == 2**63 - 1
    create.get_by_label("Body (JSON)").fill("{")
    create.get_by_role("button", name="Send").click()
    create.get_by_text("This is no JSON").wait_for()
    create.get_by_role("link", name="VideoObject").click()
    page.locator("#part-VideoObject").get_by_role("row", name=re.compile("^progress")).wait_for()

    content = endpoint(page, "get_content")
    content.get_by_role("button", name="Send").click()
    content.get_by_text("This is needed.").wait_for()
    content.get_by_role("textbox", name="video_id").fill(clips[0])
    content.get_by_role("button", name="Send").click()
    video = content.locator("video")
    page.wait_for_function("video => video.videoWidth === 32", arg=video.element_handle())
    content.get_by_role("textbox", name="video_id").fill("video_none")
    content.get_by_role("button", name="Send").click()
    content.get_by_text(re.compile("^404 Not Found, after")).wait_for()

    events = endpoint(page, "follow_all")
    events.get_by_role("button", name="Send").click()
    made = server.submit(seed=91)
    events.get_by_label("Answer", exact=True).get_by_text(made).wait_for()  # while the answer goes on
    events.get_by_role("button", name="Stop").click()
    events.get_by_text("Stopped.").wait_for()


def tab_to(page: Page, what: str) -> None:
    """Press Tab until the focus is there, and can be seen."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("what => document.activeElement.matches(what)", what):
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            return
    raise AssertionError(f"no Tab leads to {what}")


def test_with_the_keyboard_alone(page: Page) -> None:
    page.goto("/")
    page.get_by_label("Checkpoint").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.tagName") == "MAIN"
    tab_to(page, "input[inputmode=numeric]")
    page.keyboard.type("61")
    page.keyboard.press("Enter")
    made = card(page, 61)
    made.get_by_text("Finished").wait_for()
    tab_to(page, ".card .open")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    dialog.wait_for()
    page.wait_for_function("() => document.querySelector('dialog video')?.currentTime > 0")
    tab_to(page, ".play")
    page.keyboard.press("Space")
    assert dialog.get_by_role("button", name="Play", exact=True).is_visible()
    before = dialog.locator(".counter").inner_text()
    page.keyboard.press(".")
    page.wait_for_function("before => document.querySelector('.counter').textContent !== before", arg=before)
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")


def test_other_parts_with_the_keyboard_alone(page: Page, server: RunningServer) -> None:
    page.goto("/#/datasets")
    page.get_by_label("Clips of covid-convex").wait_for()
    tab_to(page, "form input")
    page.keyboard.type("By keys")
    tab_to(page, ".counts input")
    page.keyboard.type("1")
    page.keyboard.press("Enter")
    made = page.locator(".dataset", has_text="By keys")
    made.get_by_text("completed: 1 of 1 clips").wait_for()

    running = server.submit(seed=73, steps=1000)
    page.goto("/#/status")
    page.get_by_text("seed 73").wait_for()
    tab_to(page, "button[aria-label='Cancel covid-convex, seed 73']")
    page.keyboard.press("Enter")
    gone = lambda: server.http.get(f"/v1/videos/{running}").status_code == 404  # noqa: E731
    server.wait_until(gone, timeout_s=20, what="the end of the video")

    page.goto("/#/reference")
    page.locator("#part-get_usage").wait_for()
    tab_to(page, "input[type=search]")
    page.keyboard.type("usage today")
    tab_to(page, "#part-get_usage summary")
    page.keyboard.press("Enter")
    tab_to(page, "#part-get_usage [type=submit]")
    page.keyboard.press("Enter")
    page.locator("#part-get_usage").get_by_text(re.compile("^200 OK, after")).wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_barriers_on_desk_and_phone(browser: Browser, server: RunningServer, clips: list[str], scheme: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    axe = Axe()
    for name, size in SIZES.items():
        context = browser.new_context(
            base_url=str(server.http.base_url),
            viewport=size,
            color_scheme=scheme,
            reduced_motion="reduce",  # type: ignore[arg-type]
        )
        page = context.new_page()
        for address in (*PAGES[:1], f"#/compare?ids={','.join(clips)}", *PAGES[1:]):
            page.goto(f"/{address}")
            page.get_by_text("Live", exact=True).wait_for()
            page.wait_for_function(
                "() => document.querySelector('main h1') && document.querySelectorAll('main *').length > 3"
            )
            if address.startswith("#/reference"):
                page.locator("details[open] form").wait_for()
            if address == "#/":
                card(page, 901).scroll_into_view_if_needed()
                card(page, 901).locator("video[src]").wait_for()
                assert card(page, 901).locator("video").evaluate("video => video.paused")  # motion is unwanted
            if name == "phone" or not address.startswith("#/reference"):  # a long page: looked at once a scheme
                found = axe.run(page)
                assert found.violations_count == 0, found.generate_report()
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= size["width"], f"{address} is {width} pixels wide"
        page.goto("/#/")
        card(page, 901).get_by_role("button", name="Open synthetic video").click()
        page.get_by_role("dialog").get_by_label("Flow").check()
        found = axe.run(page)
        assert found.violations_count == 0, found.generate_report()
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")
        context.close()


def test_a_key_is_asked_for_and_kept_in_the_tab(page: Page, server: RunningServer, clips: list[str]) -> None:
    """The last one: once a key was made, this server wants one from everybody."""
    _, key = KeyRepository(server.database).create(tenant="default", name="browser", scopes=ALL_SCOPES)
    page.goto("/")
    dialog = page.get_by_role("dialog", name="Key")
    dialog.get_by_text("A key is needed here.").wait_for()
    dialog.get_by_label("Key").fill("medsora_wrong")
    dialog.get_by_role("button", name="Use this key").click()
    dialog.get_by_text("The key is not known here.").wait_for()
    dialog.get_by_label("Key").fill(key)
    dialog.get_by_role("button", name="Use this key").click()
    card(page, 901).scroll_into_view_if_needed()
    loop = card(page, 901).locator("video")
    page.wait_for_function("video => video.currentTime > 0.1", arg=loop.element_handle())
    page.get_by_text("Live", exact=True).wait_for()
    assert page.evaluate("[localStorage.length, document.cookie, location.href.includes('medsora_')]") == [0, "", False]
    page.get_by_role("button", name="Copy as code").click()
    code = page.get_by_role("dialog", name="Copy as code").inner_text()
    assert "$MEDSORA_API_KEY" in code
    assert key not in code
