"""Be told when videos, batches and datasets end: a receiver of webhooks that does the work of each message once.

pip install openai
python examples/webhook_receiver.py --secret whsec_... --port 8099 --database events.db --download clips

The secret is told once, when the webhook is made (POST /v1/webhooks). What a receiver has to do, and this one does:
verify signature and time over the bytes as they came; remember `webhook-id` before it answers, since a message may come
twice; answer within seconds and do the work afterwards, going on with what was left when it is started again.
"""

from __future__ import annotations

import argparse
import http.server
import json
import sqlite3
import threading
import urllib.request
from pathlib import Path

import openai

MAX_BODY_BYTES = 2**20


class Inbox:
    """Messages that have come, each once; on disk, so that a restart forgets none."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._lock = threading.Lock()
        self.has_new = threading.Event()
        with self._lock:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS messages (id TEXT PRIMARY KEY, body TEXT NOT NULL, done INTEGER NOT NULL)"
            )

    def put(self, message_id: str, body: str) -> bool:
        """Keep a message; False where it had come before."""
        with self._lock:
            cursor = self._database.execute("INSERT OR IGNORE INTO messages VALUES (?, ?, 0)", (message_id, body))
        self.has_new.set()
        return cursor.rowcount == 1

    def next(self) -> tuple[str, str] | None:
        """The oldest message whose work is not done."""
        with self._lock:
            row: tuple[str, str] | None = self._database.execute(
                "SELECT id, body FROM messages WHERE NOT done ORDER BY rowid LIMIT 1"
            ).fetchone()
        return row

    def finish(self, message_id: str) -> None:
        """Its work is done."""
        with self._lock:
            self._database.execute("UPDATE messages SET done = 1 WHERE id = ?", (message_id,))


def make_server(port: int, secret: str, inbox: Inbox) -> http.server.ThreadingHTTPServer:
    """A server that answers 204 to what is genuine, once it is kept, and 400 to everything else."""
    verifier = openai.OpenAI(api_key="unused", webhook_secret=secret)

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = self.headers.get("content-length", "")
            if not length.isdigit() or int(length) > MAX_BODY_BYTES:
                self.answer(400)
                return
            body = self.rfile.read(int(length))
            try:
                verifier.webhooks.verify_signature(body, dict(self.headers))
            except (openai.InvalidWebhookSignatureError, ValueError):
                self.answer(400)
                return
            is_new = inbox.put(self.headers["webhook-id"], body.decode())
            self.answer(204)
            print(f"{self.headers['webhook-id']}: {'received' if is_new else 'again'}", flush=True)

        def answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return http.server.ThreadingHTTPServer(("", port), Hook)


def work(inbox: Inbox, url: str, key: str, folder: Path) -> None:
    """Do what each message asks for, one after another, for ever."""
    while True:
        inbox.has_new.clear()
        message = inbox.next()
        if message is None:
            inbox.has_new.wait()
            continue
        message_id, body = message
        event = json.loads(body)
        if event["type"] == "video.completed":
            save(event["data"]["id"], url, key, folder)
        print(f"{message_id}: {event['type']} {event['data']['id']}", flush=True)
        inbox.finish(message_id)


def save(video_id: str, url: str, key: str, folder: Path) -> None:
    """Download a video: first to another name, so that a file that is there is whole."""
    request = urllib.request.Request(f"{url}/v1/videos/{video_id}/content", headers={"Authorization": f"Bearer {key}"})
    partial = folder / f"{video_id}.part"
    with urllib.request.urlopen(request, timeout=60) as response:
        partial.write_bytes(response.read())
    partial.rename(folder / f"{video_id}.mp4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--secret", required=True, help="of the webhook: whsec_...")
    parser.add_argument("--port", type=int, default=8099, help="to listen on")
    parser.add_argument("--database", type=Path, default=Path("events.db"), help="file of what has come")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server, to download videos from")
    parser.add_argument("--key", default="unused", help="key of the server, where it wants one")
    parser.add_argument("--download", type=Path, default=Path("clips"), help="folder for the videos")
    options = parser.parse_args()
    options.download.mkdir(parents=True, exist_ok=True)
    inbox = Inbox(options.database)
    server = make_server(options.port, options.secret, inbox)
    threading.Thread(target=work, args=(inbox, options.url, options.key, options.download), daemon=True).start()
    print(f"listening on port {server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
