"""What tests on a GPU share."""

import inspect
from collections.abc import Iterator

import jaxtyping
import pytest

from medsora.ops import MixerWeights, Walks


@pytest.fixture(scope="module")
def no_shape_checks() -> Iterator[None]:
    """Without the checks that other tests run with: the compiler fails at them, or leaves graphs in pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        patch.setattr(MixerWeights, "__init__", inspect.unwrap(MixerWeights.__init__))
        for owner in (MixerWeights, Walks):
            for name, value in list(vars(owner).items()):
                if isinstance(value, property):
                    patch.setattr(owner, name, property(inspect.unwrap(value.fget)))
        yield
