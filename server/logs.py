"""What every process logs, and in which form: one line an event on standard error, as text or as a JSON object.

Every line carries what it belongs to (request, job, tenant) as far as that is known where it is written. What callers
wrote (prompts, bodies, file names) is never logged; keys and passwords that come along in messages of foreign code are
struck out.
"""

import json
import logging
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

__all__ = ["JsonFormatter", "TextFormatter", "bound", "configure_logging", "current", "note", "without_secrets"]

_context: ContextVar[dict[str, str]] = ContextVar("medsora_log_context")
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_SECRETS = (
    (re.compile(r"medsora_([0-9a-f]{16})_[0-9a-f]{16,}"), r"medsora_\1_***"),
    (re.compile(r"whsec_[A-Za-z0-9+/=_-]+"), "whsec_***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[^\s\"'\\]+"), r"\1 ***"),
    (re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s\"'@\\]*@"), r"\1***@"),
    # PostgreSQL shows the row that it would not take
    (re.compile(r"DETAIL:[^\n\\]*"), "DETAIL: ***"),
)


@contextmanager
def bound(**fields: str | None) -> Iterator[None]:
    """Let every line that is logged within the block carry these fields; None is left out.

    Threads that are started with a copy of the context, as those of endpoints are, belong to it.
    """
    token = _context.set({**current(), **{name: value for name, value in fields.items() if value is not None}})
    try:
        yield
    finally:
        _context.reset(token)


def note(**fields: str | None) -> None:
    """Let the lines that follow within the innermost :func:`bound` carry these fields, too, in all of its threads."""
    _context.get({}).update({name: value for name, value in fields.items() if value is not None})


def current() -> Mapping[str, str]:
    """The fields that a line would carry now."""
    return _context.get({})


def without_secrets(text: str) -> str:
    """A text in which keys, secrets and passwords of addresses are struck out."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class TextFormatter(logging.Formatter):
    """For people: time, level, process, logger, message, and what it belongs to."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """One event; an exception follows on lines of its own."""
        return without_secrets(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without the exception."""
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        return super().formatMessage(record) + (f" [{fields}]" if fields else "")


class JsonFormatter(logging.Formatter):
    """For machines: one JSON object a line.

    Args:
        part: Of the server: serve, api, reaper or worker.
    """

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        """One event."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "logger": record.name,
            "part": self._part,
            "process": record.process,
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        # Struck out before it is written as JSON: afterwards a quote in a secret has another form.
        return json.dumps({name: _clean(value) for name, value in line.items()}, ensure_ascii=False, default=str)


def configure_logging(level: str, form: str = "text", *, part: str) -> None:
    """Log to standard error, warnings and errors that nobody has caught included.

    Args:
        level: Least level, as ``Settings.log_level``.
        form: text or json, as ``Settings.log_format``.
        part: Of the server: serve, api, reaper or worker.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(part) if form == "json" else TextFormatter())
    root = logging.getLogger()
    for other in [one for one in root.handlers if type(one) is logging.StreamHandler]:
        root.removeHandler(other)  # this may be called again, with other settings
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_of_thread


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    # "data" is what Celery adds to its lines: arguments of tasks
    extra = {name: value for name, value in record.__dict__.items() if name not in _STANDARD and name != "data"}
    return {**current(), **extra}


def _clean(value: Any) -> Any:
    return without_secrets(value) if isinstance(value, str) else value


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    logging.getLogger("server").critical("uncaught", exc_info=(kind, error, traceback))


def _log_uncaught_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        exc_info = (args.exc_type, args.exc_value, args.exc_traceback)
        logging.getLogger("server").critical("uncaught in a thread", exc_info=exc_info)
