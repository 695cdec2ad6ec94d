#!/bin/sh
# Fill the configuration in and run nginx. Settings: PROXY_MAX_BODY, PROXY_MAX_FILE, PROXY_CONNECTIONS_PER_ADDRESS, and
# PROXY_API, the name and port of the API: a whole name, for nginx knows no search domains.
set -eu
fail() {
    echo "start-proxy: $*" >&2
    exit 1
}
for secret in tls_certificate tls_key; do
    [ -s "/run/secrets/$secret" ] || fail "the secret $secret is missing or empty; see docs/deployment.md, TLS"
done
# The first one: others of the host do not know the names of containers, and nginx would ask them in turn.
resolver=$(awk '$1 == "nameserver" { print ($2 ~ /:/) ? "[" $2 "]" : $2; exit }' /etc/resolv.conf)
[ -n "$resolver" ] || fail "no name server in /etc/resolv.conf"
for file in nginx.conf api.conf; do
    sed -e "s|@RESOLVER@|$resolver|" \
        -e "s|@API@|${PROXY_API:-api:8000}|" \
        -e "s|@MAX_BODY@|${PROXY_MAX_BODY:-26m}|" \
        -e "s|@MAX_FILE@|${PROXY_MAX_FILE:-201m}|" \
        -e "s|@CONNECTIONS@|${PROXY_CONNECTIONS_PER_ADDRESS:-100}|" \
        "/etc/medsora-proxy/$file" >"/tmp/$file"
done
exec nginx -e /dev/stderr -c /tmp/nginx.conf -g 'daemon off;'
