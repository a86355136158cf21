#!/bin/sh
# The real pictures of granuscenes, from Debian's packages: FOLDER/objects, FOLDER/backgrounds and FOLDER/copyright.
# They are GPL-2+ and Creative Commons (see FOLDER/copyright): use them, and do not commit them. Needs Debian or Ubuntu, not root.
#
#     examples/fetch_pictures.sh pictures
#     granulon data prepare granuscenes --source pictures --out scenes
set -eu

if [ $# -ne 1 ]; then
    echo "Usage: $0 FOLDER" >&2
    exit 2
fi
for tool in apt-get dpkg; do
    command -v "$tool" >/dev/null || { echo "This needs $tool: run it on Debian or Ubuntu, or in a container of one." >&2; exit 1; }
done
if [ -e "$1/objects" ] || [ -e "$1/backgrounds" ]; then
    echo "$1 has objects or backgrounds already; choose another folder." >&2
    exit 1
fi
mkdir -p "$1"
work=$(mktemp -d "$1/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
out=$(cd "$1" && pwd)

cd "$work"
work=$PWD
apt-get download tuxpaint-stamps-default mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 || {
    echo "The packages cannot be downloaded: is a Debian mirror configured, and has apt-get update been run?" >&2
    exit 1
}
for package in *.deb; do
    dpkg -x "$package" unpacked
    mkdir -p "$out/copyright"
    name=${package%%_*}
    cp "unpacked/usr/share/doc/$name/copyright" "$out/copyright/$name"
done
find unpacked/usr/share/tuxpaint/stamps -type f ! -name '*.png' ! -name '*.txt' -delete
mv unpacked/usr/share/backgrounds "$out/backgrounds"
mv unpacked/usr/share/tuxpaint/stamps "$out/objects"
echo "Pictures in $1"
