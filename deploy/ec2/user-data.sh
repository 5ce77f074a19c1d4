#!/bin/bash
# User data of an EC2 machine (Debian 12 or Ubuntu 24.04): from nothing to a running relay. Fill in the four values.
#
# Before it starts: an Elastic IP that DOMAIN leads to, and a security group that lets in 80 and 443, and 22 from you.
# It runs once, as root, at the first boot; its words are in /var/log/cloud-init-output.log. No secret stands here, for
# user data can be read by everything on the machine: the relay makes its own.
set -euo pipefail

DOMAIN=
EMAIL=
REPOSITORY=
VERSION=main # a tag or a branch

for name in DOMAIN EMAIL REPOSITORY; do
    [ -n "${!name}" ] || { echo "user-data: $name is empty: fill it in at the top" >&2; exit 1; }
done

source=/opt/imfine-source
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends git ca-certificates unattended-upgrades
[ -d "$source" ] || git clone --depth 1 --branch "$VERSION" "$REPOSITORY" "$source"

# An address takes a moment to be attached, and Let's Encrypt must find this machine at its domain. Five failures an hour
# are all that it allows.
for _ in 1 2 3 4; do
    if sh "$source/deploy/install.sh" "$DOMAIN" "$EMAIL"; then exit 0; fi
    sleep 120
done
exit 1
