# Runs in a private mount namespace: the jail's file system with a layer above it that vanishes, the probes' tree at
# /.stockade-probe. With POPULATED=1 it holds what guides for a chroot bind into it, and a copy of the canary.
mount -t tmpfs -o mode=0755 stockade "$BASE"
mkdir "$BASE/lower" "$BASE/upper" "$BASE/work" "$BASE/root"
mount --bind "$ROOTFS" "$BASE/lower"
mount -t overlay -o "lowerdir=$BASE/lower,upperdir=$BASE/upper,workdir=$BASE/work" stockade "$BASE/root"
cd "$BASE/root"
mkdir -p proc sys dev tmp run .stockade-probe
chmod 1777 tmp
mount --bind "$TREE" .stockade-probe
mount -o remount,bind,ro .stockade-probe
if [ "$POPULATED" = 1 ]; then
    mount -t tmpfs -o mode=0755 stockade dev
    mkdir dev/shm dev/net
    for node in null zero full random urandom tty mem kmsg fuse kvm net/tun $DISK; do
        if [ -e "/dev/$node" ]; then
            : > "dev/$node"
            mount --bind "/dev/$node" "dev/$node"
        fi
    done
    mount --rbind /proc proc
    mount --rbind /sys sys
    mount --rbind /run run
    mkdir -p "./$CANARY"
    cp "$CANARY/file" "./$CANARY/file"
    chmod -R a+rX "./$CANARY"
    mkdir -p ".${LAUNCHER%/*}"
    : > ".$LAUNCHER"
    mount --bind "$LAUNCHER" ".$LAUNCHER"
fi
cd /
exec "$@"
