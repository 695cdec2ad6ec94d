"""CLIP's encoder from both published layouts, against one built of torch's own attention."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training.errors import TrainingError
from training.evaluation.clip_vision import IMAGE_MEAN, IMAGE_STD, load_clip_vision

WIDTH, DEPTH, PATCH, GRID, OUT = 128, 2, 4, 3, 10


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ReferenceBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, WIDTH // 64, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(WIDTH, 4 * WIDTH), gelu=QuickGelu(), c_proj=nn.Linear(4 * WIDTH, WIDTH))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class ReferenceVisual(nn.Module):
    """The published encoder's parameters under the published names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(GRID**2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*[ReferenceBlock() for _ in range(DEPTH)])})
        self.proj = nn.Parameter(torch.randn(WIDTH, OUT))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, WIDTH), x], dim=1) + self.positional_embedding
        x = self.transformer["resblocks"](self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class Archive(nn.Module):
    """Holds tensors as OpenAI's archive does; what it computes does not matter, for it is not run."""

    def __init__(self, visual: ReferenceVisual) -> None:
        super().__init__()
        self.visual = Holder(visual.state_dict())
        self.token_embedding = nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Holder(nn.Module):
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        children: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            head, _, rest = name.partition(".")
            if rest:
                children.setdefault(head, {})[rest] = value
            else:
                self.register_buffer(head, value.half())
        for name, content in children.items():
            self.add_module(name, Holder(content))

    def forward(self, x: Tensor) -> Tensor:
        return x


def hugging_face(visual: ReferenceVisual) -> dict[str, Tensor]:
    """The tensors under the names of a Hugging Face checkpoint, written out by hand."""
    p = visual.state_dict()
    root, found = "vision_model", {}
    found[f"{root}.embeddings.class_embedding"] = p["class_embedding"]
    found[f"{root}.embeddings.patch_embedding.weight"] = p["conv1.weight"]
    found[f"{root}.embeddings.position_embedding.weight"] = p["positional_embedding"]
    found[f"{root}.embeddings.position_ids"] = torch.arange(GRID**2 + 1)[None]
    found["visual_projection.weight"] = p["proj"].T.contiguous()
    found["text_model.final_layer_norm.weight"] = torch.ones(3)
    for kind in ("weight", "bias"):
        found[f"{root}.pre_layrnorm.{kind}"] = p[f"ln_pre.{kind}"]
        found[f"{root}.post_layernorm.{kind}"] = p[f"ln_post.{kind}"]
        for n in range(DEPTH):
            layer, block = f"{root}.encoder.layers.{n}", f"transformer.resblocks.{n}"
            parts = p[f"{block}.attn.in_proj_{kind}"].chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                found[f"{layer}.self_attn.{letter}_proj.{kind}"] = part.contiguous()
            found[f"{layer}.self_attn.out_proj.{kind}"] = p[f"{block}.attn.out_proj.{kind}"]
            found[f"{layer}.layer_norm1.{kind}"] = p[f"{block}.ln_1.{kind}"]
            found[f"{layer}.layer_norm2.{kind}"] = p[f"{block}.ln_2.{kind}"]
            found[f"{layer}.mlp.fc1.{kind}"] = p[f"{block}.mlp.c_fc.{kind}"]
            found[f"{layer}.mlp.fc2.{kind}"] = p[f"{block}.mlp.c_proj.{kind}"]
    return found


@pytest.fixture
def visual() -> ReferenceVisual:
    return ReferenceVisual().eval().requires_grad_(False)


def expected(visual: ReferenceVisual, frames: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return visual(((frames + 1) / 2 - mean) / std)


def test_hugging_faces_file_gives_the_published_encoder(visual: ReferenceVisual, tmp_path: Path) -> None:
    save_file(hugging_face(visual), tmp_path / "model.safetensors")
    network = load_clip_vision(tmp_path / "model.safetensors")
    frames = torch.rand(5, 3, PATCH * GRID, PATCH * GRID) * 2 - 1
    torch.testing.assert_close(network(frames), expected(visual, frames), rtol=1e-4, atol=1e-4)


def test_openais_archive_gives_the_same(visual: ReferenceVisual, save_script: Callable[[nn.Module, str], Path]) -> None:
    rounded = ReferenceVisual()
    rounded.load_state_dict({name: value.half().float() for name, value in visual.state_dict().items()})
    network = load_clip_vision(save_script(Archive(visual), "ViT-tiny.pt"))
    frames = torch.rand(2, 3, PATCH * GRID, PATCH * GRID) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(network(frames), expected(rounded, frames), rtol=1e-4, atol=1e-4)


def test_images_are_resized_and_cut_in_the_middle(visual: ReferenceVisual, tmp_path: Path) -> None:
    save_file(hugging_face(visual), tmp_path / "model.safetensors")
    network = load_clip_vision(tmp_path / "model.safetensors")
    wide = torch.full((1, 3, 24, 72), -1.0)
    wide[..., 24:48] = 1
    shown = network.prepare(wide)
    assert shown.shape == (1, 3, 12, 12)
    white = (1 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    torch.testing.assert_close(shown[0, :, 6, 6], white)
    assert torch.allclose(shown[0, :, :, 2:10], white[:, None, None], atol=0.05)  # no black side is left


def test_another_network_is_refused(tmp_path: Path) -> None:
    save_file({"visual.layer1.0.conv1.weight": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    with pytest.raises(TrainingError, match="no CLIP image encoder of the ViT kind"):
        load_clip_vision(tmp_path / "resnet.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="cannot be read"):
        load_clip_vision(tmp_path / "broken.safetensors")
