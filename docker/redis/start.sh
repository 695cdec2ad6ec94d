#!/bin/sh
# Redis with one user, whose password is a secret and who sees this server's keys alone.
set -eu
password=$(cat /run/secrets/redis_password)
if [ "${#password}" -lt 16 ]; then
    echo "redis: the secret redis_password has fewer than 16 characters; see docs/deployment.md, Secrets" >&2
    exit 1
fi
umask 077
{
    cat /etc/medsora-redis/redis.conf
    echo 'user default off'
    echo "user medsora on >$password resetkeys ~vgen:* resetchannels &* -@all +@read +@write +@pubsub +@transaction +@connection +@scripting +time +info -@dangerous +info"
} >/tmp/redis.conf
exec redis-server /tmp/redis.conf
