"""An encoder process; ``encoders.py`` starts it.

python -m server.worker.encoder DESCRIPTOR...      one of each lane
"""

import logging
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np

from medsora.threads import take_short_turns
from server.datasets.files import DatasetFiles
from server.datasets.repository import DatasetRepository
from server.jobs.database import Database
from server.jobs.repository import log_fields
from server.logs import bound, configure_logging
from server.objects import objects_of
from server.settings import Settings, get_settings
from server.storage import ArtifactStore
from server.worker.dataset_clips import DatasetClips
from server.worker.encoding import EncodingOrder, StoredClip, encode_and_store, warm_up_encoder
from server.worker.signing import signer_of

__all__ = ["main"]

Frames = np.ndarray[Any, np.dtype[np.uint8]]

logger = logging.getLogger(__name__)


class _Stores:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = ArtifactStore(objects_of(settings, "artifacts"))
        self.dataset_clips = DatasetClips(
            DatasetRepository(Database(settings.database_address), lease_s=settings.lease_s),
            DatasetFiles(objects_of(settings, "datasets")),
            signer=signer_of(settings),
        )


def main(descriptors: list[int]) -> None:
    """Serve the lanes until the other end of one is closed.

    Args:
        descriptors: Of the connections.
    """
    # The sampling process is told to stop, and tells us by closing our lanes, once it needs us no more.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    take_short_turns()
    settings = get_settings()
    configure_logging(settings.log_level, settings.log_format, part="worker")
    stores = _Stores(settings)
    warm_up_encoder()
    threads = [
        threading.Thread(target=_serve, args=(stores, Connection(descriptor)), name=f"lane-{number}")
        for number, descriptor in enumerate(descriptors)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _serve(stores: _Stores, lane: Connection) -> None:
    try:
        lane.send(None)  # a greeting
        while True:
            order, shape = lane.recv()
            frames = np.frombuffer(lane.recv_bytes(), dtype=np.uint8).reshape(shape)
            with bound(**log_fields(order.claim.job)):
                lane.send(_answer(stores, order, frames))
    except (EOFError, OSError):
        # The sampling process is gone, or has closed us: whatever other lanes do is of no use any more.
        os._exit(0)
    except BaseException:
        logger.exception("the encoder process cannot go on")
        os._exit(70)


def _answer(stores: _Stores, order: EncodingOrder, frames: Frames) -> StoredClip | Exception:
    try:
        return encode_and_store(stores, order, frames)
    except Exception as error:
        where = traceback.format_exc()
        try:
            ForkingPickler.loads(ForkingPickler.dumps(error))  # as the connection does it
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        error.add_note(f"In an encoder process:\n{where}")
        return error


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]])
