"""What of an error a client may see."""

import pytest

from server.errors import without_folders


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/small/a.safetensors: is damaged", "a.safetensors: is damaged"),
        ("no checkpoint at '/data'", "no checkpoint at 'data'"),
        ("/srv/my models/a.safetensors has 3 bytes", "a.safetensors has 3 bytes"),
        ("(/srv/a), path:/srv/b, unix socket: /run/x/redis.sock.", "(a), path:b, unix socket: redis.sock."),
        ("/srv/a is not /srv/b", "a is not b"),
        ("models/small/a.json, 12/13 frames, 5 frames / s", "models/small/a.json, 12/13 frames, 5 frames / s"),
        ("see http://host:8000/v1/videos and https://host/", "see http://host:8000/v1/videos and https://host/"),
    ],
)
def test_folders_are_cut_off_and_nothing_else(text: str, shown: str) -> None:
    assert without_folders(text) == shown
