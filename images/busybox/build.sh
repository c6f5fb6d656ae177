#!/bin/bash
# The `busybox` container image: the statically linked busybox of the distribution with all its
# applets, as an OCI image layout. Result: oci-layout, index.json, blobs/, manifest.json.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../lib.sh"

begin "$@"
need dpkg-deb:dpkg tar:tar gzip:gzip

progress 5 "downloading packages"
fetch busybox-static
progress 40 "unpacking packages"
unpack busybox-static "$WORK/packages"
root=$WORK/root
mkdir -p "$root"/{bin,dev,etc,home,proc,root,run,sys,tmp,usr/bin,usr/sbin,sbin,var/log,var/www}
install -m 755 "$WORK/packages/bin/busybox" "$root/bin/busybox"
applets "$root/bin/busybox" "$root"
install -D -m 644 "$WORK/packages/usr/share/doc/busybox-static/copyright" "$root/usr/share/doc/busybox-static/copyright"
ln -s ../run "$root/var/run"
printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' >"$root/etc/passwd"
printf 'root:x:0:\ntty:x:5:\nnogroup:x:65534:\n' >"$root/etc/group"
printf 'root:*:20089:0:99999:7:::\nnobody:*:20089:0:99999:7:::\n' >"$root/etc/shadow"
printf '/bin/sh\n' >"$root/etc/shells"
chmod 700 "$root/root"
chmod 1777 "$root/tmp"
chmod 600 "$root/etc/shadow"
stamp "$root"

progress 60 "packing the layer"
result=$WORK/result
blobs=$result/blobs/sha256
mkdir -p "$blobs"
tar --sort=name --numeric-owner --owner=0 --group=0 --format=pax \
	--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime -C "$root" -cf "$WORK/layer.tar" .
diff_id=$(digest_of "$WORK/layer.tar")
gzip -n -9 "$WORK/layer.tar"

# blob FILE: moves it to its digest and prints "digest size".
blob() {
	local digest size
	digest=$(digest_of "$1") size=$(stat -c %s "$1")
	mv "$1" "$blobs/${digest#sha256:}"
	printf '%s %s\n' "$digest" "$size"
}
read -r layer_digest layer_size < <(blob "$WORK/layer.tar.gz")
created=$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)

progress 80 "writing the layout"
cat >"$WORK/config.json" <<JSON
{"created":"$created","architecture":"amd64","os":"linux","config":{"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],"Cmd":["sh"],"WorkingDir":"/"},"rootfs":{"type":"layers","diff_ids":["$diff_id"]},"history":[{"created":"$created","created_by":"images/busybox/build.sh"}]}
JSON
read -r config_digest config_size < <(blob "$WORK/config.json")
cat >"$WORK/image.json" <<JSON
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"$config_digest","size":$config_size},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"$layer_digest","size":$layer_size}]}
JSON
read -r image_digest image_size < <(blob "$WORK/image.json")
printf '{"imageLayoutVersion":"1.0.0"}\n' >"$result/oci-layout"
cat >"$result/index.json" <<JSON
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"$image_digest","size":$image_size,"annotations":{"org.opencontainers.image.ref.name":"latest"},"platform":{"architecture":"amd64","os":"linux"}}]}
JSON
cat >"$result/manifest.json" <<JSON
{
  "schema": 1,
  "name": "busybox",
  "kind": "oci",
  "architecture": "x86_64",
  "description": "busybox of the distribution, all applets",
  "layout": ".",
  "tag": "latest"
}
JSON
finish "$result"
