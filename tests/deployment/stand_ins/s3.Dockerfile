# In place of Versity's gateway: moto's S3 server under the same name, port and variables.
FROM docker.io/library/python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends netcat-openbsd && rm -rf /var/lib/apt/lists/*
RUN --mount=type=secret,id=pip_config \
    python3 -m venv /opt/moto && PIP_CONFIG_FILE=/run/secrets/pip_config /opt/moto/bin/pip install "moto[s3,server]==5.2.5"
COPY --chmod=0755 s3.py /usr/local/bin/versitygw
