"""/v1/models: the served checkpoints, their labels and limits."""

from fastapi import APIRouter

from server.api.dependencies import ServicesDep
from server.api.schemas import ErrorEnvelope, ModelList, ModelObject
from server.errors import NotFoundError

__all__ = ["router"]

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(services: ServicesDep) -> ModelList:
    """List all models, the default first."""
    default = services.catalogue.default
    return ModelList(data=[ModelObject.of(one, is_default=one is default) for one in services.catalogue])


@router.get("/{model_id}", responses={404: {"model": ErrorEnvelope}})
def get_model(model_id: str, services: ServicesDep) -> ModelObject:
    """Describe one model."""
    checkpoint = services.catalogue.get(model_id)
    if checkpoint is None:
        known = ", ".join(services.catalogue.names)
        raise NotFoundError(
            f"There is no model {model_id[:80]!r}; known: {known}", code="model_not_found", param="model"
        )
    return ModelObject.of(checkpoint, is_default=checkpoint is services.catalogue.default)
