"""/v1/usage: what the caller has used today, and may use."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from server.api.dependencies import ServicesDep, TenantDep
from server.api.openapi import error_responses

__all__ = ["router"]

router = APIRouter(prefix="/v1/usage", tags=["usage"])


class UsedOf(BaseModel):
    """How much of something is used."""

    used: float
    limit: float | None = Field(description="null: any amount.")


class UsageObject(BaseModel):
    """What the caller has used, and may use."""

    object: Literal["usage"] = "usage"
    tenant: str
    clips_per_day: UsedOf
    megapixel_frames_per_day: UsedOf = Field(description="Width x height x frames / 1e6, summed over the day's clips.")
    queued_jobs: UsedOf
    requests_per_minute: int | None = Field(description="null: any number.")
    resets_at: int = Field(description="End of the day (UTC), in Unix seconds.")


@router.get("", responses=error_responses(503))
def get_usage(services: ServicesDep, tenant: TenantDep) -> UsageObject:
    """What was accepted of the caller's tenant today (UTC), what of it waits, and how much may."""
    usage = services.limits.usage(tenant)
    limits = usage.limits
    return UsageObject(
        tenant=tenant,
        clips_per_day=UsedOf(used=usage.clips, limit=limits.clips_per_day),
        megapixel_frames_per_day=UsedOf(used=usage.megapixel_frames, limit=limits.megapixel_frames_per_day),
        queued_jobs=UsedOf(used=usage.queued_jobs, limit=limits.queued_jobs),
        requests_per_minute=limits.requests_per_minute,
        resets_at=round(usage.resets_at),
    )
