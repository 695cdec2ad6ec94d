"""A recipe for prepared data: conditions of the cache, unless it is the recipe's own data set."""

import dataclasses

import pytest

from training.config import override
from training.errors import DataError
from training.prepare.cache import CacheIndex
from training.prepare.recipe import fit_recipe
from training.recipes import recipe

INDEX = CacheIndex(
    format="medsora-cache",
    format_version=1,
    dataset="colon",
    modality="ES",
    height=64,
    width=96,
    conditions={"label": ("adenoma", "serrated"), "light": ("NBI", "WL")},
    clips=(),
    shards={},
    settings={},
)


@pytest.mark.parametrize("name", ["autoencoder_tiny", "denoiser_small"])
def test_conditions_and_size_are_the_caches(name: str) -> None:
    config, said = fit_recipe(recipe(name), INDEX)
    assert config.model.condition_names == INDEX.conditions
    assert config.model.denoiser.condition_sizes == (2, 2)
    assert config.data.condition_columns == {"label": "label", "light": "light"}
    assert (config.data.dataset, config.data.width, config.data.height) == ("colon", 96, 64)
    assert config.data.modality == "ES"
    assert config.loop == recipe(name).loop
    assert "data set colon, 96x64 pixels, conditions label: adenoma, serrated; light: NBI, WL" in said
    assert override(config, ["data.target_fps=4"]).data.target_fps == 4


def test_a_cache_of_the_recipes_own_data_keeps_its_conditions() -> None:
    own = dataclasses.replace(
        INDEX,
        dataset="lung_ultrasound",
        conditions={"label": ("covid", "regular", "uncertain"), "probe": ("convex",)},
    )
    config, said = fit_recipe(recipe("denoiser_small"), own)
    assert config.model == recipe("denoiser_small").model
    assert config.data.condition_columns == {"finding": "label", "probe": "probe"}
    assert (config.data.width, config.data.height) == (96, 64)
    assert "as it is" in said
    more = dataclasses.replace(own, conditions=own.conditions | {"label": ("covid", "effusion")})
    assert fit_recipe(recipe("denoiser_small"), more)[0].model.condition_names["label"] == ("covid", "effusion")


def test_excluded_labels_are_no_classes() -> None:
    config, _ = fit_recipe(recipe("denoiser_tiny"), INDEX, excluded_labels=("serrated",))
    assert config.model.condition_names["label"] == ("adenoma",)
    assert config.data.excluded_labels == ("serrated",)
    with pytest.raises(DataError, match=r"data\.excluded_labels leaves no value of light: NBI, WL"):
        fit_recipe(recipe("denoiser_tiny"), INDEX, excluded_labels=("NBI", "WL"))
