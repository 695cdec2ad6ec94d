#!/bin/sh
# Make what docker-compose.yml needs and does not find: .env, random secrets, a self-signed certificate.
#   docker/configure.sh [HOST_NAME]       nothing that is there is changed
set -eu
cd "$(dirname "$0")/.."
host=${1:-localhost}
secrets=docker/secrets
umask 077

if [ ! -e .env ]; then
    gpus=0
    if command -v nvidia-smi >/dev/null 2>&1; then gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true); fi
    case $gpus in
    0) profile=cpu ;;
    1) profile=gpu ;;
    2 | 3) profile=gpu-2 ;;
    4 | 5 | 6 | 7) profile=gpu-4 ;;
    *) profile=gpu-8 ;;
    esac
    sed "s/^COMPOSE_PROFILES=.*/COMPOSE_PROFILES=$profile/" .env.example >.env
    echo "Made .env: $gpus GPUs seen, profile $profile."
fi

# The folder is closed; the files are open, since each is mounted alone into containers of several users.
mkdir -p -m 0700 "$secrets" docker/proxy/acme
chmod 0755 docker/proxy/acme
for name in redis_password postgres_password grafana_password s3_secret_access_key; do
    [ -e "$secrets/$name" ] && continue
    head -c 64 /dev/urandom | base64 | tr -dc 'A-Za-z0-9' | head -c 40 >"$secrets/$name"
    chmod 0444 "$secrets/$name"
    echo "Made $secrets/$name."
done
if [ ! -e "$secrets/tls_certificate" ] && [ ! -e "$secrets/tls_key" ]; then
    case $host in
    *[!0-9.]*) names="DNS:$host" ;;
    *) names="IP:$host" ;;
    esac
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 397 -subj "/CN=$host" \
        -addext "subjectAltName=$names,DNS:localhost,IP:127.0.0.1" \
        -keyout "$secrets/tls_key" -out "$secrets/tls_certificate" 2>/dev/null
    chmod 0444 "$secrets/tls_key" "$secrets/tls_certificate"
    echo "Made a self-signed certificate for $host, good for tests: docs/deployment.md, TLS, tells how to get another."
fi
