"""The outbox and its sender: signed so that OpenAI's client agrees, at least once, and to nobody who is private."""

import http.server
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from certificates import Authority
from sqlalchemy import update

from server.jobs.database import Database, database_now
from server.jobs.repository import FinishedWork, JobRepository
from server.measures import read_measures
from server.sealing import Sealer
from server.settings import Settings
from server.webhooks import sender as sender_module
from server.webhooks.model import KINDS, Delivery, DeliveryState
from server.webhooks.repository import DELIVERIES, DeliveryRecord, WebhookRepository
from server.webhooks.sender import WebhookSender, retry_pause_s
from server.webhooks.signature import is_secret, new_secret, sign

AddJob = Callable[..., str]


class Receiver:
    """An HTTP server that keeps what it is sent and answers as it is told."""

    def __init__(self) -> None:
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        self.behave: Callable[[http.server.BaseHTTPRequestHandler], bool] = lambda handler: False
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.received.append(({name.lower(): value for name, value in self.headers.items()}, body))
                if receiver.behave(self):
                    return
                self.send_response(receiver.answers.pop(0) if receiver.answers else 204)
                self.send_header("location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook?x=1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def webhooks(database: Database, sealer: Sealer) -> WebhookRepository:
    return WebhookRepository(database, sealer)


def make_settings(folder: Path, **changes: Any) -> Settings:
    options: dict[str, Any] = {
        "webhook_private_hosts": ("127.0.0.1",),
        "webhook_interval_s": 0.02,
        "webhook_first_retry_s": 0.05,
        "webhook_max_attempts": 3,
    }
    return Settings(data_dir=folder, **{**options, **changes})


def run_sender(folder: Path, webhooks: WebhookRepository, until: Callable[[], Any], **changes: Any) -> None:
    """Run a sender until a condition holds."""
    stop = threading.Event()
    sender = WebhookSender(make_settings(folder, **changes), webhooks)
    thread = threading.Thread(target=sender.run, args=(stop,))
    thread.start()
    try:
        deadline = time.monotonic() + 15
        while not until():
            assert time.monotonic() < deadline, "it never came to be"
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join(15)
    assert not thread.is_alive()


@pytest.fixture
def send(webhooks: WebhookRepository, tmp_path: Path) -> Callable[..., None]:
    """A sender of these webhooks."""
    return partial(run_sender, tmp_path, webhooks)


def deliveries(webhooks: WebhookRepository, webhook_id: str, tenant: str = "default") -> list[DeliveryRecord]:
    page = webhooks.deliveries(tenant, webhook_id, limit=100, after=None)
    assert page is not None
    return page[0]


def states(webhooks: WebhookRepository, webhook_id: str) -> list[DeliveryState]:
    return [delivery.state for delivery in deliveries(webhooks, webhook_id)]


def finish(repository: JobRepository, job_id: str, work: Callable[[str, int], FinishedWork]) -> None:
    claim = repository.claim(job_id, worker="w")
    assert claim is not None
    assert repository.succeed(job_id, claim.token, work(job_id, claim.token))


def test_openai_client_verifies_what_is_sent(
    receiver: Receiver, webhooks: WebhookRepository, repository: JobRepository, add_job: AddJob,
    finished_work: Callable[[str, int], FinishedWork], send: Callable[..., None],
) -> None:  # fmt: skip
    webhook = webhooks.add("default", url=receiver.url, kinds=list(KINDS), most=9)
    job_id = add_job(prompt="secret words")
    finish(repository, job_id, finished_work)
    send(lambda: states(webhooks, webhook.id) == [DeliveryState.DELIVERED])
    ((headers, body),) = receiver.received
    client = openai.OpenAI(api_key="any", webhook_secret=webhook.secret)
    event = client.webhooks.unwrap(body, headers)
    assert (str(event.type), event.data.id) == ("video.completed", job_id)
    assert event.id.startswith("evt_")
    assert abs(event.created_at - time.time()) < 60
    assert headers["webhook-id"] == deliveries(webhooks, webhook.id)[0].id
    assert headers["host"] == f"127.0.0.1:{receiver.port}"
    assert b"secret" not in body
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body + b" ", headers)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, headers, secret=new_secret())
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, {**headers, "webhook-timestamp": str(int(time.time()) - 400)})


def test_address_of_a_request_has_its_own_secret(
    receiver: Receiver, database: Database, repository: JobRepository, add_job: AddJob, send: Callable[..., None]
) -> None:
    secret = new_secret()
    job_id = add_job(webhook_url=receiver.url, webhook_secret=secret)
    assert secret not in repr(repository.get(job_id))
    repository.request_cancel(job_id)
    send(lambda: receiver.received)
    ((headers, body),) = receiver.received
    event = openai.OpenAI(api_key="any").webhooks.unwrap(body, headers, secret=secret)
    assert str(event.type) == "video.failed"
    assert json.loads(body)["data"]["error"]["code"] == "cancelled"


def test_a_secret_that_cannot_be_opened_waits_for_its_key(
    tmp_path: Path, receiver: Receiver, database: Database, webhooks: WebhookRepository, repository: JobRepository,
    add_job: AddJob,
) -> None:  # fmt: skip
    webhook = webhooks.add("default", url=receiver.url, kinds=["video.failed"], most=1)
    repository.request_cancel(add_job())
    others = WebhookRepository(database, Sealer(Settings(data_dir=tmp_path / "other")))
    run_sender(tmp_path, others, lambda: deliveries(webhooks, webhook.id)[0].problem, webhook_first_retry_s=60.0)
    (delivery,) = deliveries(webhooks, webhook.id)
    assert "sealed with a key that the server does not have now" in str(delivery.problem)
    assert (delivery.state, receiver.received) == (DeliveryState.PENDING, [])


def test_outbox_is_written_with_what_it_tells_and_for_those_who_want_it(
    webhooks: WebhookRepository, repository: JobRepository, add_job: AddJob,
    finished_work: Callable[[str, int], FinishedWork],
) -> None:  # fmt: skip
    mine = webhooks.add("default", url="https://example.com/", kinds=["video.completed"], most=9)
    failures = webhooks.add("default", url="https://example.com/", kinds=["video.failed"], most=9)
    others = webhooks.add("other", url="https://example.com/", kinds=list(KINDS), most=9)
    done, failed = add_job(), add_job()
    assert not any(states(webhooks, one.id) for one in (mine, failures))
    finish(repository, done, finished_work)
    repository.claim(failed, worker="w")
    assert not repository.fail(failed, 9, code="c", message="m")  # refused: it tells nothing
    repository.fail(failed, 1, code="c", message="m")
    assert [(one.kind, one.subject) for one in deliveries(webhooks, mine.id)] == [("video.completed", done)]
    assert [(one.kind, one.subject) for one in deliveries(webhooks, failures.id)] == [("video.failed", failed)]
    assert deliveries(webhooks, others.id, "other") == []


def test_it_is_tried_again_under_the_same_id_and_then_given_up(
    receiver: Receiver, webhooks: WebhookRepository, repository: JobRepository, add_job: AddJob, database: Database,
    send: Callable[..., None],
) -> None:  # fmt: skip
    webhook = webhooks.add("default", url=receiver.url, kinds=list(KINDS), most=9)
    receiver.answers = [500, 302, 200, 503, 503, 503, 410]
    repository.request_cancel(add_job())
    send(lambda: states(webhooks, webhook.id) == [DeliveryState.DELIVERED])
    assert len(receiver.received) == 3
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 1
    assert len({body for _, body in receiver.received}) == 1
    (delivery,) = deliveries(webhooks, webhook.id)
    assert (delivery.attempts, delivery.status_code, delivery.problem, delivery.next_at) == (3, 200, None, None)

    repository.request_cancel(add_job())
    send(lambda: states(webhooks, webhook.id)[0] is DeliveryState.FAILED)
    delivery = deliveries(webhooks, webhook.id)[0]
    assert (delivery.attempts, delivery.status_code, delivery.problem) == (3, 503, "not a 2xx answer")

    repository.request_cancel(add_job())  # 410: gone for good
    send(lambda: states(webhooks, webhook.id)[0] is DeliveryState.FAILED)
    assert deliveries(webhooks, webhook.id)[0].attempts == 1
    assert len(receiver.received) == 7
    webhooks.sweep(kept_s=-1.0)
    assert counted(database) == {"delivered": 1, "tried_again": 4, "given_up": 2}


def counted(database: Database) -> dict[str, int]:
    measured = read_measures(database, [DELIVERIES])[DELIVERIES.name]
    return {result: sums.count for (result,), sums in measured.items()}


def test_slow_down_and_huge(
    receiver: Receiver, webhooks: WebhookRepository, repository: JobRepository, add_job: AddJob,
    send: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sender_module, "TIMEOUT_S", 0.6)
    written = 0

    def drip(handler: http.server.BaseHTTPRequestHandler) -> bool:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(40):  # a header a while: each is in time, all together are not
            handler.wfile.write(b"x: y\r\n")
            time.sleep(0.05)
        return True

    def flood(handler: http.server.BaseHTTPRequestHandler) -> bool:
        nonlocal written
        handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
        try:
            for _ in range(1000):
                written += handler.wfile.write(b"x" * 1_000_000)
        except OSError:
            pass
        return True

    receiver.behave = drip
    webhook = webhooks.add("default", url=receiver.url, kinds=list(KINDS), most=9)
    down = webhooks.add("default", url="http://127.0.0.1:1/", kinds=list(KINDS), most=9)
    repository.request_cancel(add_job())
    send(
        lambda: states(webhooks, webhook.id) == states(webhooks, down.id) == [DeliveryState.FAILED],
        webhook_max_attempts=1,
    )
    assert "no answer within" in str(deliveries(webhooks, webhook.id)[0].problem)
    assert deliveries(webhooks, down.id)[0].problem == "ConnectError"

    receiver.behave = flood
    repository.request_cancel(add_job())
    send(lambda: states(webhooks, webhook.id)[0] is DeliveryState.DELIVERED)
    assert written < 100_000_000  # the body is not read


def test_one_that_hangs_does_not_hold_up_the_others(
    receiver: Receiver, webhooks: WebhookRepository, repository: JobRepository, add_job: AddJob,
    send: Callable[..., None],
) -> None:  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        webhooks.add("default", url=f"http://127.0.0.1:{port}/", kinds=list(KINDS), most=9)
        quick = webhooks.add("default", url=receiver.url, kinds=list(KINDS), most=9)
        for _ in range(60):
            repository.request_cancel(add_job())
        began = time.monotonic()
        send(lambda: states(webhooks, quick.id) == [DeliveryState.DELIVERED] * 60)
        assert time.monotonic() - began < 9.0


def test_a_killed_sender_loses_nothing(
    webhooks: WebhookRepository, repository: JobRepository, database: Database, add_job: AddJob
) -> None:
    webhook = webhooks.add("default", url="https://example.com/", kinds=list(KINDS), most=9)
    repository.request_cancel(add_job())
    claim = lambda: webhooks.claim_due(limit=9, lease_s=30.0, max_attempts=2)  # noqa: E731
    (first,) = claim()
    assert claim() == []
    expire = update(Delivery).values(next_at=database_now() - 1.0)
    with database.write() as connection:
        connection.execute(expire)
    (second,) = claim()
    assert (second.delivery.id, second.body) == (first.delivery.id, first.body)
    assert not webhooks.settle(first, status_code=200, problem=None, retry_after_s=None)  # it counts as lost
    with database.write() as connection:
        connection.execute(expire)
    assert claim() == []  # it was the last attempt
    (delivery,) = deliveries(webhooks, webhook.id)
    assert (delivery.state, delivery.problem) == (
        DeliveryState.FAILED, "the server was stopped during the last attempt",
    )  # fmt: skip
    assert counted(database) == {"given_up": 1}


def test_no_packet_to_a_private_address_when_dns_changes_its_mind(
    receiver: Receiver, webhooks: WebhookRepository, repository: JobRepository, add_job: AddJob,
    send: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A name that was public when it was registered now leads to this machine."""
    asked: list[str] = []
    look_up = socket.getaddrinfo

    def lie(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        if host == "rebound.example.com":
            if options.get("flags", 0) & socket.AI_NUMERICHOST:
                raise socket.gaierror
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
        return look_up(host, port, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lie)
    url = f"http://rebound.example.com:{receiver.port}/"
    webhook = webhooks.add("default", url=url, kinds=list(KINDS), most=9)
    repository.request_cancel(add_job())
    send(lambda: states(webhooks, webhook.id) == [DeliveryState.FAILED], webhook_max_attempts=1)
    assert deliveries(webhooks, webhook.id)[0].problem == "the name leads to a private address"
    assert receiver.received == []
    # Where that is allowed, the name is asked for once, and stays the Host.
    asked.clear()
    repository.request_cancel(add_job())
    send(
        lambda: states(webhooks, webhook.id)[0] is DeliveryState.DELIVERED,
        webhook_private_hosts=("rebound.example.com",),
    )
    assert asked == ["rebound.example.com"]
    assert receiver.received[0][0]["host"] == f"rebound.example.com:{receiver.port}"


def test_pauses_grow_and_are_drawn() -> None:
    pauses = [retry_pause_s(attempt, first_s=5.0, most=12) for attempt in range(1, 13)]
    assert pauses[-1] is None
    bounds = [min(5.0 * 2.5**n, 28_800.0) for n in range(11)]
    for pause, middle in zip(pauses, bounds, strict=False):
        assert pause is not None
        assert 0.75 * middle <= pause <= 1.25 * middle
    assert 12 * 3600 < sum(bounds) < 24 * 3600
    assert len({retry_pause_s(1, first_s=5.0, most=12) for _ in range(20)}) > 10


def test_secrets() -> None:
    assert is_secret(new_secret())
    assert new_secret() != new_secret()
    assert not any(
        map(is_secret, ["", "whsec_", "whsec_AAAA", "x" + new_secret(), "whsec_" + "!" * 44, "whsec_" + "A" * 200])
    )
    headers = sign("whsec_" + "A" * 32, message_id="msg_1", timestamp=1, body=b"{}")
    assert headers["webhook-signature"].startswith("v1,")


def test_sweep(webhooks: WebhookRepository, repository: JobRepository, add_job: AddJob, database: Database) -> None:
    webhook = webhooks.add("default", url="https://example.com/", kinds=list(KINDS), most=9)
    for _ in range(2):
        repository.request_cancel(add_job())
    with database.write() as connection:
        connection.execute(update(Delivery).values(created_at=database_now() - 100.0))
        connection.execute(update(Delivery).where(Delivery.seq == 1).values(state="failed", next_at=None))
    assert webhooks.sweep(kept_s=60.0) == 1
    assert states(webhooks, webhook.id) == [DeliveryState.PENDING]  # what waits is kept, however old
    assert webhooks.remove("default", webhook.id)
    assert webhooks.counts() == {}


def test_the_loop_ends_with_attempts_at_work(
    webhooks: WebhookRepository, repository: JobRepository, add_job: AddJob, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        webhooks.add("default", url=f"http://127.0.0.1:{deaf.getsockname()[1]}/", kinds=list(KINDS), most=9)
        repository.request_cancel(add_job())
        stop = threading.Event()
        thread = threading.Thread(target=WebhookSender(make_settings(tmp_path), webhooks).run, args=(stop,))
        thread.start()
        with deaf.accept()[0]:
            stop.set()
            thread.join(5)
        assert not thread.is_alive()


def test_certificate_is_that_of_the_name_and_not_of_the_address(
    receiver: Receiver, webhooks: WebhookRepository, repository: JobRepository, add_job: AddJob, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    authority = Authority()
    issued = authority.issue("hooks.example.com")
    for name, content in (("cert.pem", issued.certificate), ("key.pem", issued.key)):
        (tmp_path / name).write_bytes(content)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    asked_for: list[str | None] = []
    context.sni_callback = lambda connection, name, _: asked_for.append(name)
    receiver.server.socket = context.wrap_socket(receiver.server.socket, server_side=True)
    look_up = socket.getaddrinfo
    names = ("hooks.example.com", "other.example.com")

    def answer(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        if host in names:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
        return look_up(host, port, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    right, wrong = (
        webhooks.add("default", url=f"https://{name}:{receiver.port}/", kinds=list(KINDS), most=9) for name in names
    )
    repository.request_cancel(add_job())
    stop = threading.Event()
    settings = make_settings(tmp_path, webhook_private_hosts=names, webhook_max_attempts=1)
    trusting = ssl.create_default_context(cadata=authority.certificate.decode())
    thread = threading.Thread(target=WebhookSender(settings, webhooks, verify=trusting).run, args=(stop,))
    thread.start()
    try:
        deadline = time.monotonic() + 15
        while DeliveryState.PENDING in states(webhooks, right.id) + states(webhooks, wrong.id):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join(15)
    assert states(webhooks, right.id) == [DeliveryState.DELIVERED]
    assert states(webhooks, wrong.id) == [DeliveryState.FAILED]
    assert set(asked_for) == set(names)
    assert [headers["host"] for headers, _ in receiver.received] == [f"hooks.example.com:{receiver.port}"]
