#!/bin/sh
# The oci driver's contract on a virtual machine: this machine's Debian with systemd, AppArmor and cgroups of version 2
# alone, and one OCI runtime. For what a machine without them cannot show; `make test` does not run it.
#
#     tests/guest.sh [runc|crun] [pytest's arguments]
#     tests/guest.sh units            the units of set-up instead, and how closed they are: tests/units.sh
#
# Needs root, `make check` before (for .venv), and the packages qemu-system-x86, mmdebstrap and e2fsprogs. ACCEL=tcg is for
# machines without KVM, and takes ten times as long. All of it is in build/guest, and gone with it.
set -eu
what=${1:-runc} runtime=${1:-runc}
[ $# = 0 ] || shift
[ "$what" != units ] || runtime=runc
root=$(cd "$(dirname "$0")/.." && pwd)
work=$root/build/guest
packages=systemd-sysv,dbus,udev,linux-image-amd64,apparmor,ca-certificates,procps,iproute2,iptables,nftables,sudo
packages=$packages,python3,conmon,skopeo,tini,busybox-static,$runtime

mkdir -p "$work"
cd "$root"
.venv/bin/python -c 'from tests import images; images.debian()'
if [ ! -e "$work/$runtime.img" ]; then
    tree=$work/tree
    rm -rf "$tree"
    .venv/bin/python -c 'from setup.sources import sources; print("\n".join(sources()))' > "$work/sources.list"
    mmdebstrap --variant=minbase --include="$packages" "$(. /etc/os-release; echo "$VERSION_CODENAME")" "$tree" "$work/sources.list"
    echo guest > "$tree/etc/hostname"
    mkdir -p "$tree$root"
    cat > "$tree/etc/systemd/system/contract.service" <<UNIT
[Service]
Type=oneshot
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
Delegate=yes
Environment=PYTHONDONTWRITEBYTECODE=1
ExecStart=/bin/sh -c 'mount -t 9p -o ro,trans=virtio,version=9p2000.L checkout $root && cd $root && \\
    sh build/guest/command; echo "it ended with \$\$?"'
ExecStopPost=systemctl --no-block poweroff
[Install]
WantedBy=multi-user.target
UNIT
    chroot "$tree" systemctl enable --quiet contract.service
    chroot "$tree" systemctl mask --quiet serial-getty@ttyS0.service
    cp "$tree"/boot/vmlinuz-* "$work/vmlinuz"
    cp "$tree"/boot/initrd.img-* "$work/initrd"
    truncate -s 8G "$work/part.img"
    mkfs.ext4 -q -F -d "$tree" "$work/part.img"
    rm -rf "$tree"
    mv "$work/part.img" "$work/$runtime.img"
fi
printf '%s\n' tests/contract -q -rs -k 'oci and not docker' -p no:cacheprovider "$@" > "$work/arguments"
if [ "$what" = units ]; then
    # Installed here, where there is a network, in the place where it will be there.
    mkdir -p "$work/opt" /opt/beaker-sessions
    unshare --mount sh -c 'mount --bind "$0" /opt/beaker-sessions && /usr/bin/python3 -B -c "from setup import installed; installed.install(print)"' "$work/opt"
    rmdir /opt/beaker-sessions 2> /dev/null || true
    tar -C "$work/opt" -cf "$work/opt.tar" . # many small files take minutes through the guest's mount
    .venv/bin/python -c 'import pathlib, sys; from tests import images; images.oci_archive(images.alpine(), pathlib.Path(sys.argv[1]))' "$work/image.tar"
    tar --exclude=__pycache__ -cf "$work/checkout.tar" setup images beaker_sessions requirements.txt
    echo sh tests/units.sh > "$work/command"
else
    echo "xargs -a build/guest/arguments -d '\\n' .venv/bin/python -m pytest" > "$work/command"
fi
qemu-system-x86_64 -accel "${ACCEL:-kvm}" -cpu max -smp 2 -m 4096 -nodefaults -display none -no-reboot \
    -serial stdio -kernel "$work/vmlinuz" -initrd "$work/initrd" \
    -append "root=/dev/vda rw console=ttyS0 quiet loglevel=3 systemd.show_status=0" \
    -drive "file=$work/$runtime.img,if=virtio,format=raw,snapshot=on" -device virtio-rng-pci \
    -virtfs "local,path=$root,mount_tag=checkout,security_model=none,readonly=on" < /dev/null | tee "$work/log"
grep -q 'it ended with 0' "$work/log"
[ "$what" != units ] || grep -q 'when mounts go: saved .*save your work.* stopped by the shutdown' "$work/log"
