"""What `kubectl kustomize` makes of a folder, as far as docker/kubernetes uses it, for machines that have no kubectl.

Anything else that a kustomization says is refused, so that nothing is left out in silence. Names of generated
ConfigMaps and Secrets get no hash here; tests/deployment/test_kubernetes.py compares the rest with kubectl where that
is installed.
"""

import base64
import copy
import re
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Manifest", "render"]

Manifest = dict[str, Any]
_PARTS = {
    "apiVersion",
    "kind",
    "namespace",
    "resources",
    "components",
    "configMapGenerator",
    "secretGenerator",
    "patches",
    "images",
}
_OF_CLUSTER = ("Namespace",)


def render(folder: Path) -> list[Manifest]:
    """The objects of a kustomization.

    Raises:
        ValueError: It says something that this does not know, or that does not fit.
    """
    return _build(folder.resolve(), [])


def _build(folder: Path, given: list[Manifest]) -> list[Manifest]:
    """Apply a folder's kustomization to the objects that are there already."""
    said = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(said) - _PARTS:
        raise ValueError(f"{folder}: tests/kustomize.py does not know {sorted(unknown)}")
    objects = list(given)
    for name in said.get("resources", []):
        path = (folder / name).resolve()
        if path.is_dir():
            objects += _build(path, [])
        else:
            objects += [copy.deepcopy(one) for one in yaml.safe_load_all(path.read_text()) if one]
    for kind, generators in (("ConfigMap", "configMapGenerator"), ("Secret", "secretGenerator")):
        for generator in said.get(generators, []):
            _generate(folder, kind, generator, objects)
    for name in said.get("components", []):
        objects = _build((folder / name).resolve(), objects)
    for patch in said.get("patches", []):
        _patch_all(folder, patch, objects)
    for one in objects:
        if "namespace" in said and one["kind"] not in _OF_CLUSTER:
            one["metadata"]["namespace"] = said["namespace"]
        for container in _containers(one):
            container["image"] = _image(container["image"], said.get("images", []))
    return objects


def _generate(folder: Path, kind: str, said: dict[str, Any], objects: list[Manifest]) -> None:
    if unknown := set(said) - {"name", "namespace", "behavior", "type", "files", "envs"}:
        raise ValueError(f"{folder}: tests/kustomize.py does not know {sorted(unknown)} of a generator")
    data = {}
    for entry in said.get("files", []):
        key, _, name = entry.rpartition("=")
        data[key or Path(name).name] = (folder / name).read_text()
    for name in said.get("envs", []):
        lines = (line.strip() for line in (folder / name).read_text().splitlines())
        for line in lines:
            if line and not line.startswith("#"):
                key, sign, value = line.partition("=")
                if not sign:
                    raise ValueError(f"{folder / name}: {line!r} has no value")
                data[key] = value
    if kind == "Secret":
        data = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
    if said.get("behavior") == "merge":
        (old,) = (one for one in objects if (one["kind"], one["metadata"]["name"]) == (kind, said["name"]))
        if said.get("namespace") != old["metadata"].get("namespace"):
            raise ValueError(f"{folder}: kubectl finds no {kind} {said['name']} in the namespace to merge with")
        old["data"] |= data
        return
    made: Manifest = {"apiVersion": "v1", "kind": kind, "metadata": {"name": said["name"]}, "data": data}
    if kind == "Secret":
        made["type"] = said.get("type", "Opaque")
    objects.append(made)


def _patch_all(folder: Path, said: dict[str, Any], objects: list[Manifest]) -> None:
    """Apply a JSON patch (RFC 6902: add, replace, remove) to every object that its target means."""
    target = said["target"]
    meant = [
        one
        for one in objects
        if one["kind"] == target["kind"] and re.fullmatch(target["name"], one["metadata"]["name"])
    ]
    if set(target) != {"kind", "name"} or set(said) != {"target", "patch"} or not meant:
        raise ValueError(f"{folder}: the patch of {target} is not known, or meets nothing")
    for one in meant:
        for step in yaml.safe_load(said["patch"]):
            *way, last = step["path"].removeprefix("/").split("/")
            place: Any = one
            for name in way:
                place = place[int(name) if isinstance(place, list) else name]
            _apply(step, place, last)


def _apply(step: dict[str, Any], place: Any, last: str) -> None:
    if step["op"] == "add" and isinstance(place, list):
        place.insert(len(place) if last == "-" else int(last), copy.deepcopy(step["value"]))
    elif step["op"] == "add" or (step["op"] == "replace" and last in place):
        place[last] = copy.deepcopy(step["value"])
    elif step["op"] == "remove" and last in place:
        del place[last]
    else:
        raise ValueError(f"the step {step} of a patch is not known, or meets nothing")


def _containers(one: Manifest) -> list[dict[str, Any]]:
    spec = one.get("spec", {}).get("template", {}).get("spec", {})
    return [*spec.get("initContainers", []), *spec.get("containers", [])]


def _image(image: str, changes: list[dict[str, str]]) -> str:
    name, _, tag = image.partition(":")
    for change in changes:
        if change["name"] == name:
            return f"{change.get('newName', name)}:{change.get('newTag', tag)}"
    return image
