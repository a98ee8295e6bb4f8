#!/bin/sh
# Runs as root inside an image that is being made: what is ours. Last and small, as it changes with every version.
set -eu
here=$(dirname "$0")

# Everybody is root inside, where a driver gives the session a user namespace of its own; elsewhere sudo is refused.
echo 'ALL ALL=(ALL:ALL) NOPASSWD: ALL' >/etc/sudoers.d/session
chmod 0440 /etc/sudoers.d/session

cat "$here/bashrc" >>/etc/bash.bashrc

for program in apt apt-get; do install -m 0755 "$here/apt" "/usr/local/sbin/$program"; done

mv "$here/git-credential-beaker" /usr/local/bin/
chmod 0755 /usr/local/bin/git-credential-beaker
mv "$here/beaker" /usr/local/lib/beaker
mv /usr/local/lib/beaker/launcher /usr/local/bin/beaker
chmod 0755 /usr/local/bin/beaker
python3 -m compileall -q /usr/local/lib/beaker
