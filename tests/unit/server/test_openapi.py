"""The OpenAPI document says what the server does, and can be followed."""

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
