#!/bin/sh
# Runs as root inside an image that is being made: the distribution's packages, unless the base was made with them.
set -eu
here=$(dirname "$0")

packages=$(sed 's/#.*//; /^?/d' "$here/packages.txt")
# shellcheck disable=SC2086 # a list
if ! dpkg-query --show $packages >/dev/null 2>&1; then
    cp "$here/dpkg.cfg" /etc/dpkg/dpkg.cfg.d/session
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    apt-get install -y --no-install-recommends $packages
    for package in $(sed -n 's/^?//p' "$here/packages.txt"); do
        apt-get install -y --no-install-recommends "$package" || echo "left out: $package (this distribution has none)"
    done
    rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb
fi
