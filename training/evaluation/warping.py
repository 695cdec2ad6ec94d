"""Flow warping error: what changes from frame to frame beyond motion.

Each frame is laid over the one before along the optical flow between them; what still differs is new structure,
flicker or boiling speckle. Pixels that the motion hides or uncovers are left out, by the check that the flow there and
the flow back cancel. A clip that does not move has a low error whatever it shows: only values beside those of real
clips say something.

Sources: the error, Lai et al., arXiv 1808.00449; the check and its two constants, Ruder et al., arXiv
1604.08610 (after Sundaram et al. 2010). Differences: absolute, not squared, and in grey levels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from medsora.video_io import from_uint8
from training.data.clips import index_batches

__all__ = ["Flow", "visible_pixels", "warp", "warping_statistics"]

Flow = Callable[[Tensor, Tensor], Tensor]
"""First and second images (n 3 h w) in [-1, 1] to the flow (n 2 h w) in pixels, right and down."""
RELATIVE, ABSOLUTE = 0.01, 0.5
CLIPS_AT_ONCE = 4


def warp(image: Float[Tensor, "n c h w"], flow: Float[Tensor, "n 2 h w"]) -> Float[Tensor, "n c h w"]:
    """The image as seen from the pixels that ``flow`` starts from: its value at ``x + flow(x)``, bilinear.

    Outside of the image its border goes on.
    """
    height, width = image.shape[-2:]
    rows = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None] + flow[:, 1]
    columns = torch.arange(width, device=flow.device, dtype=flow.dtype)[None, :] + flow[:, 0]
    grid = torch.stack([(columns + 0.5) * 2 / width - 1, (rows + 0.5) * 2 / height - 1], dim=-1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


def visible_pixels(forward: Float[Tensor, "n 2 h w"], backward: Float[Tensor, "n 2 h w"]) -> Bool[Tensor, "n h w"]:
    """Pixels of the first image that are seen in the second too: inside it, and the way there and back ends near.

    Near: ``|there + back|^2 < 0.01 (|there|^2 + |back|^2) + 0.5`` in pixels.
    """
    height, width = forward.shape[-2:]
    back = warp(backward, forward)
    gap = (forward + back).square().sum(dim=1)
    allowed = RELATIVE * (forward.square().sum(dim=1) + back.square().sum(dim=1)) + ABSOLUTE
    rows = torch.arange(height, device=forward.device)[:, None] + forward[:, 1]
    columns = torch.arange(width, device=forward.device)[None, :] + forward[:, 0]
    inside = (rows >= 0) & (rows <= height - 1) & (columns >= 0) & (columns <= width - 1)
    return (gap < allowed) & inside


@torch.no_grad()
def warping_statistics(flow: Flow, clips: UInt8[Tensor, "n f h w 3"]) -> dict[str, Float[Tensor, " n"]]:
    """Warping error of each clip, with what it was measured on.

    Returns:
        ``warping_error``: mean absolute difference in grey levels (0 to 255) over the visible pixels of all
        neighbouring frames; NaN for a clip without any. ``visible_share``: of pixels. ``flow_px``: mean length of the
        flow over the visible pixels, in pixels a frame.
    """
    parts: dict[str, list[Tensor]] = {"warping_error": [], "visible_share": [], "flow_px": []}
    for rows in index_batches(len(clips), CLIPS_AT_ONCE, clips.device):
        video = from_uint8(clips[rows])
        first = rearrange(video[:, :, :-1], "n c f h w -> (n f) c h w")
        second = rearrange(video[:, :, 1:], "n c f h w -> (n f) c h w")
        there, back = flow(first, second).float(), flow(second, first).float()
        visible = visible_pixels(there, back)
        grey = 127.5 * (warp(second, there).mean(dim=1) - first.mean(dim=1)).abs()

        def over_visible(values: Tensor, visible: Tensor = visible, count: int = len(rows)) -> Tensor:
            summed = (values * visible).reshape(count, -1).sum(dim=1)
            return summed / visible.reshape(count, -1).sum(dim=1)

        parts["warping_error"].append(over_visible(grey))
        parts["visible_share"].append(visible.float().reshape(len(rows), -1).mean(dim=1))
        parts["flow_px"].append(over_visible(there.square().sum(dim=1).sqrt()))
    return {name: torch.cat(values).cpu() for name, values in parts.items()}
