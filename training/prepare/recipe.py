"""A recipe for prepared data: conditions, data set and frame size are those of the cache. Torch-free."""

from collections.abc import Sequence
from dataclasses import replace

from medsora.config import ModelConfig
from training.config import TrainConfig
from training.errors import DataError
from training.prepare.cache import CacheIndex

__all__ = ["fit_recipe"]


def fit_recipe(
    config: TrainConfig, index: CacheIndex, *, excluded_labels: Sequence[str] = ()
) -> tuple[TrainConfig, str]:
    """Make a recipe fit a cache, and say in a line how.

    A recipe that was written for the cache's data set, and whose conditions have all of the cache's values, keeps
    its conditions; so a cache of the data that the shipped checkpoint was trained on can go on with it. Else every
    condition of the cache becomes one of the model, with the values that the cache has.

    Args:
        excluded_labels: Values that are no class.

    Raises:
        DataError: Nothing is left when these are excluded.
    """
    excluded = set(excluded_labels)
    values = {
        name: tuple(value for value in known if value not in excluded) for name, known in index.conditions.items()
    }
    empty = [name for name, known in values.items() if not known]
    if empty:
        raise DataError(f"data.excluded_labels leaves no value of {empty[0]}: {', '.join(index.conditions[empty[0]])}")
    names, columns = config.model.condition_names, config.data.condition_columns
    is_own = config.data.dataset == index.dataset and all(
        column in values and set(values[column]) - set(config.data.excluded_labels) <= set(names[name])
        for name, column in columns.items()
    )
    if is_own:
        data = replace(config.data, height=index.height, width=index.width)
        return replace(config, data=data), f"recipe {config.recipe} fits the data set {index.dataset}: as it is"
    model = ModelConfig(
        autoencoder=config.model.autoencoder,
        denoiser=replace(config.model.denoiser, condition_sizes=tuple(len(known) for known in values.values())),
        condition_names=values,
    )
    data = replace(
        config.data,
        dataset=index.dataset,
        excluded_labels=tuple(excluded_labels),
        condition_columns={name: name for name in values},
        height=index.height,
        width=index.width,
        modality=index.modality,
    )
    shown = "; ".join(f"{name}: {_some(known)}" for name, known in values.items())
    said = (
        f"recipe {config.recipe} takes from the cache: data set {index.dataset}, {index.width}x{index.height} pixels, "
        f"conditions {shown}"
    )
    return replace(config, model=model, data=data), said


def _some(values: Sequence[str]) -> str:
    return ", ".join(values[:8]) + (f", ... ({len(values)})" if len(values) > 8 else "")
