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
sed -i 's/seconds: float = 60/seconds: float = 300/' setup/steps.py # slow without KVM
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
groups=$(find /sys/fs/cgroup -path '*/beaker.slice/beaker-cgroup.service' | head -n 1)
say "all sessions: $(cat "$groups"/beaker-var-lib-beaker/pids.max) processes of $(cat /proc/sys/kernel/pid_max)"
ports=$(ada beaker session create --gpus 0 --image alpine --port 8000 --detach -- sleep 1000)
answers() {
    for attempt in 1 2 3 4 5 6 7 8 9 10; do
        ada beaker session exec "$session" -- true && return
        sleep 3
    done
    return 1
}
those() { # what sessions are, which end with their conmon
    pgrep -f 'sleep 1000|forwarder.py' | sort
}
before=$(those)
say "both killed, with all that is in their units: the sessions go on, and so do their ports"
systemctl kill -s KILL beaker-executor beaker-server
sleep 3
answers
[ "$(those)" = "$before" ]
say "restarted: nothing is left over"
systemctl restart beaker-executor
answers
[ "$(those)" = "$before" ]
ada beaker session stop "$session" > /dev/null
ada beaker session stop "$ports" > /dev/null
say "the CPUs that a session claimed are its own beside a login's loops"
spent() { sed -n 's/^usage_usec //p' "/sys/fs/cgroup/$1/cpu.stat"; }
loops() { # $1: timeout(1)
    echo "sleep 5; $1 30 sh -c 'while :; do :; done' & sleep 5; $1 30 sh -c 'while :; do :; done'"
}
ada beaker session create --gpus 0 --cpus 2 --image alpine --detach -- sh -c "$(loops '/.beaker/busybox timeout')" > /home/ada/session
systemd-run -q --unit=loops --slice=user.slice sh -c "$(loops timeout)"
sleep 8
theirs=$(spent user.slice) ours=$(spent beaker.slice)
sleep 12
theirs=$(($(spent user.slice) - theirs)) ours=$(($(spent beaker.slice) - ours))
say "microseconds: $ours of $((ours + theirs)), by a weight of $(cat /sys/fs/cgroup/beaker.slice/cpu.weight)"
[ $((ours)) -gt $((5 * theirs)) ]
beaker executor doctor || true
for unit in beaker-server beaker-executor; do
    systemd-analyze security --no-pager "$unit" | grep -v '^✓' | cut -c1-150
done
journalctl -u beaker-server -u beaker-executor --no-pager -q -o cat | grep -E 'Traceback|denied|not permitted|cgroup' && exit 1
journalctl -u beaker-server -u beaker-executor --no-pager -q -o cat | grep -E 'left-over|remains running|cordoned' && exit 1
say "an executor of root from a directory that ada can change"
chown ada /opt/beaker-sessions/current/package
if /opt/beaker-sessions/current/bin/beaker-executor; then exit 1; fi
chown root /opt/beaker-sessions/current/package

say "shutdown: sessions end before the mounts go, told and with time to save"
mkdir /net
mount -t tmpfs -o mode=1777 net /net
cat > /etc/systemd/system/witness.service <<'UNIT'
[Unit]
Before=remote-fs.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/bin/sh -c 'echo "== when mounts go: $(cat /net/*)" | tr "\\n" " " > /dev/ttyS0'
UNIT
systemctl start witness
ada beaker session create --gpus 0 --image alpine --detach -- sh -c 'trap "" HUP TERM; while :; do sleep 1; done'
cat > /home/ada/saves <<'SH'
trap 'sleep 3; echo saved > /net/1; exit 0' TERM
while :; do sleep 1; done
SH
systemd-run -q --unit=follower -p User=ada -p Before=beaker-sessions.service -p StandardError=append:/net/2 \
    beaker session create --gpus 0 --image alpine -- sh /home/ada/saves
for attempt in 1 2 3 4 5 6 7 8 9 10; do
    [ "$(ada beaker session list --quiet | wc -l)" = 2 ] && break
    sleep 3
done
