"""Whether made files can be stored: where that has failed, no job is begun before it is possible again."""

import logging

from server.objects import Objects, StorageFullError

__all__ = ["StorageWatch"]

logger = logging.getLogger(__name__)


class StorageWatch:
    """What a sampling process knows of the place for its files.

    Args:
        objects: Of the finished videos.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self.is_suspect = False
        """Whether something could not be stored or read lately."""

    def is_well(self) -> bool:
        """Whether files can be stored. Tried only where it had failed."""
        if self.is_suspect:
            try:
                self._objects.probe()
            except (OSError, StorageFullError) as error:
                logger.error("no job is begun, for files cannot be stored: %s", error)
                return False
            logger.info("files can be stored again")
            self.is_suspect = False
        return True
