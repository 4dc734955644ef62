# Runs in a private mount namespace: the jail's file system with a layer above it that vanishes, the probes' tree at
# /.stockade-probe. With POPULATED=1 it holds what guides for a chroot bind into it, and a copy of the canary. With
# HOST=1 it is the host's own file system, less what everybody can write to, and the tree is at /mnt.
mount -t tmpfs -o mode=0755 stockade "$BASE"
mkdir "$BASE/lower" "$BASE/upper" "$BASE/work" "$BASE/root" "$BASE/tree"
mount --bind "$TREE" "$BASE/tree"
mount -o remount,bind,ro "$BASE/tree"
for file in passwd group; do
    cp "/etc/$file" "$BASE/$file"
done
echo 'stockade-peer:x:64178:64178::/tmp:/bin/sh' >> "$BASE/passwd"
echo 'stockade-peer:x:64178:' >> "$BASE/group"
for file in passwd group; do
    mount --bind "$BASE/$file" "/etc/$file"
done
if [ "$HOST" = 1 ]; then
    mount --bind "$BASE/tree" /mnt
    mkdir "$BASE/canary"
    mount --bind "$CANARY" "$BASE/canary"
    cd "$BASE"
    for place in /tmp /var/tmp /dev/shm; do
        mount -t tmpfs -o mode=1777 stockade "$place"
    done
    mkdir -p "$CANARY"
    mount --bind canary "$CANARY"
    cd /
    exec "$@"
fi
mount --bind "$ROOTFS" "$BASE/lower"
mount -t overlay -o "lowerdir=$BASE/lower,upperdir=$BASE/upper,workdir=$BASE/work" stockade "$BASE/root"
cd "$BASE/root"
mkdir -p proc sys dev tmp run .stockade-probe
chmod 1777 tmp
mount --bind "$BASE/tree" .stockade-probe
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
    mkdir -p "./$CANARY" ".${LAUNCHER%/*}"
    cp "$CANARY/file" "./$CANARY/file"
    chmod -R a+rX "./$CANARY"
    : > ".$LAUNCHER"
    mount --bind "$LAUNCHER" ".$LAUNCHER"
fi
cd /
exec "$@"
