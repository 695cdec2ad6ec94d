"""CLIP's image encoder (the ViT ones), from the two files in which it is published.

OpenAI's ``ViT-B-32.pt`` and the like are TorchScript archives, of which only the tensors are used. Hugging Face's
``model.safetensors`` holds the same tensors under other names. Architecture: Radford et al., arXiv 2103.00020, and
Dosovitskiy et al., arXiv 2010.11929, with pre-normalisation, a norm before the blocks, and x * sigmoid(1.702 x).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from training.errors import TrainingError
from training.evaluation.torchscript import load_torchscript

__all__ = ["ClipVision", "load_clip_vision"]

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_SIZE = 64
"""Channels of an attention head in every published size."""
HF_NAMES = (
    (r"vision_model\.embeddings\.class_embedding", "class_embedding"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "conv1.weight"),
    (r"vision_model\.pre_layrnorm\.", "ln_pre."),  # spelt so in the files
    (r"vision_model\.post_layernorm\.", "ln_post."),
    (r"vision_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


class Attention(nn.Module):
    """Multi-head self-attention; parameter names of the published files."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = rearrange(packed, "n s (three k e) -> three n k s e", three=3, e=HEAD_SIZE)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out_proj(rearrange(mixed, "n k s e -> n s (k e)"))
        return out


class Block(nn.Module):
    """Attention and a two-layer perceptron, each added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        hidden = self.mlp["c_fc"](self.ln_2(x))
        out: Tensor = x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))
        return out


class ClipVision(nn.Module):
    """Images to embeddings; frozen, in evaluation mode."""

    mean: Tensor
    std: Tensor

    def __init__(self, *, width: int, depth: int, patch_size: int, grid: int, out_size: int) -> None:
        super().__init__()
        self.image_size = patch_size * grid
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block(width) for _ in range(depth))})
        self.proj = nn.Parameter(torch.empty(width, out_size))
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD)[:, None, None], persistent=False)

    def prepare(self, frames: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 s s"]:
        """Frames in [-1, 1] as CLIP wants them: shorter side resized (bicubic), centre cropped, normalised."""
        height, width = frames.shape[-2:]
        scale = self.image_size / min(height, width)
        size = (round(height * scale), round(width * scale))
        images = F.interpolate((frames + 1) / 2, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - self.image_size) // 2, (size[1] - self.image_size) // 2
        cropped = images[..., top : top + self.image_size, left : left + self.image_size]
        return (cropped - self.mean) / self.std

    def forward(self, frames: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Embeddings of frames in [-1, 1], not normalised."""
        x = rearrange(self.conv1(self.prepare(frames)), "n c h w -> n (h w) c")
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in cast(nn.ModuleList, self.transformer["resblocks"]):
            x = block(x)
        out: Tensor = self.ln_post(x[:, 0]) @ self.proj
        return out


def load_clip_vision(path: Path, *, device: torch.device | str = "cpu") -> ClipVision:
    """Build the encoder from a published file, in float32, frozen. Its sizes are read off the tensors.

    Args:
        path: ``.safetensors`` in Hugging Face's names, or OpenAI's TorchScript archive.

    Raises:
        TrainingError: Unreadable, or no ViT CLIP (the ResNet ones have other layers).
    """
    try:
        tensors: Mapping[str, Tensor] = (
            load_file(path) if path.suffix == ".safetensors" else load_torchscript(path).state_dict()
        )
    except TrainingError:
        raise
    except Exception as error:  # safetensors raises its own type, the system others
        raise TrainingError(f"CLIP weights {path} cannot be read: {error}") from error
    weights = _openai_names(tensors)
    try:
        width, _, patch_size, _ = weights["conv1.weight"].shape
        depth = len({name.split(".")[2] for name in weights if name.startswith("transformer.resblocks.")})
        network = ClipVision(
            width=width,
            depth=depth,
            patch_size=patch_size,
            grid=round((weights["positional_embedding"].shape[0] - 1) ** 0.5),
            out_size=weights["proj"].shape[1],
        )
        network.load_state_dict({name: value.float() for name, value in weights.items()})
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"{path} holds no CLIP image encoder of the ViT kind, in OpenAI's or Hugging Face's names: {reason}"
        ) from error
    return network.to(device).eval().requires_grad_(False)


def _openai_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image encoder's tensors in OpenAI's names, without ``visual.`` before them; other tensors are left out."""
    if any(name.startswith("visual.") for name in tensors):
        return {name.removeprefix("visual."): value for name, value in tensors.items() if name.startswith("visual.")}
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name == "visual_projection.weight":
            found["proj"] = value.T
        if not name.startswith("vision_model.") or name.endswith(".position_ids"):
            continue
        for pattern, replacement in HF_NAMES:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    for name in [name for name in found if ".self_attn.q_proj." in name]:
        parts = [found.pop(name.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"]
        found[re.sub(r"\.self_attn\.q_proj\.", ".attn.in_proj_", name)] = torch.cat(parts)
    return found
