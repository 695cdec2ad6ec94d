"""Feature networks whose names are protocols: I3D (FVD), VideoMAE (CD-FVD), Inception (FID and IS), CLIP, SqueezeNet.

Each is loaded from a path that the user gives, checked against what its protocol says of input and output, and
recorded with its hash. Every extractor takes clips, uint8 (n f h w 3), and gives (n v d): v vectors of each clip.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from medsora.files import sha256_of
from medsora.video_io import from_uint8
from training.data.clips import index_batches
from training.errors import TrainingError
from training.evaluation.clip_vision import load_clip_vision
from training.evaluation.torchscript import argument_names, load_torchscript
from training.evaluation.warping import Flow
from training.flow import load_raft
from training.squeezenet import SqueezeNet, load_squeezenet

__all__ = [
    "ClipNetwork", "DistanceMetric", "EvaluationNetworks", "InceptionNetwork", "clip_frames", "file_hashes",
    "file_record", "load_i3d", "load_inception", "load_networks", "load_videomae", "squeezenet_frames",
]  # fmt: skip

VIDEOMAE_SIZE, VIDEOMAE_FRAMES = 224, 16
I3D_LEAST_FRAMES = 10
"""Below this the network's temporal strides leave nothing to average."""
INCEPTION_FEATURES = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipNetwork:
    """Features of clips by one protocol."""

    extract: Callable[[Tensor], Tensor]
    """uint8 (n f h w 3) to float32 (n v d), any n."""
    record: dict[str, Any]
    """File name, size and hash, and the protocol in words: for the report."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InceptionNetwork:
    """Inception-v3 of 2015: pooled features for FID, class probabilities for the inception score."""

    features: Callable[[Tensor], Tensor]
    probabilities: Callable[[Tensor], Tensor]
    record: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class DistanceMetric:
    """One kind of Frechet distance."""

    name: str
    title: str
    extract: Callable[[Tensor], Tensor]
    ddof: int
    """1: covariances over n - 1; 0: over n."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationNetworks:
    """The networks of one evaluation; what is None is not measured, and the report says so."""

    squeezenet: ClipNetwork
    i3d: ClipNetwork | None = None
    videomae: ClipNetwork | None = None
    inception: InceptionNetwork | None = None
    clip: ClipNetwork | None = None
    flow: Flow | None = None
    flow_record: dict[str, Any] | None = None

    def records(self) -> dict[str, dict[str, Any]]:
        """What the report says of each network that is there."""
        found = {
            "SqueezeNet": self.squeezenet.record,
            "I3D": None if self.i3d is None else self.i3d.record,
            "VideoMAE": None if self.videomae is None else self.videomae.record,
            "Inception": None if self.inception is None else self.inception.record,
            "CLIP": None if self.clip is None else self.clip.record,
            "Optical flow": self.flow_record,
        }
        return {name: record for name, record in found.items() if record is not None}

    def absent(self) -> dict[str, str]:
        """Figures that are not measured, and why."""
        needs = {
            "FVD": (self.i3d, "--i3d"),
            "CD-FVD": (self.videomae, "--videomae"),
            "FID and inception score": (self.inception, "--inception"),
            "Frame consistency in CLIP's embeddings": (self.clip, "--clip"),
            "Flow warping error": (self.flow, "--raft"),
        }
        return {name: f"no network given with {option}" for name, (there, option) in needs.items() if there is None}

    def distance_metrics(self) -> list[DistanceMetric]:
        """Every Frechet distance that can be measured."""
        frames = self.squeezenet.extract
        found = [
            DistanceMetric(
                name="frechet_squeezenet", title="Fr\u00e9chet, SqueezeNet, single frames", extract=frames, ddof=1
            ),
            DistanceMetric(
                name="frechet_squeezenet_motion",
                title="Fr\u00e9chet, SqueezeNet, change between frames",
                extract=lambda clips: frames(clips).diff(dim=1).abs(),
                ddof=1,
            ),
        ]
        if self.inception is not None:
            found.insert(0, DistanceMetric(name="fid", title="FID", extract=self.inception.features, ddof=1))
        if self.videomae is not None:
            found.insert(0, DistanceMetric(name="cd_fvd", title="CD-FVD", extract=self.videomae.extract, ddof=0))
        if self.i3d is not None:
            found.insert(0, DistanceMetric(name="fvd", title="FVD", extract=self.i3d.extract, ddof=0))
        return found


def file_hashes(path: Path) -> dict[str, str]:
    """SHA-256 by name of a file, or of all files below a folder."""
    if path.is_file():
        return {path.name: sha256_of(path)}
    return {str(file.relative_to(path)): sha256_of(file) for file in sorted(path.rglob("*")) if file.is_file()}


def file_record(path: Path, protocol: str) -> dict[str, Any]:
    """What the report says of a network's file."""
    return {
        "file": path.name,
        "size_bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "protocol": protocol,
    }


def load_networks(
    *,
    squeezenet: Path,
    i3d: Path | None = None,
    videomae: Path | None = None,
    inception: Path | None = None,
    clip: Path | None = None,
    raft: Path | None = None,
    device: torch.device | str,
) -> EvaluationNetworks:
    """Load every network that a path is given for.

    Raises:
        TrainingError: A file that is not what its option says.
    """
    protocol = "RAFT-small; pixels kept where |there + back|^2 < 0.01 (|there|^2 + |back|^2) + 0.5, inside the image"
    return EvaluationNetworks(
        squeezenet=squeezenet_frames(load_squeezenet(squeezenet, device=device), squeezenet),
        i3d=None if i3d is None else load_i3d(i3d, device=device),
        videomae=None if videomae is None else load_videomae(videomae, device=device),
        inception=None if inception is None else load_inception(inception, device=device),
        clip=None if clip is None else clip_frames(clip, device=device),
        flow=None if raft is None else load_raft(raft, device=device),
        flow_record=None if raft is None else file_record(raft, protocol),
    )


def load_i3d(path: Path, *, device: torch.device | str, batch_size: int = 8) -> ClipNetwork:
    """The I3D of StyleGAN-V's FVD: ``i3d_torchscript.pt``, called with rescale, resize and return_features.

    Source: Skorokhodov et al., arXiv 2112.14683; the distance, Unterthiner et al., arXiv 1812.01717.

    Raises:
        TrainingError: The archive's forward does not take these three; later, that a clip is too short for it.
    """
    module = load_torchscript(path, device=device)
    _require(path, module, ("rescale", "resize", "return_features"), "the I3D of StyleGAN-V")

    def features(clips: Tensor) -> Tensor:
        if clips.shape[1] < I3D_LEAST_FRAMES:
            raise TrainingError(f"FVD needs clips of at least {I3D_LEAST_FRAMES} frames, these have {clips.shape[1]}")
        video = rearrange(clips, "n f h w c -> n c f h w").float()
        return _run(path, lambda: module(video, rescale=True, resize=True, return_features=True), len(clips))

    protocol = (
        "StyleGAN-V: I3D of Kinetics-400 as TorchScript, pixels 0 to 255 with rescale=True, resize=True, "
        "return_features=True; one vector a clip; covariance over n"
    )
    return ClipNetwork(extract=_batched(features, batch_size), record=file_record(path, protocol))


def load_videomae(path: Path, *, device: torch.device | str, batch_size: int = 8) -> ClipNetwork:
    """VideoMAE fine-tuned on Something-Something v2, exported as TorchScript: pooled features for CD-FVD.

    The archive's forward takes 16 frames, (n 3 16 224 224) in [0, 1], and returns (n d): the ``forward_features`` of
    the network that cd-fvd loads. Source: Ge et al., arXiv 2404.12391, and their package cd-fvd.
    """
    module = load_torchscript(path, device=device)
    if len(argument_names(module)) != 1:
        raise TrainingError(
            f"{path}: forward must take the video alone, it takes {', '.join(argument_names(module)) or 'nothing'}; "
            "export the network's forward_features"
        )

    def features(clips: Tensor) -> Tensor:
        if clips.shape[1] != VIDEOMAE_FRAMES:
            raise TrainingError(f"CD-FVD is of clips of {VIDEOMAE_FRAMES} frames, these have {clips.shape[1]}")
        frames = rearrange(clips, "n f h w c -> (n f) c h w").float() / 255
        frames = F.interpolate(frames, size=(VIDEOMAE_SIZE, VIDEOMAE_SIZE), mode="bilinear", align_corners=False)
        video = rearrange(frames, "(n f) c h w -> n c f h w", n=len(clips))
        return _run(path, lambda: module(video), len(clips))

    protocol = (
        "cd-fvd: VideoMAE of Something-Something v2 as TorchScript, pixels 0 to 1, bilinear to 224x224, no "
        "normalisation; one vector a clip; covariance over n"
    )
    return ClipNetwork(extract=_batched(features, batch_size), record=file_record(path, protocol))


def load_inception(path: Path, *, device: torch.device | str, batch_size: int = 64) -> InceptionNetwork:
    """Inception-v3 of 2015-12-05 as NVIDIA's TorchScript, which resizes to 299x299 as TensorFlow 1 did.

    Sources: FID, Heusel et al., arXiv 1706.08500; the archive, ``inception-2015-12-05.pt`` of stylegan2-ada-pytorch.

    Raises:
        TrainingError: The archive's forward takes no ``return_features`` or ``no_output_bias``, or its features are
            not 2048.
    """
    module = load_torchscript(path, device=device)
    _require(path, module, ("return_features", "no_output_bias"), "NVIDIA's inception-2015-12-05.pt")

    def run(clips: Tensor, **options: bool) -> Tensor:
        images = rearrange(clips, "n f h w c -> (n f) c h w").contiguous()
        parts = [
            _run(path, lambda batch=batch: module(batch, **options), len(batch))[:, 0]  # type: ignore[misc]
            for batch in torch.split(images, batch_size)
        ]
        return rearrange(torch.cat(parts), "(n f) d -> n f d", n=len(clips))

    def features(clips: Tensor) -> Tensor:
        found = run(clips, return_features=True)
        if found.shape[-1] != INCEPTION_FEATURES:
            raise TrainingError(f"{path} gives {found.shape[-1]} features, FID is of Inception's {INCEPTION_FEATURES}")
        return found

    def probabilities(clips: Tensor) -> Tensor:
        found = run(clips, no_output_bias=True)
        total = found.sum(dim=-1)
        if bool((found < 0).any()) or not torch.allclose(total, torch.ones_like(total), atol=1e-2):
            raise TrainingError(f"{path}: what it returns without return_features are no probabilities")
        return found

    protocol = (
        "Inception-v3 of 2015-12-05 as TorchScript, uint8 images, its own resizing; FID: 2048 pooled features of every "
        "frame, covariance over n - 1; IS: probabilities of every frame without output bias"
    )
    return InceptionNetwork(
        features=_batched(features, 4), probabilities=_batched(probabilities, 4), record=file_record(path, protocol)
    )


def clip_frames(path: Path, *, device: torch.device | str, batch_size: int = 16) -> ClipNetwork:
    """CLIP's image embedding of every frame."""
    network = load_clip_vision(path, device=device)

    @torch.no_grad()
    def features(clips: Tensor) -> Tensor:
        frames = rearrange(from_uint8(clips), "n c f h w -> (n f) c h w")
        embeddings: Tensor = network(frames)
        return rearrange(embeddings, "(n f) d -> n f d", n=len(clips))

    protocol = f"CLIP ViT image encoder, {network.image_size} pixels, float32; one vector a frame"
    return ClipNetwork(extract=_batched(features, batch_size), record=file_record(path, protocol))


def squeezenet_frames(network: SqueezeNet, path: Path | None = None, *, batch_size: int = 32) -> ClipNetwork:
    """SqueezeNet's pooled last Fire module of every frame: the stand-in, never called by another name.

    Args:
        path: Where the weights are from, for the record.
    """

    @torch.no_grad()
    def features(clips: Tensor) -> Tensor:
        frames = rearrange(from_uint8(clips), "n c f h w -> (n f) c h w")
        return rearrange(network.pooled(frames), "(n f) d -> n f d", n=len(clips))

    protocol = "SqueezeNet 1.0, last Fire module averaged over the image, frames at their own size; one vector a frame"
    record = {"protocol": protocol} if path is None else file_record(path, protocol)
    return ClipNetwork(extract=_batched(features, batch_size), record=record)


def _require(path: Path, module: torch.jit.ScriptModule, names: tuple[str, ...], kind: str) -> None:
    found = argument_names(module)
    missing = [name for name in names if name not in found]
    if missing:
        raise TrainingError(
            f"{path} is not {kind}: its forward takes ({', '.join(found)}), and lacks {', '.join(missing)}"
        )


@torch.no_grad()
def _run(path: Path, call: Callable[[], Any], count: int) -> Tensor:
    """Call a foreign network and check what comes out: (count, d), finite. Returns (count, 1, d) float32."""
    try:
        result = call()
    except RuntimeError as error:
        raise TrainingError(f"{path} does not take these clips: {str(error).strip().splitlines()[-1]}") from error
    if not isinstance(result, Tensor) or result.ndim != 2 or len(result) != count or result.shape[1] < 2:
        shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise TrainingError(f"{path} must return ({count}, features), it returned {shape}")
    values = result.float()
    if not bool(values.isfinite().all()):
        raise TrainingError(f"{path} returned values that are not finite")
    checked: Tensor = values[:, None]
    return checked


def _batched(extract: Callable[[Tensor], Tensor], batch_size: int) -> Callable[[UInt8[Tensor, "n f h w 3"]], Tensor]:
    known = WeakIdKeyDictionary()  # several figures ask for the same of the same clips, which takes minutes on a CPU

    def whole(clips: Tensor) -> Tensor:
        if clips not in known:
            with torch.no_grad():
                rows = index_batches(len(clips), batch_size, clips.device)
                known[clips] = torch.cat([extract(clips[batch]) for batch in rows])
        features: Tensor = known[clips]
        return features

    return whole
