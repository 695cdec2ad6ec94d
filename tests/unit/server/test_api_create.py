"""POST /v1/videos: every way to say a field, and every bad input with its message."""

import json
from typing import Any

import hypothesis
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from medsora.request import MAX_SEED
from server.api.fields import CreateVideoFields
from server.app import create_app
from server.settings import Settings

LABELS = "regular-convex, covid-convex"


def create(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/videos", json={"prompt": "covid-convex", **fields})


def refused(response: Any, param: str | None, *parts: str, status: int = 400) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    for part in parts:
        assert part in error["message"]
    assert response.headers["x-request-id"].startswith("req_")


def test_answer_is_a_queued_video_with_every_choice_made(client: TestClient) -> None:
    response = client.post("/v1/videos", files={"prompt": (None, "COVID lung!")})
    assert response.status_code == 200
    video = response.json()
    assert video.pop("id").startswith("video_")
    assert isinstance(video.pop("created_at"), int)
    assert 0 <= video.pop("seed") < 2**53
    assert video == {
        "object": "video",
        "model": "tiny",
        "status": "queued",
        "progress": 0,
        "completed_at": None,
        "expires_at": None,
        "prompt": "COVID lung!",
        "size": "32x32",
        "seconds": "2",
        "remixed_from_video_id": None,
        "error": None,
        "label": "covid-convex",
        "num_frames": 16,
        "fps": 8.0,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "sampler": "euler",
        "inference_time_s": None,
        "sha256": None,
        "source": None,
        "source_video_id": None,
        "priority": 0,
        "deterministic": False,
        "batch_size": None,
    }


CHOICES = {"seed": 42, "num_inference_steps": 6, "guidance_scale": 2.5, "sampler": "heun", "seconds": "2"}


@pytest.mark.parametrize("kind", ["json", "multipart", "urlencoded", "extra_params", "extra_body", "extra_body object"])
def test_choices_mean_the_same_in_every_body(client: TestClient, kind: str) -> None:
    fields = {"prompt": "covid-convex", **CHOICES}
    if kind == "json":
        response = client.post("/v1/videos", json=fields)
    elif kind == "multipart":
        response = client.post("/v1/videos", files={name: (None, str(value)) for name, value in fields.items()})
    elif kind == "urlencoded":
        response = client.post("/v1/videos", data=fields)
    elif kind == "extra_body object":
        response = client.post("/v1/videos", json={"prompt": "covid-convex", "extra_body": CHOICES})
    else:
        response = client.post(
            "/v1/videos", files={"prompt": (None, "covid-convex"), kind: (None, json.dumps(CHOICES))}
        )
    assert response.status_code == 200, response.text
    video = response.json()
    assert {name: video[name] for name in CHOICES} == CHOICES


def test_names_of_other_servers_are_understood(client: TestClient) -> None:
    response = create(client, width=32, height=32, num_frames=16, fps=8, n=1, num_outputs_per_prompt=1, size="32x32")
    assert response.status_code == 200, response.text
    assert (response.json()["size"], response.json()["seconds"]) == ("32x32", "2")


def test_seconds_may_be_a_number(client: TestClient) -> None:
    assert create(client, seconds=2).json()["seconds"] == "2"


def test_null_is_the_default(client: TestClient) -> None:
    assert create(client, seed=None, model=None, size=None).status_code == 200


def test_largest_seed_is_kept(client: TestClient) -> None:
    assert create(client, seed=MAX_SEED).json()["seed"] == MAX_SEED


@pytest.mark.parametrize(
    ("fields", "param", "parts"),
    [
        ({"prompt": "a cat"}, "prompt", ("no label 'a cat'", f"allowed: {LABELS}")),
        ({"prompt": ""}, "prompt", ("must not be empty",)),
        ({"prompt": " \n"}, "prompt", ("must not be empty",)),
        ({"prompt": "x" * 32_001}, "prompt", ("32001 characters", "1 to 32000")),
        ({"prompt": 5}, "prompt", ("valid string", "got 5")),
        ({"model": "sora-2"}, "model", ("no model 'sora-2'", "allowed: tiny")),
        ({"model": ""}, "model", ("at least 1 character",)),
        ({"size": "64x64"}, "size", ("cannot make 64x64", "allowed: 32x32")),
        ({"size": "big"}, "size", ("WIDTHxHEIGHT", "'big'")),
        ({"size": "032x32"}, "size", ("WIDTHxHEIGHT",)),
        ({"width": 64, "height": 64}, "width", ("cannot make 64x64", "allowed: 32x32")),
        ({"width": 32}, "width", ("given together",)),
        ({"height": 32}, "height", ("given together",)),
        ({"size": "32x32", "width": 64}, "width", ("64 contradicts size 32x32",)),
        ({"seconds": "4"}, "seconds", ("cannot make '4' seconds", "allowed: 2")),
        ({"seconds": "soon"}, "seconds", ("'soon'", "allowed: 2")),
        ({"seconds": "nan"}, "seconds", ("allowed: 2",)),
        ({"seconds": True}, "seconds", ("valid string",)),
        ({"num_frames": 17}, "num_frames", ("cannot make 17 frames", "allowed: 16")),
        ({"seconds": "2", "num_frames": 8}, "num_frames", ("8 contradicts seconds 2", "allowed: 16")),
        ({"fps": 30}, "fps", ("cannot make 30 frames a second", "allowed: 8")),
        ({"num_inference_steps": 0}, "num_inference_steps", ("0 is out of range", "allowed: 1 to 1000")),
        ({"num_inference_steps": 1001}, "num_inference_steps", ("allowed: 1 to 1000",)),
        ({"num_inference_steps": 2.5}, "num_inference_steps", ("integer", "got 2.5")),
        ({"num_inference_steps": "many"}, "num_inference_steps", ("integer", "'many'")),
        ({"guidance_scale": 11}, "guidance_scale", ("out of range", "allowed: 1 to 10")),
        ({"guidance_scale": "nan"}, "guidance_scale", ("out of range",)),
        ({"sampler": "ddim"}, "sampler", ("no sampler 'ddim'", "allowed: euler, heun")),
        ({"seed": -1}, "seed", ("-1 is out of range", f"0 to {MAX_SEED}")),
        ({"seed": MAX_SEED + 1}, "seed", ("out of range",)),
        ({"seed": True}, "seed", ("must be a number", "got True")),
        ({"n": 2}, "n", ("less than or equal to 1",)),
        ({"num_outputs_per_prompt": 0}, "num_outputs_per_prompt", ("greater than or equal to 1",)),
        ({"stepz": 3}, "stepz", ("not a known field", "num_inference_steps")),
        ({"label": "covid-convex"}, "label", ("not a known field",)),
        ({"negative_prompt": "blur"}, "negative_prompt", ("not supported", "no negative prompt")),
        ({"input_reference": {"file_id": "f"}}, "input_reference", ("trained without clean prefixes", "tiny")),
        ({"metadata": {"a": "b"}}, "metadata", ("not supported",)),
        ({"extra_body": {"seed": 1, "flow_shift": 3}}, "flow_shift", ("not supported",)),
        ({"seed": 1, "extra_params": {"seed": 2}}, "seed", ("more than once",)),
        ({"extra_params": "[1]"}, "extra_params", ("must be a JSON object",)),
        ({"extra_params": {"extra_params": {}}}, "extra_params", ("not a known field",)),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused_by_name(
    client: TestClient, fields: dict[str, Any], param: str, parts: tuple[str, ...]
) -> None:
    refused(create(client, **fields), param, *parts)
    assert client.get("/v1/videos").json()["data"] == [], "a refused request left a job behind"


def test_huge_number_is_refused_before_it_costs_anything(client: TestClient) -> None:
    body = '{"prompt": "covid-convex", "num_inference_steps": ' + "9" * 5000 + "}"
    refused(post_json(client, body), None, "no valid JSON")


def post_json(client: TestClient, body: str | bytes) -> Any:
    return client.post("/v1/videos", content=body, headers={"content-type": "application/json"})


def test_prompt_is_required(client: TestClient) -> None:
    refused(client.post("/v1/videos", json={}), "prompt", "is required", "GET /v1/models")
    refused(client.post("/v1/videos", data={"seed": "1"}), "prompt", "is required")


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("", "no valid JSON"),
        ("{", "no valid JSON"),
        ("{'prompt': 'x'}", "no valid JSON"),
        (b"\xff\xfe", "no valid JSON"),
        ('{"guidance_scale": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "no valid JSON: too deeply nested"),
        ("[]", "must be a JSON object"),
        ("5", "must be a JSON object"),
        ('"covid-convex"', "must be a JSON object"),
    ],
)
def test_body_that_is_no_json_object(client: TestClient, body: str | bytes, part: str) -> None:
    refused(post_json(client, body), None, part)


def test_name_given_twice_is_refused(client: TestClient) -> None:
    refused(post_json(client, '{"prompt": "covid-convex", "seed": 1, "seed": 2}'), "seed", "more than once")
    parts = [("prompt", (None, "covid-convex")), ("seed", (None, "1")), ("seed", (None, "2"))]
    refused(client.post("/v1/videos", files=parts), "seed", "more than once")


NEUTRAL = {
    "input_reference": None,
    "negative_prompt": "",
    "flow_shift": 1,
    "true_cfg_scale": 1.0,
    "lora": [],
    "quality": "standard",
    "user": "",
    "metadata": {},
    "return_stage_metrics": False,
    "stream": False,
    "extra_params": None,
}


def test_unsupported_fields_pass_where_they_ask_for_nothing(client: TestClient) -> None:
    assert create(client, **NEUTRAL).status_code == 200
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in NEUTRAL.items() if value}
    files = {name: (None, text) for name, text in {"prompt": "covid-convex", "stream": "False", **texts}.items()}
    assert client.post("/v1/videos", files=files).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flow_shift", 3),
        ("flow_shift", "3.0"),
        ("flow_shift", True),
        ("quality", "hd"),
        ("user", "me"),
        ("lora", {"name": "a"}),
        ("return_stage_metrics", True),
        ("return_stage_metrics", "true"),
        ("stream", "1"),
        ("true_cfg_scale", "nan"),
        ("characters", [{"id": "c"}]),
        ("video", {"id": "v"}),
        ("image", "http://a/b.png"),
    ],
)
def test_unsupported_fields_that_ask_for_something_are_refused(client: TestClient, name: str, value: Any) -> None:
    refused(create(client, **{name: value}), name, f"{name}: is not supported: ")


def test_nested_fields_may_be_flattened(client: TestClient) -> None:
    parts = {"prompt": "covid-convex", "extra_params[seed]": "5", "extra_body[num_inference_steps]": "6"}
    video = client.post("/v1/videos", files={name: (None, text) for name, text in parts.items()}).json()
    assert (video["seed"], video["num_inference_steps"]) == (5, 6)


@pytest.mark.parametrize(
    ("name", "param", "part"),
    [
        ("extra_params[stepz]", "stepz", "not a known field"),
        ("extra_params[metadata][a]", "metadata", "not supported"),
        ("extra_params[seed][]", "seed", "must be one value, got a list"),
        ("extra_params[]", "extra_params", "must be a JSON object"),
        ("seed[a]", "seed", "must be one value, got an object"),
        ("lora[]", "lora", "not supported"),
        ("seed]", "seed]", "not a known field"),
        ("[]", "[]", "not a known field"),
        ("labels[]", "labels", "not a known field"),
        ("metadata[key]", "metadata", "not supported"),
        ("seed[]", "seed", "must be one value"),
    ],
)
def test_flattened_lists_and_objects_are_seen(client: TestClient, name: str, param: str, part: str) -> None:
    refused(client.post("/v1/videos", files={"prompt": (None, "covid-convex"), name: (None, "1")}), param, part)


def test_files_are_refused_where_there_can_be_none(client: TestClient) -> None:
    files = {"prompt": (None, "covid-convex"), "input_reference": ("a.png", b"x", "image/png")}
    refused(client.post("/v1/videos", files=files), "input_reference", "trained without clean prefixes")
    refused(client.post("/v1/videos", files={"prompt": ("p.txt", b"covid-convex")}), "prompt", "got a file")


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", ""])
def test_other_content_types_are_refused(client: TestClient, kind: str) -> None:
    response = client.post("/v1/videos", content=b"prompt=x", headers={"content-type": kind})
    refused(response, "content-type", "multipart/form-data, application/json", status=415)


def test_broken_multipart_is_refused(client: TestClient) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    refused(client.post("/v1/videos", content=b"no boundary here", headers=headers), None)


def test_too_many_parts_are_refused(client: TestClient) -> None:
    parts = [("prompt", (None, "covid-convex"))] + [(f"f{number}", (None, "x")) for number in range(100)]
    refused(client.post("/v1/videos", files=parts), None, "Too many fields", "64")
    uploads = [(f"f{number}", ("a.png", b"x")) for number in range(10)]
    refused(client.post("/v1/videos", files=uploads), None, "Too many files", "4")


def test_large_body_is_refused_by_its_declared_length_and_while_it_streams(settings: Settings) -> None:
    small = settings.model_copy(update={"max_body_bytes": 2048})
    body = json.dumps({"prompt": "x" * 4000}).encode()
    with TestClient(create_app(small)) as client:
        refused(post_json(client, body), None, "more than 2048 bytes", status=413)

        def stream() -> Any:
            for start in range(0, len(body), 100):
                yield body[start : start + 100]

        response = client.post("/v1/videos", content=stream(), headers={"content-type": "application/json"})
        refused(response, None, "more than 2048 bytes", status=413)


def test_full_queue_asks_to_come_back(client: TestClient) -> None:
    for _ in range(5):
        assert create(client).status_code == 200
    response = create(client)
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "queue_full"
    assert int(response.headers["retry-after-ms"]) > 0
    assert int(response.headers["retry-after"]) > 0
    assert len(client.get("/v1/videos").json()["data"]) == 5


def test_full_disk_takes_no_jobs(settings: Settings) -> None:
    with TestClient(create_app(settings.model_copy(update={"min_free_bytes": 2**62}))) as client:
        response = create(client)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "storage_full"
        assert "retry-after" in response.headers
        assert client.get("/v1/videos").json()["data"] == []


@pytest.mark.parametrize("text", ["covid lung\\ud800", "covid lung\\u0000"])
def test_text_that_no_database_can_hold_is_refused(client: TestClient, text: str) -> None:
    refused(post_json(client, f'{{"prompt": "{text}"}}'), "prompt", "must be text")
    refused(post_json(client, f'{{"prompt": "covid lung", "model": "{text}"}}'), "model", "must be text")
    refused(post_json(client, f'{{"prompt": "covid lung", "{text}": 1}}'), None, "no text")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FIELD_NAMES = st.sampled_from([*CreateVideoFields.model_fields, "extra_body", "extra_params"]) | st.text(max_size=10)


@given(
    fields=st.dictionaries(FIELD_NAMES, JSON_VALUES, max_size=4), prompt=st.sampled_from(["covid-convex", "nonsense"])
)
@hypothesis.settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_body_breaks_the_server(client: TestClient, fields: dict[str, Any], prompt: str) -> None:
    response = post_json(client, json.dumps({"prompt": prompt, **fields}))
    assert response.status_code in (200, 400, 429), response.text
    if response.status_code == 400:
        assert response.json()["error"]["message"]
