"""Ask for many clips at once with OpenAI's client: a file of requests in, a file of answers and the clips out.

pip install openai
python examples/batch_over_http.py --labels covid-convex regular-convex --clips 3 --output clips
"""

import argparse
import json
import time
from pathlib import Path

from openai import OpenAI

ENDED = ("completed", "failed", "expired", "cancelled")


def make_requests(labels: list[str], clips: int) -> bytes:
    """One line for each clip; ``custom_id`` is how its answer is found again."""
    lines = [
        {
            "custom_id": f"{label}-{seed}",
            "method": "POST",
            "url": "/v1/videos",
            "body": {"prompt": label, "seed": seed},
        }
        for label in labels
        for seed in range(clips)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def main() -> None:
    """Upload, start, wait, download."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--key", default="unused", help="key of the server, where it wants one")
    parser.add_argument("--labels", nargs="+", default=["covid-convex"], help="labels of the model")
    parser.add_argument("--clips", type=int, default=2, help="clips of each label")
    parser.add_argument("--output", type=Path, default=Path("clips"), help="folder for the clips")
    options = parser.parse_args()
    client = OpenAI(base_url=f"{options.url}/v1", api_key=options.key)

    requests = client.files.create(
        file=("requests.jsonl", make_requests(options.labels, options.clips)), purpose="batch"
    )
    batch = client.batches.create(input_file_id=requests.id, endpoint="/v1/videos", completion_window="24h")
    while batch.status not in ENDED:
        time.sleep(1.0)
        batch = client.batches.retrieve(batch.id)
        counts = batch.request_counts
        print(f"{batch.status}: {counts.completed} of {counts.total} done, {counts.failed} failed", flush=True)

    for error in batch.errors.data if batch.errors else []:  # the file itself was refused
        print(f"line {error.line}: {error.message}")
    if batch.error_file_id:  # some lines came to nothing
        print(client.files.content(batch.error_file_id).text)
    if batch.output_file_id:
        options.output.mkdir(parents=True, exist_ok=True)
        for line in client.files.content(batch.output_file_id).text.splitlines():
            answer = json.loads(line)
            path = options.output / f"{answer['custom_id']}.mp4"
            client.videos.download_content(answer["response"]["body"]["id"]).write_to_file(path)
            print(f"{path}: {answer['response']['body']['label']}, seed {answer['response']['body']['seed']}")


if __name__ == "__main__":
    main()
