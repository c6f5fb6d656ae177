#!/bin/bash
# The `debian-12` guest: systemd, cloud-init, ssh, guest agent, and GRUB for BIOS and UEFI on one GPT disk.
# No loop device and no mount of the disk: file systems are filled while they are made, boot loaders are
# written to their partitions. Result: debian-12.qcow2, manifest.json.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../lib.sh"

begin "$@"
need mmdebstrap:mmdebstrap mke2fs:e2fsprogs qemu-img:qemu-utils sfdisk:fdisk mkfs.vfat:dosfstools mcopy:mtools \
	grub-mkimage:grub-common chroot:coreutils
for target in i386-pc x86_64-efi; do
	[ -d "/usr/lib/grub/$target" ] || fail "missing packages: grub-pc-bin grub-efi-amd64-bin (apt-get install grub-pc-bin grub-efi-amd64-bin)"
done

packages=(
	systemd-sysv systemd-resolved udev dbus libpam-systemd kmod netbase iproute2 iputils-ping ca-certificates
	linux-image-cloud-amd64 initramfs-tools zstd
	cloud-init cloud-guest-utils fdisk e2fsprogs openssh-server sudo qemu-guest-agent
	less nano-tiny procps
)
label=oblak-root

# The mirrors that this machine uses for this release; without any, mmdebstrap knows the usual ones.
mirrors=$(apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 'Architecture: amd64' 2>/dev/null |
	awk '$3 ~ /^bookworm(-updates|-security)?$/ && $4 == "main"' | sort -u || true)
case $mirrors in *" bookworm main"*) ;; *) mirrors="" ;; esac

progress 1 "downloading and installing packages"
root=$WORK/root
mkdir -p "$CACHE/mmdebstrap" "$WORK/tmp"
# The longest step by far: its own log tells how far it is.
steps() {
	local percent=1 line
	while read -r line; do
		printf '%s\n' "$line" >&2
		case $line in
		*"downloading packages"*) percent=$((percent < 10 ? 10 : percent)) ;;
		*"extracting archives"*) percent=25 ;;
		*"installing essential packages"*) percent=30 ;;
		*"installing remaining packages"*) percent=40 ;;
		*"running --customize-hook"*) percent=70 ;;
		*) continue ;;
		esac
		progress "$percent" "${line#I: }"
	done
}
export here
printf '%s\n' "$mirrors" | TMPDIR=$WORK/tmp mmdebstrap --mode=root --variant=minbase --architectures=amd64 \
	--aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Retries "3"' --aptopt='Acquire::Languages "none"' \
	--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
	--dpkgopt='path-include=/usr/share/doc/*/copyright' --dpkgopt='path-exclude=/usr/share/locale/*' \
	--dpkgopt='path-exclude=/usr/share/info/*' --dpkgopt='path-exclude=/usr/share/lintian/*' \
	--include="$(IFS=, && printf '%s' "${packages[*]}")" \
	--skip=download/empty --skip=essential/unlink \
	--setup-hook="mkdir -p \"\$1/var/cache/apt/archives\"" \
	--setup-hook="sync-in '$CACHE/mmdebstrap' /var/cache/apt/archives" \
	--essential-hook="'$here/customize.sh' early \"\$1\"" \
	--customize-hook="sync-out /var/cache/apt/archives '$CACHE/mmdebstrap'" \
	--customize-hook="'$here/customize.sh' late \"\$1\" $label" \
	bookworm "$root" ${mirrors:+-} 2>&1 | steps || fail "mmdebstrap failed; its last words are above"
# Only packages are worth keeping.
find "$CACHE/mmdebstrap" -mindepth 1 ! -name '*.deb' -delete 2>/dev/null || true
find "$CACHE/mmdebstrap" -name '*.deb' -mtime +60 -delete

progress 75 "making the root file system"
# Sectors of 512 bytes. 1 MiB for GRUB's BIOS image, 16 MiB EFI system partition, the rest is root.
disk_mib=2048 bios_start=2048 bios_size=2048 esp_start=4096 esp_size=32768
root_start=$((esp_start + esp_size))
root_size=$((disk_mib * 2048 - root_start - 2048))
truncate -s $((root_size * 512)) "$WORK/root.img"
mke2fs -q -F -t ext4 -L "$label" -b 4096 -m 1 -E "lazy_itable_init=0,lazy_journal_init=0,resize=268435456" -J size=16 \
	-d "$root" "$WORK/root.img"

progress 85 "making the boot loaders"
cat >"$WORK/early.cfg" <<CFG
search --no-floppy --label $label --set root
set prefix=(\$root)/boot/grub
configfile (\$root)/boot/grub/grub.cfg
CFG
modules=(part_gpt ext2 search search_label configfile normal linux echo test serial terminal minicmd boot reboot halt gzio)
grub-mkimage -O i386-pc -d /usr/lib/grub/i386-pc -c "$WORK/early.cfg" -p /boot/grub -o "$WORK/core.img" biosdisk "${modules[@]}"
grub-mkimage -O x86_64-efi -d /usr/lib/grub/x86_64-efi -c "$WORK/early.cfg" -p /boot/grub -o "$WORK/bootx64.efi" fat efi_gop "${modules[@]}"
[ "$(stat -c %s "$WORK/core.img")" -le $((bios_size * 512)) ] || fail "GRUB's BIOS image does not fit its partition"

truncate -s $((esp_size * 512)) "$WORK/esp.img"
mkfs.vfat -F 16 -n OBLAK-ESP -i 0B1AC0DE "$WORK/esp.img" >/dev/null
MTOOLS_SKIP_CHECK=1 mmd -i "$WORK/esp.img" ::/EFI ::/EFI/BOOT
MTOOLS_SKIP_CHECK=1 mcopy -i "$WORK/esp.img" "$WORK/bootx64.efi" ::/EFI/BOOT/BOOTX64.EFI

progress 88 "laying out the disk"
disk=$WORK/disk.raw
truncate -s "${disk_mib}M" "$disk"
sfdisk -q "$disk" <<LAYOUT
label: gpt
label-id: 0B1AC0DE-0000-4000-8000-000000000012
first-lba: 2048
start=$bios_start, size=$bios_size, type=21686148-6449-6E6F-744E-656564454649, name=bios
start=$esp_start, size=$esp_size, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name=esp
start=$root_start, size=$root_size, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name=root
LAYOUT
put() { dd if="$1" of="$disk" bs=512 seek="$2" conv=notrunc,sparse status=none; }
# le BYTES VALUE: little-endian bytes of a number.
le() {
	local i value=$2
	for ((i = 0; i < $1; i++)); do
		printf "\\x$(printf %02x $((value & 255)))"
		value=$((value >> 8))
	done
}
patch() { dd of="$1" bs=1 seek="$2" conv=notrunc status=none; }
# What grub-install does, without a device: boot.img says at 0x5c in which sector the core image begins; the first sector of the
# core image says in its last 12 bytes where the rest is (GRUB, grub-core/boot/i386/pc/boot.S and diskboot.S).
head -c 440 /usr/lib/grub/i386-pc/boot.img >"$WORK/boot.img"
le 8 $bios_start | patch "$WORK/boot.img" $((0x5c))
le 8 $((bios_start + 1)) | patch "$WORK/core.img" $((0x1f4))
dd if="$WORK/boot.img" of="$disk" bs=440 count=1 conv=notrunc status=none
put "$WORK/core.img" $bios_start
put "$WORK/esp.img" $esp_start
put "$WORK/root.img" $root_start
rm "$WORK/root.img"

progress 91 "compressing the disk"
result=$WORK/result
mkdir "$result"
qemu-img convert -f raw -O qcow2 -c -o compression_type=zstd "$disk" "$result/debian-12.qcow2"
cat >"$result/manifest.json" <<JSON
{
  "schema": 1,
  "name": "debian-12",
  "kind": "disk",
  "architecture": "x86_64",
  "description": "Debian 12 with systemd, cloud-init, ssh; boots with BIOS and UEFI",
  "disk": "debian-12.qcow2",
  "disk_format": "qcow2",
  "min_memory_bytes": 402653184,
  "default_user": "debian",
  "guest_agent": true,
  "digests": {
    "debian-12.qcow2": "$(digest_of "$result/debian-12.qcow2")"
  }
}
JSON
finish "$result"
