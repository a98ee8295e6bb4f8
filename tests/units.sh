#!/bin/sh
# Run by `tests/guest.sh units` in the guest, as root: a real session under the units that set-up writes, an executor and a
# server that are killed under it, and what `systemd-analyze security` says of both.
set -eu
export HOME=/root
say() { echo "== $*"; }
ada() { runuser -u ada -- env HOME=/home/ada "$@"; }

repository=$PWD
mkdir /opt/beaker-sessions
tar -C /opt/beaker-sessions -xpf build/guest/opt.tar
say "set up by an ordinary user with sudo, from a home that nobody else may enter"
useradd --create-home ada
chmod 0700 /home/ada
echo 'ada ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/ada
mkdir "/home/ada/check out"
cd "/home/ada/check out"
tar -xf "$repository/build/guest/checkout.tar"
chown -R ada: .
ada python3 -B -c '
from setup import __main__, steps
names = ("system packages", "default image")  # which need a network
steps.run(step for step in __main__.SESSION if step.name not in names)'
say "$(systemctl show -p ExecMainPID,TasksMax,ActiveState beaker-server beaker-executor | tr '\n' ' ')"
beaker executor images load "$repository/build/guest/image.tar" alpine > /dev/null
[ "$(ada beaker session create --gpus 0 --image alpine -- id -un)" = ada ]
say "sudo and set-uid programs are not cut off"
ada beaker session create --gpus 0 --image alpine -- sh -c '! grep -q "NoNewPrivs:.*1" /proc/self/status'
session=$(ada beaker session create --gpus 0 --image alpine --detach -- sleep 1000)
inside=$(ada beaker session exec "$session" -- cat /proc/sys/kernel/random/boot_id)
[ "$inside" = "$(cat /proc/sys/kernel/random/boot_id)" ]
say "both killed: the session goes on"
pid=$(pgrep -f 'sleep 1000' | head -n 1)
systemctl kill --kill-whom=main -s KILL beaker-executor beaker-server
for attempt in 1 2 3 4 5 6 7 8 9 10; do
    sleep 3
    ada beaker session exec "$session" -- true && break
done
ada beaker session exec "$session" -- true
[ "$(pgrep -f 'sleep 1000' | head -n 1)" = "$pid" ]
say "all sessions: $(cat /sys/fs/cgroup/beaker-var-lib-beaker/pids.max) processes of $(cat /proc/sys/kernel/pid_max)"
ada beaker session stop "$session" > /dev/null
beaker executor doctor || true
for unit in beaker-server beaker-executor; do
    systemd-analyze security --no-pager "$unit" | grep -v '^✓' | cut -c1-150
done
journalctl -u beaker-server -u beaker-executor --no-pager -q -o cat | grep -E 'Traceback|denied|not permitted' && exit 1
say "an executor of root from a directory that ada can change"
chown ada /opt/beaker-sessions/current/package
if /opt/beaker-sessions/current/bin/beaker-executor; then exit 1; fi
chown root /opt/beaker-sessions/current/package
