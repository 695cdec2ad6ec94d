"""``medsora-server keys``: make, list and revoke keys, and limit tenants. Needs the database alone, and no server."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from server.jobs.database import Database
    from server.settings import Settings

__all__ = ["app"]

app = typer.Typer(
    help="Make, list and revoke the keys by which callers are known, and limit what tenants may have. Works on the "
    "database, whether a server runs or not, and holds at once.",
    no_args_is_help=True,
)

DataOption = Annotated[Path | None, typer.Option(help="Folder of all data (MEDSORA_DATA_DIR, ./medsora-data).")]
_LIFE = re.compile(r"([1-9][0-9]{0,5})([hd])")
_UNITS_S = {"h": 3600, "d": 86_400}


@app.command()
def create(
    name: Annotated[str, typer.Option(help="What it is used for, at most 200 characters.")],
    tenant: Annotated[
        str, typer.Option(help="Whose it is: whoever has a key of the same tenant sees the same objects.")
    ] = "default",
    scope: Annotated[
        list[str] | None, typer.Option(help="What it is good for; repeatable; left out: everything.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="Its life, such as 12h or 90d; left out: for ever.")] = None,
    data_dir: DataOption = None,
) -> None:
    """Make a key and print it: this once, for it is kept as a hash alone."""
    from server.keys.model import Scope, is_tenant
    from server.keys.repository import KeyRepository

    if not is_tenant(tenant):
        _fail(f"--tenant: {tenant!r} does not do; allowed: 1 to 63 of a-z, 0-9, '.', '_', '-', the first of a-z, 0-9")
    if not name.strip() or len(name) > 200 or not name.isprintable():
        _fail("--name: must be 1 to 200 printable characters")
    unknown = [one for one in scope or () if one not in set(Scope)]
    if unknown:
        _fail(f"--scope: there is no {unknown[0]!r}; allowed: {', '.join(Scope)}")
    life = None if expires is None else _LIFE.fullmatch(expires)
    if expires is not None and life is None:
        _fail(f"--expires: {expires!r} does not do; allowed: a number of hours or days, such as 12h or 90d")
    with _database(data_dir) as database:
        key, text = KeyRepository(database).create(
            tenant=tenant,
            name=name,
            scopes=frozenset(Scope(one) for one in scope) if scope else frozenset(Scope),
            expires_after_s=None if life is None else int(life[1]) * _UNITS_S[life[2]],
        )
    end = "for ever" if key.expires_at is None else f"until {_date(key.expires_at)}"
    typer.echo(f"{key.id} of tenant {key.tenant}, good {end}. Keep it now, it cannot be shown again:", err=True)
    typer.echo(text)


@app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Of this tenant alone.")] = None, data_dir: DataOption = None
) -> None:
    """List all keys, oldest first, without the keys themselves."""
    from server.keys.model import ALL_SCOPES
    from server.keys.repository import KeyRepository

    with _database(data_dir) as database:
        keys = KeyRepository(database).list(tenant=tenant)
    rows = [("ID", "TENANT", "STATE", "CREATED", "EXPIRES", "SCOPES", "NAME")]
    for key in keys:
        expires = "-" if key.expires_at is None else _date(key.expires_at)
        scopes = "all" if key.scopes == ALL_SCOPES else ",".join(sorted(key.scopes))
        rows.append((key.id, key.tenant, key.state.value, _date(key.created_at), expires, scopes, key.name))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="Id of the key, key_...; `keys list` shows it.")],
    data_dir: DataOption = None,
) -> None:
    """Let a key be good for nothing, from the next request on. What was made with it stays."""
    from server.keys.repository import KeyRepository

    with _database(data_dir) as database:
        key = KeyRepository(database).revoke(key_id)
    if key is None:
        _fail(f"there is no key {key_id!r}; `medsora-server keys list` shows all")
    typer.echo(f"{key.id} of tenant {key.tenant} is revoked.")


@app.command()
def limits(
    tenant: Annotated[str, typer.Argument(help="Whose.")],
    clips_per_day: Annotated[int | None, typer.Option(min=0, help="Clips that may be asked for a day (UTC).")] = None,
    megapixel_frames_per_day: Annotated[
        float | None, typer.Option(min=0, help="Width x height x frames / 1e6, summed over the clips of a day (UTC).")
    ] = None,
    queued_jobs: Annotated[int | None, typer.Option(min=0, help="Jobs that may wait at once.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=0, help="Requests to the API.")] = None,
    reset: Annotated[bool, typer.Option("--reset", help="First forget the tenant's own limits.")] = False,
    data_dir: DataOption = None,
) -> None:
    """Show what a tenant has used today and may use, after giving it limits of its own where some are named.

    What is not named is as for all tenants (MEDSORA_TENANT_...), which are unlimited by default.
    """
    from server.keys.limits import Limits, TenantLimits
    from server.keys.model import is_tenant

    if not is_tenant(tenant):
        _fail(f"{tenant!r} is no name of a tenant")
    named = {
        "clips_per_day": clips_per_day,
        "megapixel_frames_per_day": megapixel_frames_per_day,
        "queued_jobs": queued_jobs,
        "requests_per_minute": requests_per_minute,
    }
    changes = {name: value for name, value in named.items() if reset or value is not None}
    with _database(data_dir) as database:
        tenants = TenantLimits(database, Limits.of(_load(data_dir)))
        if changes:
            tenants.change(tenant, changes)
        usage = tenants.usage(tenant)
    used = {
        "clips_per_day": usage.clips,
        "megapixel_frames_per_day": usage.megapixel_frames,
        "queued_jobs": usage.queued_jobs,
    }
    for name in named:
        limit = getattr(usage.limits, name)
        of = "unlimited" if limit is None else f"limit {limit:,g}"
        now = f"{used[name]:,g} used, " if name in used else ""
        typer.echo(f"{name.replace('_', ' ')}: {now}{of}")


@contextmanager
def _database(data_dir: Path | None) -> "Iterator[Database]":
    from server.jobs.database import Database
    from server.jobs.schema import migrate

    database = Database(_load(data_dir).database_address)
    try:
        migrate(database)
        yield database
    finally:
        database.close()


def _load(data_dir: Path | None) -> "Settings":
    from server.settings import SettingsError, load_settings

    try:
        return load_settings(data_dir=data_dir)
    except SettingsError as error:
        _fail(str(error))


def _date(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _fail(message: str) -> NoReturn:
    typer.echo(f"medsora-server: {message}", err=True)
    raise typer.Exit(2)
