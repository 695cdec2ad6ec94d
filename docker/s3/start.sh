#!/bin/sh
# Versity's S3 gateway over a folder, with one user whose secret is a file.
set -eu
ROOT_ACCESS_KEY=$S3_ACCESS_KEY_ID
ROOT_SECRET_KEY=$(cat /run/secrets/s3_secret_access_key)
export ROOT_ACCESS_KEY ROOT_SECRET_KEY
mkdir -p /objects/medsora  # the bucket
exec versitygw --port :7070 posix /objects
