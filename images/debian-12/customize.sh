#!/bin/sh
# customize.sh early|late ROOT [LABEL]: what the image changes in a plain Debian. Called by mmdebstrap, before and after the packages.
set -eu
root=$2

if [ "$1" = early ]; then
	# A small initial RAM disk: every byte of it is read and unpacked at each boot.
	mkdir -p "$root/etc/initramfs-tools/conf.d" "$root/usr/share/initramfs-tools/modules.d"
	printf 'MODULES=list\nCOMPRESS=zstd\nRESUME=none\nFSTYPE=ext4\n' >"$root/etc/initramfs-tools/conf.d/oblak"
	printf '%s\n' virtio_pci virtio_blk virtio_scsi virtio_net nvme sd_mod ext4 >"$root/usr/share/initramfs-tools/modules.d/oblak"
	# No service is started while packages are installed.
	printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
	chmod 755 "$root/usr/sbin/policy-rc.d"
	exit 0
fi

label=$3
rm -f "$root/usr/sbin/policy-rc.d"
printf 'LABEL=%s / ext4 rw,noatime,errors=remount-ro 0 1\n' "$label" >"$root/etc/fstab"
printf 'debian\n' >"$root/etc/hostname"
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' >"$root/etc/hosts"
# Each machine makes its own identity at its first boot.
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id" "$root"/etc/ssh/ssh_host_*
ln -sf /run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"

mkdir -p "$root/boot/grub"
cat >"$root/boot/grub/grub.cfg" <<CFG
# Written once by the image. The links /vmlinuz and /initrd.img follow kernel upgrades by themselves.
serial --unit=0 --speed=115200
terminal_input console serial
terminal_output console serial
set timeout=0
menuentry "Debian 12" {
	search --no-floppy --label $label --set root
	linux /vmlinuz root=LABEL=$label rw console=tty0 console=ttyS0,115200 quiet systemd.show_status=false
	initrd /initrd.img
}
CFG

cat >"$root/etc/cloud/cloud.cfg.d/90_oblak.cfg" <<CFG
# A seed disk first (no network needed), then the metadata service in either layout.
datasource_list: [NoCloud, OpenStack, Ec2, None]
datasource:
  OpenStack: {max_wait: 30, timeout: 5, retries: 3, apply_network_config: false}
  Ec2: {strict_id: false, max_wait: 60, timeout: 5, apply_full_imds_network_config: false}
network: {config: disabled}
manage_etc_hosts: true
preserve_hostname: false
ssh_deletekeys: true
ssh_genkeytypes: [ed25519]
no_ssh_fingerprints: true
apt: {preserve_sources_list: true}
system_info:
  distro: debian
  default_user:
    name: debian
    lock_passwd: true
    gecos: Debian
    groups: [adm, sudo]
    sudo: ["ALL=(ALL) NOPASSWD:ALL"]
    shell: /bin/bash
# Each module costs time at every boot; these are what user data usually asks for.
cloud_init_modules: [seed_random, bootcmd, write-files, growpart, resizefs, disk_setup, mounts, set_hostname, update_hostname, update_etc_hosts, users-groups, ssh]
cloud_config_modules: [set-passwords, apt-configure, ntp, timezone, runcmd]
cloud_final_modules: [package-update-upgrade-install, write-files-deferred, scripts-per-once, scripts-per-boot, scripts-per-instance, scripts-user, phone-home, final-message, power-state-change]
CFG
printf 'policy: search,found=all,maybe=all,notfound=enabled\n' >"$root/etc/cloud/ds-identify.cfg"

# Every wired card by DHCP, from the first moment and without cloud-init having to say so.
cat >"$root/etc/systemd/network/50-wired.network" <<CFG
[Match]
Type=ether
Kind=!*
[Network]
DHCP=yes
IPv6AcceptRA=yes
LinkLocalAddressing=yes
[DHCPv4]
UseDomains=yes
ClientIdentifier=mac
CFG
mkdir -p "$root/etc/systemd/system/systemd-networkd-wait-online.service.d"
printf '[Service]\nExecStart=\nExecStart=/lib/systemd/systemd-networkd-wait-online --any --timeout=30\n' \
	>"$root/etc/systemd/system/systemd-networkd-wait-online.service.d/any.conf"
mkdir -p "$root/etc/systemd/journald.conf.d" "$root/etc/systemd/system.conf.d"
printf '[Journal]\nStorage=persistent\nSystemMaxUse=32M\n' >"$root/etc/systemd/journald.conf.d/oblak.conf"
printf '[Manager]\nDefaultTimeoutStopSec=15s\n' >"$root/etc/systemd/system.conf.d/oblak.conf"
printf 'PasswordAuthentication no\nPermitRootLogin prohibit-password\n' >"$root/etc/ssh/sshd_config.d/oblak.conf"

chroot "$root" systemctl -q enable systemd-networkd.service systemd-resolved.service ssh.service serial-getty@ttyS0.service
chroot "$root" systemctl -q mask apt-daily.timer apt-daily-upgrade.timer man-db.timer e2scrub_all.timer e2scrub_reap.service \
	fstrim.timer dpkg-db-backup.timer systemd-pstore.service systemd-networkd-wait-online@.service \
	systemd-update-utmp.service systemd-update-utmp-runlevel.service 2>/dev/null
chroot "$root" systemctl -q disable cloud-init-hotplugd.socket 2>/dev/null || true

# Compiled once here instead of at the first start in the guest.
chroot "$root" python3 -m compileall -q /usr/lib/python3/dist-packages 2>/dev/null || true
rm -rf "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/var/log/*.log \
	"$root"/var/log/apt "$root"/tmp/* "$root"/usr/share/doc-base "$root"/var/cache/debconf/*-old
