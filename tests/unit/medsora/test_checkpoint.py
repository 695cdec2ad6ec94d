"""Checkpoint directories: round trip, and refusal of everything damaged, altered or foreign."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medsora.checkpoint import load_checkpoint, save_checkpoint, write_tiny_checkpoint
from medsora.errors import CheckpointError
from medsora.files import sha256_of
from medsora.manifest import find_checkpoint, list_checkpoints, read_manifest


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def reseal(directory: Path, name: str) -> None:
    """Record the present hash and size of a file, so that what is tested is behind the hash check."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    size = (directory / name).stat().st_size
    manifest["files"][name] = {"sha256": sha256_of(directory / name), "size_bytes": size}
    path.write_text(json.dumps(manifest))


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_what_is_saved_is_loaded(original: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(original)
    again = save_checkpoint(
        tmp_path / "again",
        config=loaded.config,
        autoencoder=loaded.autoencoder.state_dict(),
        denoiser=loaded.denoiser.state_dict(),
        manifest=loaded.manifest,
        dtype="float32",
    )
    reloaded = load_checkpoint(tmp_path / "again")
    assert reloaded.config == loaded.config
    assert reloaded.manifest == again == replace(loaded.manifest, files=again.files)
    for ours, theirs in ((reloaded.denoiser, loaded.denoiser), (reloaded.autoencoder, loaded.autoencoder)):
        state = theirs.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


def test_half_precision_storage_is_loaded_as_float32(original: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(original)
    states = loaded.autoencoder.state_dict(), loaded.denoiser.state_dict()
    config, manifest = loaded.config, loaded.manifest
    save_checkpoint(tmp_path, config=config, autoencoder=states[0], denoiser=states[1], manifest=manifest)
    half = load_checkpoint(tmp_path)
    assert {p.dtype for p in half.denoiser.parameters()} == {torch.float32}
    assert all(torch.allclose(v, states[1][k], rtol=1e-3, atol=1e-6) for k, v in half.denoiser.state_dict().items())
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "manifest.json", "autoencoder.safetensors", "denoiser.safetensors"}


def save_alone(original: Path, directory: Path) -> Path:
    """The denoiser of a checkpoint without its autoencoder."""
    loaded = load_checkpoint(original)
    save_checkpoint(
        directory,
        config=replace(loaded.config, autoencoder=None),
        autoencoder=None,
        denoiser=loaded.denoiser.state_dict(),
        manifest=loaded.manifest,
    )
    return directory


def test_a_checkpoint_may_be_a_denoiser_alone(original: Path, tmp_path: Path) -> None:
    directory = save_alone(original, tmp_path / "alone")
    assert {path.name for path in directory.iterdir()} == {"config.json", "manifest.json", "denoiser.safetensors"}
    loaded = load_checkpoint(directory)
    assert loaded.autoencoder is None
    assert loaded.config.autoencoder is None
    assert not loaded.manifest.has_autoencoder
    assert load_checkpoint(original).manifest.has_autoencoder
    with pytest.raises(ValueError, match="no autoencoder, and makes latents"):
        loaded.config.require_autoencoder()


def test_autoencoder_in_the_manifest_and_not_in_the_configuration_is_refused(original: Path, tmp_path: Path) -> None:
    alone = save_alone(original, tmp_path / "alone")
    shutil.copy(alone / "config.json", Path(shutil.copytree(original, tmp_path / "both")) / "config.json")
    reseal(tmp_path / "both", "config.json")
    with pytest.raises(CheckpointError, match=r"in the manifest's files: True, in config\.json: False"):
        load_checkpoint(tmp_path / "both")
    shutil.copy(original / "config.json", alone / "config.json")
    reseal(alone, "config.json")
    with pytest.raises(CheckpointError, match=r"in the manifest's files: False, in config\.json: True"):
        load_checkpoint(alone)


def test_an_autoencoder_is_saved_where_it_is_configured_and_nowhere_else(original: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(original)
    denoiser, manifest = loaded.denoiser.state_dict(), loaded.manifest
    with pytest.raises(CheckpointError, match="autoencoder is given: False, in the configuration: True"):
        save_checkpoint(tmp_path, config=loaded.config, autoencoder=None, denoiser=denoiser, manifest=manifest)
    assert loaded.autoencoder is not None
    alone, weights = replace(loaded.config, autoencoder=None), loaded.autoencoder.state_dict()
    with pytest.raises(CheckpointError, match="autoencoder is given: True, in the configuration: False"):
        save_checkpoint(tmp_path, config=alone, autoencoder=weights, denoiser=denoiser, manifest=manifest)
    assert list(tmp_path.iterdir()) == []


def test_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = write_tiny_checkpoint(tmp_path / "a"), write_tiny_checkpoint(tmp_path / "b")
    assert read_manifest(first) == read_manifest(second)


@pytest.mark.parametrize("name", ["config.json", "autoencoder.safetensors", "denoiser.safetensors"])
def test_one_altered_byte_is_refused(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[-3] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} was altered: its SHA-256"):
        load_checkpoint(copy)


@pytest.mark.parametrize("name", ["config.json", "autoencoder.safetensors", "denoiser.safetensors"])
def test_a_truncated_file_is_refused(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=rf"{name} has {len(content) // 2} bytes, the manifest says"):
        load_checkpoint(copy)


@pytest.mark.parametrize("name", ["config.json", "denoiser.safetensors", "manifest.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: No such file"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(surprise=1), "unknown keys: surprise"),
        (lambda m: m["limits"].update(surprise=1), r"manifest\.json\.limits has unknown keys: surprise"),
        (lambda m: m.pop("labels"), "lacks keys: labels"),
        (lambda m: m.update(labels="all"), "labels must be a list, not str"),
        (lambda m: m.update(format_version=99), "format_version is 99, this version reads 1"),
        (lambda m: m.update(format_version=True), "format_version must be int, not bool"),
        (lambda m: m.update(labels=[]), "labels must be there"),
        (lambda m: m["limits"].update(num_inference_steps=[5, 2, 9]), "num_inference_steps must rise"),
        (lambda m: m["files"].pop("config.json"), "must list exactly"),
        (lambda m: m["files"].update({"../x": m["files"]["config.json"]}), "must list exactly"),
        (lambda m: m["files"].clear(), "must list exactly .* it lists nothing"),
        (lambda m: m["labels"][0]["condition"].update(finding="flu"), "finding must be one of"),
        (lambda m: m["labels"][0].update(synonyms=["Covid, convex"]), "also means 'regular-convex'"),
        (lambda m: m["labels"][0].update(synonyms=["++"]), "is empty"),
        (lambda m: m["labels"].append(m["labels"][0]), "must have different names"),
        (lambda m: m["limits"].update(fps=10**400), "fps must be a finite number"),
        (
            lambda m: m["limits"].update(samplers=["ddim"]),
            "cannot use a predicted velocity: ddim; those that can: euler",
        ),
        (lambda m: m["limits"].update(num_frames=[12]), "limits allow 12 frames of 32x32, which cannot be coded"),
        (lambda m: m["limits"].update(sizes=[[32, 40]]), "limits allow 16 frames of 32x40, which cannot be coded"),
        (lambda m: m.update(description="\x1b[2J"), "control characters in"),
        (lambda m: m["metrics"].update(note=["\x9b"]), "control characters in"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(copy: Path, change: Callable[[Any], object], message: str) -> None:
    edit_json(copy / "manifest.json", change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["denoiser"].update(surprise=1), r"config\.json\.denoiser has unknown keys: surprise"),
        (lambda c: c["denoiser"].update(depth="2"), r"denoiser\.depth must be int, not str"),
        (lambda c: c["denoiser"].update(depth=10**9), "depth must be 1 to 256"),
        (lambda c: c["denoiser"].update(scan_order="zigzag"), "scan_order must be one of"),
        (lambda c: c["denoiser"].update(local_positions="none"), "local_positions must be one of"),
        (lambda c: c["denoiser"].update(prediction="data"), "prediction must be one of"),
        (lambda c: c["denoiser"].update(prediction="noise"), "out_channels must be 8 to predict noise of 4 channels"),
        (lambda c: c["denoiser"].update(out_channels=8), "out_channels must be 4 to predict velocity of 4 channels"),
        (
            lambda c: c["denoiser"].update(prediction="noise", out_channels=8),
            "cannot use a predicted noise: euler, heun",
        ),
        (lambda c: c["condition_names"].update(probe=["convex", "convex"]), "probe has a value twice"),
        (lambda c: c["autoencoder"].update(latent_channels=5), "the denoiser takes 4"),
        (lambda c: c.pop("autoencoder"), "lacks keys: autoencoder"),
        (lambda c: c["denoiser"].update(hidden_size=64), "has the wrong tensors|has shape"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    copy: Path, change: Callable[[Any], object], message: str
) -> None:
    edit_json(copy / "config.json", change)
    reseal(copy, "config.json")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(copy)


def test_a_configuration_from_before_a_field_was_there_is_read(copy: Path) -> None:
    def remove_new_fields(config: Any) -> None:
        for name in ("prediction", "local_positions"):
            del config["denoiser"][name]

    edit_json(copy / "config.json", remove_new_fields)
    reseal(copy, "config.json")
    config = load_checkpoint(copy).config.denoiser
    assert (config.prediction, config.local_positions) == ("velocity", "relative")


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_refused(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"fps": 8.0', '"fps": 8.0, "fps": 8.0', "key 'fps' is given twice"),
        ('"fps": 8.0', '"fps": NaN', "NaN is no number of JSON"),
        ('"fps": 8.0', '"fps": 1e999', "fps must be a finite number"),
    ],
)
def test_json_is_read_strictly(copy: Path, old: str, new: str, message: str) -> None:
    path = copy / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(copy)


def test_a_huge_manifest_is_not_read(copy: Path) -> None:
    (copy / "manifest.json").write_bytes(b" " * (5 * 2**20))
    with pytest.raises(CheckpointError, match="more than the"):
        load_checkpoint(copy)


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "denoiser.safetensors"])
@pytest.mark.timeout(20)
def test_pipes_devices_and_folders_are_refused_at_once(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(CheckpointError, match=rf"{name} is no regular file"):
        load_checkpoint(copy)
    (copy / name).unlink()
    (copy / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=rf"{name} is no regular file"):
        load_checkpoint(copy)
    (copy / name).unlink()
    (copy / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"{name} (is no regular file|cannot be read)"):
        load_checkpoint(copy)


def test_a_file_changed_after_loading_changes_nothing(copy: Path) -> None:
    loaded = load_checkpoint(copy)
    before = {key: value.clone() for key, value in loaded.denoiser.state_dict().items()}
    path = copy / "denoiser.safetensors"
    with path.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\xff" * 4096)
    assert all(torch.equal(value, before[key]) for key, value in loaded.denoiser.state_dict().items())


@pytest.mark.parametrize(
    "content",
    [
        b"short",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 11 * 2**20) + b" " * (11 * 2**20),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"{{{{",
        b"PK\x03\x04" + b"\0" * 64,
        b"\x80\x04\x95" + b"." * 64,
    ],
    ids=["short", "length of 2**62", "header of 11 MiB", "a list", "no json", "zip", "pickle"],
)
def test_what_is_no_safetensors_file_is_refused(copy: Path, content: bytes) -> None:
    (copy / "denoiser.safetensors").write_bytes(content)
    reseal(copy, "denoiser.safetensors")
    with pytest.raises(CheckpointError, match=r"denoiser\.safetensors"):
        load_checkpoint(copy)


def test_a_million_tensors_are_refused_by_their_header(copy: Path) -> None:
    header = json.dumps({str(i): {} for i in range(30_000)}).encode()
    (copy / "denoiser.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    reseal(copy, "denoiser.safetensors")
    with pytest.raises(CheckpointError, match="more than 20000 tensors"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("patch_out.bias"), r"wrong tensors, first of 1: patch_out\.bias"),
        (lambda w: w.update(surprise=torch.zeros(1)), "wrong tensors, first of 1: surprise"),
        (lambda w: w.update({"patch_out.bias": torch.zeros(3)}), r"patch_out\.bias has shape \(3,\), not \(16,\)"),
        (lambda w: w.update({"patch_out.bias": torch.full((16,), torch.nan)}), "not finite"),
        (lambda w: w.update({"patch_out.bias": torch.zeros(16, dtype=torch.int32)}), "has type torch.int32"),
        (lambda w: w.update({"patch_out.bias": torch.full((16,), 1e300, dtype=torch.float64)}), "not finite"),
        (lambda w: w.update({"patch_out.bias": torch.zeros(16).to(torch.float8_e4m3fn)}), "has type torch.float8"),
    ],
)
def test_weights_that_do_not_fit_are_refused(copy: Path, change: Callable[[Any], object], message: str) -> None:
    weights = load_file(copy / "denoiser.safetensors")
    change(weights)
    save_file(weights, copy / "denoiser.safetensors")
    reseal(copy, "denoiser.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(copy)


def test_weights_that_overflow_the_stored_type_are_not_written(original: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(original)
    state = loaded.denoiser.state_dict()
    state["patch_out.bias"] = state["patch_out.bias"] + 1e6
    with pytest.raises(CheckpointError, match=r"patch_out\.bias is not finite in float16"):
        save_checkpoint(
            tmp_path,
            config=loaded.config,
            autoencoder=loaded.autoencoder.state_dict(),
            denoiser=state,
            manifest=loaded.manifest,
        )
    assert not (tmp_path / "manifest.json").exists()


def test_checkpoints_are_found_by_path_and_by_name(original: Path, tmp_path: Path) -> None:
    assert find_checkpoint(original) == original
    for name in list_checkpoints():
        assert read_manifest(find_checkpoint(name)).name == name
    with pytest.raises(CheckpointError, match="no checkpoint 'nowhere'"):
        find_checkpoint("nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint(tmp_path)
