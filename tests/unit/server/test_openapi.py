"""The OpenAPI document says what the server does, and can be followed."""

import re
from typing import Any

import pytest
from fastapi.testclient import TestClient


@pytest.fixture
def document(client: TestClient) -> Any:
    """The document of the application."""
    return client.get("/openapi.json").json()


def _parts(part: Any) -> Any:
    if isinstance(part, dict):
        yield part
        for one in part.values():
            yield from _parts(one)
    elif isinstance(part, list):
        for one in part:
            yield from _parts(one)


def _operations(document: Any) -> dict[str, Any]:
    return {one["operationId"]: one for path in document["paths"].values() for one in path.values()}


def test_every_reference_leads_somewhere(document: Any) -> None:
    references = {part["$ref"] for part in _parts(document) if "$ref" in part}
    assert references
    for reference in references:
        here = document
        for name in reference.removeprefix("#/").split("/"):
            here = here[name]


def test_every_link_leads_to_an_operation_that_takes_it(document: Any) -> None:
    operations = _operations(document)
    links = [link for part in _parts(document) for link in part.get("links", {}).values() if "links" in part]
    assert len(links) >= 10
    for link in links:
        names = {parameter["name"] for parameter in operations[link["operationId"]]["parameters"]}
        assert set(link["parameters"]) <= names


def test_errors_are_those_of_this_server(document: Any) -> None:
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for name, operation in _operations(document).items():
        for status, response in operation["responses"].items():
            if status >= "400" and "content" in response:
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}, (name, status)


def test_examples_are_what_the_default_model_can_do(client: TestClient, document: Any) -> None:
    body = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    prompts = body["properties"]["prompt"]["examples"]
    assert prompts
    answers = [client.post("/v1/videos", json={"prompt": prompt}).status_code for prompt in prompts]
    assert answers == [200] * len(prompts)
    assert body["properties"]["model"]["examples"] == ["tiny"]


def test_methods_that_are_allowed_are_those_of_the_document(client: TestClient, document: Any) -> None:
    for path, operations in document["paths"].items():
        answer = client.options(path.replace("{", "").replace("}", ""))
        assert answer.status_code == 405, path
        allowed = set(answer.headers["allow"].split(", ")) - {"HEAD"}
        assert allowed == {method.upper() for method in operations}, path


def _parameters(operation: Any) -> dict[str, Any]:
    return {one["name"]: one for one in operation.get("parameters", [])}


def test_every_post_takes_an_idempotency_key(client: TestClient, document: Any) -> None:
    posts = {path: operations["post"] for path, operations in document["paths"].items() if "post" in operations}
    assert len(posts) > 8
    for path, operation in posts.items():
        schema = _parameters(operation)["Idempotency-Key"]["schema"]
        assert {"400", "409", "422"} <= set(operation["responses"]), path
        assert "idempotent-replayed" in operation["responses"]["200"]["headers"], path
    assert "Idempotency-Key" not in _parameters(document["paths"]["/v1/videos"]["get"])

    def answer(key: str, label: str = "covid lung") -> Any:
        return client.post("/v1/videos", json={"prompt": label}, headers={"idempotency-key": key})

    longest = "k" * schema["maxLength"]
    assert re.fullmatch(schema["pattern"], longest)
    assert answer(longest).status_code == 200
    assert answer(longest).headers["idempotent-replayed"] == "true"
    assert answer(longest, "regular-convex").status_code == 422
    for refused in ("", longest + "k", "two words"):
        assert answer(refused).status_code == 400
        assert len(refused) not in range(1, schema["maxLength"] + 1) or not re.fullmatch(schema["pattern"], refused)


def test_downloads_take_ranges(document: Any) -> None:
    operations = _operations(document)
    for name in ("get_content", "get_file_content", "stream_video", "download_dataset"):
        assert {"Range", "If-Range"} <= set(_parameters(operations[name])), name
        assert {"206", "416"} <= set(operations[name]["responses"]), name
    for name in ("get_content", "download_dataset"):
        assert "If-None-Match" in _parameters(operations[name])
        assert "304" in operations[name]["responses"]


def test_headers_of_answers_are_as_told(client: TestClient, document: Any) -> None:
    responses = document["paths"]["/v1/videos"]["post"]["responses"]
    answers = [client.post("/v1/videos", json={"prompt": "covid lung"}) for _ in range(6)]  # 5 may wait
    refused = answers[-1]
    assert (refused.status_code, answers[0].status_code) == (429, 200)
    rates = {"ratelimit-limit", "ratelimit-remaining", "ratelimit-reset"}  # only where a limit is set
    for answer in (refused, answers[0]):
        for name in set(responses[str(answer.status_code)]["headers"]) - rates - {"idempotent-replayed"}:
            assert name in answer.headers
    assert "retry-after" not in responses["200"]["headers"]
