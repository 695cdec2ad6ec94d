"""Sends what is in the outbox: at least once, each message under one id, with growing pauses, to public addresses.

Any number of senders may run, and each may be killed at any moment: an attempt that is not settled in time is made
again.
"""

import asyncio
import logging
import random
import ssl
import threading
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress

import httpx
from sqlalchemy.exc import SQLAlchemyError

import medsora
from server.settings import Settings
from server.webhooks.addresses import RefusedAddressError, Target, check_url, resolve
from server.webhooks.repository import AT_ONCE_A_URL, DueDelivery, WebhookRepository
from server.webhooks.signature import sign

__all__ = ["WebhookSender", "retry_pause_s"]

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""For one attempt as a whole, the name's resolution included."""
_LEASE_S = 3 * TIMEOUT_S
_AT_ONCE = 32
_GROWTH, _LONGEST_PAUSE_S = 2.5, 8 * 3600.0
_GONE = 410


def retry_pause_s(attempt: int, *, first_s: float, most: int) -> float | None:
    """Seconds until the next attempt after attempt number ``attempt`` (from 1) failed; None: there is none.

    Grows by 2.5 up to 8 hours, and is drawn a quarter longer or shorter, so that many do not come back at once.
    """
    if attempt >= most:
        return None
    pause: float = min(first_s * _GROWTH ** (attempt - 1), _LONGEST_PAUSE_S)
    return pause * random.uniform(0.75, 1.25)  # nosec B311


class WebhookSender:
    """Looks into the outbox again and again.

    Args:
        settings: Pauses, number of attempts, and which hosts may be private.
        verify: Whose certificates are trusted; None: those of the certifi package.
    """

    def __init__(
        self, settings: Settings, repository: WebhookRepository, *, verify: ssl.SSLContext | None = None
    ) -> None:
        self._settings, self._repository = settings, repository
        self._verify = verify

    def run(self, stop: threading.Event) -> None:
        """Send until ``stop`` is set; attempts that are at work then are let go, and made again by whoever comes."""
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells addresses, which may hold a client's secret
        while not stop.is_set():
            try:
                asyncio.run(self._run(stop))
            except Exception:  # whatever it is, what waits is sent when it is over
                logger.exception("webhooks: the sender begins anew")
                stop.wait(1.0)

    async def _run(self, stop: threading.Event) -> None:
        at_work: dict[asyncio.Task[None], str] = {}
        # No proxy of the environment (it would resolve the name again), no redirects, no connection used twice.
        limits = httpx.Limits(max_keepalive_connections=0)
        verify = ssl.create_default_context() if self._verify is None else self._verify
        async with httpx.AsyncClient(
            verify=verify, trust_env=False, follow_redirects=False, limits=limits, timeout=TIMEOUT_S
        ) as client:
            while not stop.is_set():
                room = _AT_ONCE - len(at_work)
                due: list[DueDelivery] = []
                if room:
                    try:
                        counts = Counter(at_work.values())
                        busy = [url for url, count in counts.items() if count >= AT_ONCE_A_URL]
                        due = await asyncio.to_thread(
                            self._repository.claim_due,
                            limit=room,
                            lease_s=_LEASE_S,
                            max_attempts=self._settings.webhook_max_attempts,
                            busy=busy,
                        )
                    except SQLAlchemyError as error:
                        logger.warning("webhooks: the database does not answer: %s", type(error).__name__)
                for one in due:
                    task = asyncio.create_task(self._deliver(client, one))
                    at_work[task] = one.delivery.url
                    task.add_done_callback(at_work.pop)
                if not due:
                    await asyncio.to_thread(stop.wait, self._settings.webhook_interval_s)
            left = list(at_work)
            for task in left:
                task.cancel()
            for task in left:
                with suppress(asyncio.CancelledError):
                    await task

    async def _deliver(self, client: httpx.AsyncClient, due: DueDelivery) -> None:
        one = due.delivery
        status_code, problem = await self._attempt(client, due)
        pause_s = None
        if problem is not None and status_code != _GONE:
            settings = self._settings
            pause_s = retry_pause_s(
                one.attempts, first_s=settings.webhook_first_retry_s, most=settings.webhook_max_attempts
            )
        told = "delivered" if problem is None else f"not delivered: {problem}"
        logger.info("%s of %s, attempt %d: %s", one.id, one.subject, one.attempts, told)
        try:
            await asyncio.to_thread(
                self._repository.settle, due, status_code=status_code, problem=problem, retry_after_s=pause_s
            )
        except SQLAlchemyError as error:
            logger.warning("%s is sent again: what came of it cannot be written: %s", one.id, type(error).__name__)

    async def _attempt(self, client: httpx.AsyncClient, due: DueDelivery) -> tuple[int | None, str | None]:
        """Status and problem of one attempt; no problem: it was delivered."""
        private_hosts = self._settings.webhook_private_hosts
        if due.secret is None:
            return None, "the secret cannot be opened: it was sealed with a key that the server does not have now"
        try:
            async with asyncio.timeout(TIMEOUT_S):
                target = check_url(due.delivery.url, private_hosts=private_hosts)
                addresses = await resolve(target, private_hosts=private_hosts)
                status = await self._post(client, due, target, addresses)
        except RefusedAddressError as error:
            return None, f"the address {error}" if not str(error).startswith("the name") else str(error)
        except TimeoutError:
            return None, f"no answer within {TIMEOUT_S:g} s"
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OSError) as error:
            return None, type(error).__name__
        if 200 <= status < 300:
            return status, None
        return status, "answered with a redirect, which is not followed" if 300 <= status < 400 else "not a 2xx answer"

    async def _post(
        self, client: httpx.AsyncClient, due: DueDelivery, target: Target, addresses: Collection[str]
    ) -> int:
        """Send to the first address that takes a connection; returns the status."""
        assert due.secret is not None  # else there is no attempt
        headers = {
            "content-type": "application/json",
            "user-agent": f"MedSora-Server/{medsora.__version__}",
            "host": target.authority,
            # Of this server: receivers see the time of the attempt, and allow minutes of difference.
            **sign(due.secret, message_id=due.delivery.id, timestamp=int(time.time()), body=due.body),
        }
        problem: httpx.HTTPError | None = None
        for address in addresses:
            # To the address that was checked; name and certificate stay those of the host.
            url = httpx.URL(due.delivery.url).copy_with(host=address)
            request = client.build_request(
                "POST", url, headers=headers, content=due.body, extensions={"sni_hostname": target.host}
            )
            try:
                answer = await client.send(request, stream=True)
            except httpx.ConnectError as error:
                problem = error
                continue
            await answer.aclose()  # the body is not read
            return answer.status_code
        assert problem is not None  # there is at least one address
        raise problem
