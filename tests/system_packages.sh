#!/bin/sh
# Debian packages that some tests start programs of. `./run test` runs this first: as root on Debian it installs what is
# missing; elsewhere, or where that fails, the tests concerned skip and say what they miss.
set -eu

# One a line, with what it is for.
packages="
chromium
dicom3tools
nginx-light
postgresql
"
# chromium     opens the playground: tests/browser
# dicom3tools  dciodvfy, which checks DICOM files: tests/unit/medsora/test_clip_files.py
# nginx-light  the proxy: tests/deployment/test_proxy.py
# postgresql   the job database: tests/postgres_cluster.py

command -v dpkg-query >/dev/null 2>&1 && command -v apt-get >/dev/null 2>&1 || exit 0

missing=""
for package in $packages; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
    echo "Some tests will skip; as root, install what they need: apt-get install$missing"
    exit 0
fi
echo "Installing for the tests:$missing ..."
log=$(mktemp)
# RUNLEVEL: what is installed is not to start services of its own
if ! { apt-get update && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install --yes --no-install-recommends $missing; } >"$log" 2>&1; then
    tail -n 15 "$log"
    echo "Some tests will skip: the packages could not be installed (above)."
fi
rm -f "$log"
