#!/bin/sh
# Runs as root inside the image that is being made: what is to be in it beyond its base.
set -eu
here=$(dirname "$0")

packages=$(sed 's/#.*//' "$here/packages.txt")
# shellcheck disable=SC2086 # a list
if ! dpkg-query --show $packages >/dev/null 2>&1; then
    cp "$here/dpkg.cfg" /etc/dpkg/dpkg.cfg.d/session
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    apt-get install -y --no-install-recommends $packages
    rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb
fi

# Everybody is root inside, where a driver gives the session a user namespace of its own; elsewhere sudo is refused.
echo 'ALL ALL=(ALL:ALL) NOPASSWD: ALL' >/etc/sudoers.d/session
chmod 0440 /etc/sudoers.d/session

cat "$here/bashrc" >>/etc/bash.bashrc

mv "$here/git-credential-beaker" /usr/local/bin/
chmod 0755 /usr/local/bin/git-credential-beaker
mv "$here/beaker" /usr/local/lib/beaker
mv /usr/local/lib/beaker/launcher /usr/local/bin/beaker
python3 -m compileall -q /usr/local/lib/beaker
