"""The playground's files: what is sent with them, that nothing else is reached, and that it can be switched off."""

import re
from pathlib import Path

from fastapi.testclient import TestClient

import server
from server.app import create_app
from server.settings import Settings

FOLDER = Path(server.__file__).parent / "playground"


def test_the_page_lets_a_browser_load_this_server_alone(client: TestClient) -> None:
    response = client.get("/")
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert (policy["script-src"], policy["style-src"], policy["connect-src"]) == ("'self'", "'self'", "'self'")
    assert "unsafe" not in response.headers["content-security-policy"]
    assert "http" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "Synthetic videos." in response.text
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=", response.text)


def test_every_file_is_served_and_names_no_other_host(client: TestClient) -> None:
    kinds = {"js": "text/javascript", "css": "text/css", "html": "text/html", "svg": "image/svg+xml"}
    files = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file())
    assert "js/main.js" in files
    for name in files:
        response = client.get(f"/playground/{name}")
        assert (response.status_code, response.content) == (200, (FOLDER / name).read_bytes())
        assert "content-security-policy" in response.headers
        assert response.headers["content-type"].startswith(kinds[name.rpartition(".")[2]])
        again = client.get(f"/playground/{name}", headers={"if-none-match": response.headers["etag"]})
        assert again.status_code == 304
        assert client.head(f"/playground/{name}").headers["content-length"] == str(len(response.content))
        assert re.findall(r"https?://(?!www\.w3\.org/)[\w.]+", response.text) == [], name


def test_nothing_else_is_reached(client: TestClient) -> None:
    for name in ("", "none.js", "../app.py", "%2e%2e/app.py", "js", "js/../../app.py"):
        response = client.get(f"/playground/{name}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


def test_the_reference_is_part_of_it_and_the_framework_has_none(client: TestClient) -> None:
    response = client.get("/docs", follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (307, "/#/reference")
    for path in ("/redoc", "/docs/oauth2-redirect"):
        assert client.get(path).status_code == 404


def test_it_is_no_part_of_the_api(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert [path for path in paths if path in ("/", "/docs") or "playground" in path] == []


def test_it_can_be_switched_off(settings: Settings) -> None:
    with TestClient(create_app(settings.model_copy(update={"playground": False}))) as client:
        assert client.get("/").status_code == 404
        assert client.get("/docs").status_code == 404
        assert client.get("/playground/js/main.js").status_code == 404
        assert client.get("/v1/models").status_code == 200
