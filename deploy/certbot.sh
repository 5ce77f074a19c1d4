#!/bin/sh
# certbot in a container: asks for the certificate, and twice a day whether it is due again.
set -eu

trap exit TERM INT
while :; do
    certbot certonly --non-interactive --agree-tos --email "$EMAIL" --domain "$DOMAIN" --cert-name imfine \
        --webroot --webroot-path "$ACME_ROOT" --keep-until-expiring \
        --deploy-hook 'RELOAD=true sh /deploy/certificate.sh' || true # nginx goes on with what it has; it is tried again
    sleep 43200 &
    wait $!
done
