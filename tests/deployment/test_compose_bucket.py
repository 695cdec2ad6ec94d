"""docker-compose.yml with its profile s3: videos lie in a bucket. The store itself is a stand-in: see stand_ins."""

from pathlib import Path
from typing import Any

import openai
import pytest
from containers import Stack

from medsora.video_io import probe_video

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
]


def test_videos_lie_in_the_bucket(stack_with_bucket: Stack, tmp_path: Path) -> None:
    stack = stack_with_bucket
    with stack.client() as http:
        client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key=stack.make_key(), http_client=http)
        video: Any = client.videos.create_and_poll(
            prompt="covid lung", size="128x128", extra_body={"seed": 1, "num_inference_steps": 2}
        )
        assert (video.status, video.error) == ("completed", None), stack.logs()
        path = tmp_path / "clip.mp4"
        path.write_bytes(client.videos.download_content(video.id).read())
        assert probe_video(path).width == 128
        assert stack.execute("api", "find", "/data", "-name", "*.mp4") == ""
        stack.engine.run("healthcheck", "run", stack.containers("s3")[0])
        assert client.videos.delete(video.id).deleted
