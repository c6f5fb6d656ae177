#!/bin/bash
# The `tiny` guest: stock distribution cloud kernel, busybox, dropbear, guest agent and a metadata
# client in shell. Boots in seconds, also without hardware help. Result: vmlinuz, initrd.img,
# tiny.qcow2 (root file system, grows with its disk), manifest.json.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../lib.sh"

begin "$@"
need dpkg-deb:dpkg cpio:cpio mke2fs:e2fsprogs qemu-img:qemu-utils depmod:kmod

progress 2 "resolving packages"
kernel_package=$(kernel_of linux-image-cloud-amd64)
if [ -z "$kernel_package" ]; then
	refresh_lists
	kernel_package=$(kernel_of linux-image-cloud-amd64)
fi
if [ -z "$kernel_package" ]; then
	newest=$(find "$CACHE/debs" -name 'linux-image-*-cloud-amd64_*.deb' -printf '%f\n' | sort -V | tail -n 1)
	kernel_package=${newest%%_*}
fi
[ -n "$kernel_package" ] || fail "no linux-image-cloud-amd64 at the mirror nor in the cache"
version=${kernel_package#linux-image-}

programs=(busybox-static dropbear-bin qemu-guest-agent e2fsprogs)
libraries=(libc6 libcrypt1 libtomcrypt1 libtommath1 libgmp10 zlib1g libglib2.0-0 libnuma1 libudev1
	liburing2 libpcre2-8-0 libext2fs2 libcom-err2 libblkid1 libuuid1)
progress 5 "downloading packages"
fetch "$kernel_package"
progress 25 "downloading packages"
fetch "${programs[@]}" "${libraries[@]}"

progress 40 "unpacking packages"
unpack "$kernel_package" "$WORK/kernel"
unpack "${programs[@]}" "${libraries[@]}" "$WORK/packages"

progress 50 "laying out the root file system"
root=$WORK/root
mkdir -p "$root"/{bin,sbin,lib,lib64,dev,proc,sys,run,tmp,mnt,root,usr/bin,usr/sbin,usr/lib,etc/dropbear,var/lib/oblak,var/log}
ln -s ../run "$root/var/run"
ln -s /proc/mounts "$root/etc/mtab"
cp -a "$here/rootfs/." "$root/"
chown -R 0:0 "$root"
chmod 755 "$root"/etc/init.d/* "$root"/usr/lib/oblak/* "$root/etc/acpi/power" "$root/sbin/shutdown"
chmod 700 "$root/root" "$root/etc/dropbear"
chmod 600 "$root/etc/shadow"
chmod 1777 "$root/tmp"

# program FILE-IN-PACKAGE: copies it and every library it is linked with.
packages=$WORK/packages
library_dirs="$packages/lib/x86_64-linux-gnu:$packages/usr/lib/x86_64-linux-gnu"
program() {
	install -D -m 755 "$packages/$1" "$root/$1"
	"$packages/lib64/ld-linux-x86-64.so.2" --library-path "$library_dirs" --list "$packages/$1" |
		awk -v p="$packages/" '$3 ~ "^/" { if (index($3, p) != 1) { print "outside " $3 > "/dev/stderr"; exit 1 } print $3 }' |
		while read -r library; do
			install -D -m 644 "$(realpath "$library")" "$root/lib/x86_64-linux-gnu/$(basename "$library")"
		done
}
install -m 755 "$packages/bin/busybox" "$root/bin/busybox"
install -D -m 755 "$packages/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" "$root/lib64/ld-linux-x86-64.so.2"
program usr/sbin/dropbear
program usr/bin/dropbearkey
program usr/bin/dbclient
program usr/sbin/qemu-ga
program sbin/mke2fs
program sbin/resize2fs
program sbin/e2fsck
ln -s dbclient "$root/usr/bin/ssh"
for kind in ext2 ext3 ext4; do ln -s mke2fs "$root/sbin/mkfs.$kind"; done
ln -s e2fsck "$root/sbin/fsck.ext4"
cp "$packages/etc/mke2fs.conf" "$root/etc/mke2fs.conf"
applets "$packages/bin/busybox" "$root"
mkdir -p "$root/usr/share/doc"
for package in "$kernel_package" "${programs[@]}" "${libraries[@]}"; do
	for tree in "$packages" "$WORK/kernel"; do
		[ ! -f "$tree/usr/share/doc/$package/copyright" ] ||
			install -D -m 644 "$tree/usr/share/doc/$package/copyright" "$root/usr/share/doc/$package/copyright"
	done
done

progress 60 "collecting drivers"
# Loaded by the initrd, in this order after their dependencies.
early=(virtio_pci virtio_blk virtio_net virtio_rng virtio_console virtio_balloon button evdev)
# In the root file system for modprobe.
late=(virtio_mmio virtiofs vmw_vsock_virtio_transport virtio_scsi sd_mod sr_mod cdrom isofs vfat nls_cp437 nls_ascii nls_utf8
	nls_iso8859-1 overlay loop fuse 9p 9pnet_virtio xfs btrfs dummy veth tun)
modules=$WORK/kernel/lib/modules/$version
depmod -b "$WORK/kernel" "$version"
with_dependencies() {
	# A driver that is built in or absent has no file; what must be there is checked below.
	{ modprobe -d "$WORK/kernel" -S "$version" --show-depends "$1" 2>/dev/null || true; } | awk '$1 == "insmod" { print $2 }'
}
initrd=$WORK/initrd
mkdir -p "$initrd"/{bin,sbin,usr/bin,usr/sbin,dev,proc,sys,root,modules}
install -m 755 "$here/initrd/init" "$initrd/init"
install -m 755 "$packages/bin/busybox" "$initrd/bin/busybox"
for applet in sh mount insmod findfs sleep cat ls echo setsid cttyhack switch_root; do ln -s busybox "$initrd/bin/$applet"; done
for module in "${early[@]}"; do
	with_dependencies "$module"
done | awk '!seen[$0]++' | while read -r file; do
	cp "$file" "$initrd/modules/"
	basename "$file"
done >"$initrd/modules/order"
for module in virtio_pci virtio_blk virtio_net; do
	grep -q "^$module.ko" "$initrd/modules/order" || grep -q "/$module.ko" "$modules/modules.builtin" ||
		fail "kernel $version has no driver $module"
done
for module in "${early[@]}" "${late[@]}"; do
	with_dependencies "$module"
done | sort -u | while read -r file; do
	install -D -m 644 "$file" "$root/lib/modules/$version/${file#"$modules/"}"
done
cp "$modules"/modules.{builtin,builtin.modinfo,order} "$root/lib/modules/$version/"
depmod -b "$root" "$version"
stamp "$root"
stamp "$initrd"

progress 75 "packing the initrd"
result=$WORK/result
mkdir "$result"
install -m 644 "$WORK/kernel/boot/vmlinuz-$version" "$result/vmlinuz"
# Not compressed: under emulation unpacking costs more than reading.
(cd "$initrd" && find . -mindepth 1 -printf '%P\n' | sort | cpio --quiet --reproducible -o -H newc -R 0:0) >"$result/initrd.img"

progress 80 "making the disk"
truncate -s 512M "$WORK/disk.raw"
mke2fs -q -F -t ext4 -L oblak-tiny -U 6f626c61-6b00-4000-8000-74696e790000 -b 4096 -N 32768 -m 0 \
	-E "hash_seed=6f626c61-6b00-4000-8000-74696e790001,lazy_itable_init=0,lazy_journal_init=0,resize=268435456" \
	-J size=8 -d "$root" "$WORK/disk.raw"
progress 90 "compressing the disk"
qemu-img convert -f raw -O qcow2 -c -o compression_type=zstd,lazy_refcounts=off "$WORK/disk.raw" "$result/tiny.qcow2"

cat >"$result/manifest.json" <<JSON
{
  "schema": 1,
  "name": "tiny",
  "kind": "kernel",
  "architecture": "x86_64",
  "description": "stock cloud kernel $version, busybox, ssh, metadata client",
  "kernel": "vmlinuz",
  "initrd": "initrd.img",
  "cmdline": "root=LABEL=oblak-tiny console=ttyS0 quiet panic=10",
  "disk": "tiny.qcow2",
  "disk_format": "qcow2",
  "min_memory_bytes": 134217728,
  "default_user": "root",
  "guest_agent": true,
  "digests": {
    "vmlinuz": "$(digest_of "$result/vmlinuz")",
    "initrd.img": "$(digest_of "$result/initrd.img")",
    "tiny.qcow2": "$(digest_of "$result/tiny.qcow2")"
  }
}
JSON
finish "$result"
