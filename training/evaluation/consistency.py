"""Frame consistency: how alike neighbouring frames look to a feature network.

Higher is not better: a frozen picture has 1. What counts is the distance to the real clips' value.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["frame_consistency"]


def frame_consistency(features: Float[Tensor, "n f d"]) -> Float[Tensor, " n"]:
    """Mean cosine similarity of the features of neighbouring frames, for each clip.

    Args:
        features: Of each frame of n clips of at least two frames, from CLIP's image encoder (then this is the frame
            consistency of the text-to-video literature) or another network (then it needs that network's name).

    Source: Esser et al., arXiv 2302.03011, with CLIP's image embeddings.
    """
    if features.shape[1] < 2:
        raise ValueError(f"frame consistency needs clips of at least 2 frames, got {features.shape[1]}")
    similarity = F.cosine_similarity(features[:, 1:].double(), features[:, :-1].double(), dim=-1)
    return similarity.mean(dim=1)
