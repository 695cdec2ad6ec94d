"""Where what torch and Triton compile is kept between starts. Torch-free: they look when they are imported."""

from collections.abc import MutableMapping
from pathlib import Path

from server.settings import SettingsError

__all__ = ["keep_compiled_code"]

_FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def keep_compiled_code(data_dir: Path, environment: MutableMapping[str, str]) -> None:
    """Point the compile caches of a process, and of its children, into the data folder.

    Their own defaults are the machine's temporary folder, which a restart may empty, and the home folder, which a
    service need not have. Whoever has set one of the variables keeps that choice.

    Args:
        environment: Of this process; what is missing is added.

    Raises:
        SettingsError: A folder cannot be made, or belongs to somebody else.
    """
    caches = data_dir.resolve() / "compile-cache"
    for variable, name in _FOLDERS.items():
        if environment.get(variable):
            continue
        try:
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (caches, caches / name):
                folder.mkdir(mode=0o700, exist_ok=True)
                # What lies here is loaded and run: nobody else may write it, whatever mode an older folder has.
                folder.chmod(0o700)
        except OSError as error:
            raise SettingsError(
                f"the compile cache {caches / name} cannot be made for this user alone: {error.strerror}; "
                f"set {variable} to a folder where it can"
            ) from error
        environment[variable] = str(caches / name)
