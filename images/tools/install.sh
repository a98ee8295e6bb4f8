#!/bin/sh
# Runs as root inside an image that is being made, with a network if there is one: tools from elsewhere. One that cannot be
# had is left out, and said.
set -eu

# https://cloud.google.com/sdk/docs/install#deb
source=packages.cloud.google.com
key=/usr/share/keyrings/cloud.google.asc list=/etc/apt/sources.list.d/google-cloud-sdk.list
google() {
    curl -fsS --connect-timeout 10 --max-time 60 -o $key "https://$source/apt/doc/apt-key.gpg" || return 1
    echo "deb [signed-by=$key] https://$source/apt cloud-sdk main" >$list
    export DEBIAN_FRONTEND=noninteractive
    apt-get update && apt-get install -y --no-install-recommends google-cloud-cli
}
if ! google; then
    rm -f $key $list
    echo "left out: Google Cloud CLI (nothing could be installed from $source)"
fi
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb
