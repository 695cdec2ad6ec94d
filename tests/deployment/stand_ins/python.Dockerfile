# In place of python:3.11-slim-bookworm: Debian's Python of the same version, under the same names.
FROM docker.io/library/debian:bookworm-slim
RUN ln -s /usr/bin/python3 /usr/local/bin/python && ln -s /usr/bin/python3 /usr/local/bin/python3
