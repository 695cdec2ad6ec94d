"""/v1/files: OpenAI's file contract, as far as batches need it."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from server.api.dependencies import ServicesDep, TenantDep
from server.api.downloads import send_object
from server.api.fields import check_fields
from server.api.openapi import error_responses, links
from server.api.schemas import DeletedFile, FileList, FileObject
from server.api.uploads import receive_upload
from server.errors import NotFoundError, UnavailableError
from server.storage import StorageFullError

__all__ = ["ExpiresAfter", "router"]

router = APIRouter(prefix="/v1/files", tags=["files"])

LEAST_LIFE_S, LONGEST_LIFE_S = 3600, 30 * 86_400


class ExpiresAfter(BaseModel):
    """When a file goes by itself."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"] = Field(description="What the seconds are counted from: creation of the file.")
    seconds: int = Field(ge=LEAST_LIFE_S, le=LONGEST_LIFE_S, description="1 hour to 30 days.")


_UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "dependentRequired": {
                        "expires_after[anchor]": ["expires_after[seconds]"],
                        "expires_after[seconds]": ["expires_after[anchor]"],
                    },
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "The bytes, with a filename."},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": LEAST_LIFE_S,
                            "maximum": LONGEST_LIFE_S,
                        },
                    },
                }
            }
        },
    }
}


class _UploadFields(BaseModel):
    purpose: str
    expires_after: ExpiresAfter | None = None


@router.post(
    "",
    openapi_extra=_UPLOAD_BODY,
    responses={
        **links("file_id", "get_file", "get_file_content", "delete_file"),
        **error_responses(400, 413, 415, 503),
    },
)
async def create_file(request: Request, services: ServicesDep, tenant: TenantDep) -> FileObject:
    """Upload a file: the lines of a batch."""
    files = services.files
    upload = await run_in_threadpool(files.begin)
    try:
        with upload:
            form = await receive_upload(request, upload, max_bytes=services.settings.max_file_bytes)
            given: dict[str, Any] = {}
            for name, text in form.fields.items():
                base, bracket, key = name.partition("[")
                if bracket:
                    given.setdefault(base, {})[key.removesuffix("]")] = text
                else:
                    given[base] = text
            fields = check_fields(_UploadFields, given)
            file = await run_in_threadpool(
                files.accept,
                upload,
                tenant=tenant,
                purpose=fields.purpose,
                filename=form.filename or "upload",
                expires_after_s=None if fields.expires_after is None else fields.expires_after.seconds,
            )
    except StorageFullError:
        message = "There is too little free disk space to take the file."
        raise UnavailableError(message, code="storage_full", retry_after_ms=10_000) from None
    return FileObject.of(file)


@router.get("", responses=error_responses(400, 503))
def list_files(
    services: ServicesDep,
    tenant: TenantDep,
    purpose: Annotated[str | None, Query(max_length=80, description="Only files for this purpose.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Most files of this page.")] = 1000,
    after: Annotated[str | None, Query(max_length=100, description="Id of the last file of the page before.")] = None,
    order: Annotated[Literal["asc", "desc"], Query(description="By time of creation; desc: newest first.")] = "desc",
) -> FileList:
    """List files, a page at a time."""
    page = services.files.list(
        tenant, purpose=purpose or None, limit=limit, after=after or None, newest_first=order == "desc"
    )
    data = [FileObject.of(file) for file in page.files]
    return FileList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


@router.get("/{file_id}", responses=error_responses(404, 503))
def get_file(file_id: str, services: ServicesDep, tenant: TenantDep) -> FileObject:
    """Describe a file."""
    return FileObject.of(services.files.get(tenant, file_id))


@router.delete("/{file_id}", responses=error_responses(404, 503))
def delete_file(file_id: str, services: ServicesDep, tenant: TenantDep) -> DeletedFile:
    """Remove a file. A batch that reads it goes on."""
    services.files.delete(tenant, file_id)
    return DeletedFile(id=file_id)


@router.get(
    "/{file_id}/content",
    response_class=FileResponse,
    responses={
        200: {"content": {"application/jsonl": {}}, "description": "The bytes."},
        206: {"description": "The asked-for bytes of it."},
        304: {"description": "The file is the one that the client has."},
        307: {"description": "It is at another address for a while, where the server keeps files in a bucket."},
        **error_responses(404, 416, 503),
    },
)
def get_file_content(file_id: str, request: Request, services: ServicesDep, tenant: TenantDep) -> Response:
    """Download a file, whole or a range of the bytes."""
    file = services.files.get(tenant, file_id)
    try:
        return send_object(
            request,
            *services.files.origin(file),
            etag=f'"{file.sha256}"',
            media_type="application/jsonl",
            filename=file.filename,
            headers={"x-content-type-options": "nosniff"},
        )
    except FileNotFoundError:
        message = f"The bytes of the file {file_id} are missing on the server."
        raise NotFoundError(message, code="content_missing", param="file_id") from None
