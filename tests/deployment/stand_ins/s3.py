#!/opt/moto/bin/python
"""versitygw --port :PORT posix FOLDER: each folder in FOLDER is a bucket."""

import os
import sys
import threading
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

_, option, port, kind, folder = sys.argv
assert (option, kind) == ("--port", "posix"), sys.argv
server = ThreadedMotoServer(ip_address="0.0.0.0", port=int(port.removeprefix(":")), verbose=False)
server.start()
client = boto3.client(
    "s3",
    endpoint_url=f"http://127.0.0.1{port}",
    aws_access_key_id=os.environ["ROOT_ACCESS_KEY"],
    aws_secret_access_key=os.environ["ROOT_SECRET_KEY"],
    region_name="us-east-1",
)
for bucket in Path(folder).iterdir():
    client.create_bucket(Bucket=bucket.name)
threading.Event().wait()
