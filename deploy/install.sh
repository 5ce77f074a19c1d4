#!/bin/sh
# A relay in production on this machine, from nothing or from an earlier version: `sudo sh deploy/install.sh DOMAIN EMAIL`.
#
# Debian 12 or newer, Ubuntu 24.04 or newer. It may be run as often as one likes: what is there already stays as it is.
# Each version has a folder of its own under /opt/imfine/releases, and `current` leads to one of them.
#
# For tests and images: ROOT (a folder in place of /), VENV (one that has the requirements), SERVICE_USER, WEB_USER, and
# what nginx/render.sh takes.
set -eu
cd "$(dirname "$0")/.."

domain=${1:-}
email=${2:-}
root=${ROOT:-}
service_user=${SERVICE_USER:-imfine}
web_user=${WEB_USER:-www-data}
opt=$root/opt/imfine
etc=$root/etc/imfine
state=$root/var/lib/imfine
data=$state/data # a folder in it, for a restore renames it
backups=$root/var/backups/imfine
current=$opt/current
unit=imfine-relay.service
ready_s=60

say() { printf '%s\n' "$*"; }
lines() { printf '%s\n' "$@"; }
die() { printf 'install: %s\n' "$*" >&2; exit 1; }

check_machine() {
    [ -n "$email" ] || die "say: sh deploy/install.sh DOMAIN EMAIL"
    [ -n "$root" ] || [ "$(id -u)" -eq 0 ] || die "this takes root: sudo sh deploy/install.sh $domain $email"
    command -v systemctl >/dev/null || die "this machine has no systemd; deploy/compose.yaml needs Docker alone"
}

# --- packages and users ---

install_packages() {
    missing=''
    command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || missing="$missing nginx-light"
    command -v certbot >/dev/null || missing="$missing certbot"
    command -v openssl >/dev/null || missing="$missing openssl"
    [ -n "${VENV:-}" ] || python3 -c 'import venv, ensurepip' 2>/dev/null || missing="$missing python3-venv"
    if [ -n "$missing" ]; then
        say "Installing$missing"
        apt-get update -q
        # shellcheck disable=SC2086  # several words are meant
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
    fi
    [ -n "${VENV:-}" ] || python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "Python 3.11 or newer is needed: take Debian 12 or Ubuntu 24.04"
}

make_user() {
    id "$service_user" >/dev/null 2>&1 ||
        useradd --system --user-group --no-create-home --home-dir "$state" --shell /usr/sbin/nologin "$service_user"
}

# --- the code ---

sources() { ls -d ./*.py relay deploy docs README.md LICENSE NOTICE web/dist 2>/dev/null; }

build_page() {
    [ -e web/dist/index.html ] && return
    mb=$(awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo)
    if [ "$mb" -lt 900 ]; then
        say "The page is not built: that takes 900 MB of memory, and $mb MB are free. All else works. For the page, run" \
            "\`make web\` on another machine, copy web/dist here, and run this again."
    else
        # It may have to bring Node, as a wheel.
        [ -e "$opt/page/bin/python" ] || python3 -m venv "$opt/page"
        PAGE_PYTHON=$opt/page/bin/python DATA=$opt/page sh web/build.sh || say "The page was not built; all else works."
    fi
}

# A release is named by its content, its page's and its Python's: the same is the same folder.
put_release() {
    say 'Putting the code in place'
    # shellcheck disable=SC2046  # names without spaces
    release=$opt/releases/$({
        python3 --version
        find $(sources) -type f ! -name '*.pyc' -exec sha256sum {} + | LC_ALL=C sort
    } | sha256sum | cut -c 1-12)
    [ ! -e "$release/.ready" ] || return 0
    rm -rf "$release"
    mkdir -p "$release"
    # shellcheck disable=SC2046
    tar -cf - --exclude=__pycache__ $(sources) | tar -xf - -C "$release" --no-same-owner
    if [ -n "${VENV:-}" ]; then
        ln -s "$VENV" "$release/.venv"
    else
        python3 -m venv "$release/.venv"
        "$release/.venv/bin/pip" install --quiet --disable-pip-version-check -r "$release/relay/requirements.txt" \
            -r "$release/relay/requirements-pictures.txt"
    fi
    touch "$release/.ready"
}

prune_releases() {
    # shellcheck disable=SC2012  # the names are hashes
    ls -1dt "$opt"/releases/* | tail -n +3 | while read -r old; do
        [ "$old" = "$(readlink "$current")" ] || rm -rf "$old"
    done
}

# --- the files of the machine ---

# Units name the places of a real machine; a test has them elsewhere.
place() { # FROM TO MODE
    sed -e "s|/opt/imfine|$opt|g; s|/etc/imfine|$etc|g; s|/var/lib/imfine|$state|g; s|/var/backups/imfine|$backups|g" \
        -e "s|imfine:imfine|$service_user:$service_user|; s|^\(User\|Group\)=imfine|\1=$service_user|" \
        -e "s|^user=imfine|user=$service_user|; s|user www-data|user $web_user|" "$1" >"$2.new"
    chmod "$3" "$2.new"
    mv "$2.new" "$2"
}

place_files() {
    mkdir -p "$etc" "$data" "$backups" "$root/var/www/acme" "$root/usr/local/bin" \
        "$root/etc/systemd/system/nginx.service.d"
    chmod 0700 "$state" "$data" "$backups"
    chown "$service_user:" "$state" "$data" "$backups"
    sh deploy/secrets.sh "$etc/relay.env" "$data"
    place deploy/systemd/imfine-relay.service "$root/etc/systemd/system/$unit" 0644
    place deploy/systemd/imfine-backup.service "$root/etc/systemd/system/imfine-backup.service" 0644
    place deploy/systemd/imfine-backup.timer "$root/etc/systemd/system/imfine-backup.timer" 0644
    place deploy/systemd/nginx.conf "$root/etc/systemd/system/nginx.service.d/imfine.conf" 0644
    place deploy/imfine "$root/usr/local/bin/imfine" 0755
    TLS_DIR=$etc/tls sh deploy/certificate.sh first "$domain"
}

setting() { sed -n "s/^$1=//p" "$etc/relay.env" | tail -n 1 | sed "s/^\\(['\"]\\)\\(.*\\)\\1\$/\\2/"; } # without quotes, as systemd reads it

render_nginx() {
    for name in RELAY_MAX_BODY_BYTES RELAY_MAX_UPLOAD_BYTES RELAY_MAX_ADAPTER_BYTES; do
        value=$(setting "$name")
        [ -z "$value" ] || export "$name=$value"
    done
    port=$(setting RELAY_PORT)
    DOMAIN=$domain RELAYS=127.0.0.1:${port:-8000} TLS_DIR=$etc/tls ACME_ROOT=$root/var/www/acme \
        sh deploy/nginx/render.sh >"$etc/nginx.conf.new"
    /usr/sbin/nginx -t -q -c "$etc/nginx.conf.new" -g "user $web_user;" || die "nginx refuses $etc/nginx.conf.new; the old one still serves"
    mv "$etc/nginx.conf.new" "$etc/nginx.conf"
}

# --- starting ---

switch_release() {
    if [ -e "$current" ] && [ "$(readlink "$current")" != "$release" ] && [ "${BACKUP:-yes}" = yes ]; then
        backup=$backups/before-$(basename "$release")-$(date -u +%Y%m%d-%H%M%S).tar
        say "Backing up to $backup with the version that runs"
        "$root/usr/local/bin/imfine" backup "$backup"
    fi
    ln -sfn "$release" "$current.new"
    mv -T "$current.new" "$current"
}

# What a service was started with; the same again is no reason to end anybody's stream.
started_with() { # UNIT FILES...
    unit_file=$opt/.started-$1
    shift
    { cat "$@"; readlink "$current"; } | sha256sum >"$unit_file.new"
    cmp -s "$unit_file.new" "$unit_file"
}

start_relay() {
    systemctl daemon-reload
    systemctl enable -q "$unit" nginx
    systemctl enable -q --now imfine-backup.timer
    units=$root/etc/systemd/system
    if ! started_with relay "$units/$unit" "$etc/relay.env" || ! systemctl is-active -q "$unit"; then
        say 'Starting the relay'
        systemctl restart "$unit"
        wait_ready
        mv "$opt/.started-relay.new" "$opt/.started-relay"
    fi
    if ! started_with nginx "$units/nginx.service.d/imfine.conf" "$etc/nginx.conf" || ! systemctl is-active -q nginx; then
        systemctl restart nginx
        mv "$opt/.started-nginx.new" "$opt/.started-nginx"
    fi
    rm -f "$opt"/.started-*.new
}

wait_ready() {
    port=$(setting RELAY_PORT)
    deadline=$(($(date +%s) + ready_s))
    until is_ready "http://127.0.0.1:${port:-8000}/readyz"; do
        [ "$(date +%s)" -lt "$deadline" ] || die "the relay is not ready after $ready_s s: journalctl -u $unit says why"
        sleep 0.2
    done
}

is_ready() { # URL
    python3 - "$1" <<'END' 2>/dev/null
import sys, urllib.request
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1], timeout=5)
END
}

put_certificate_back() { TLS_DIR=$etc/tls sh "$current/deploy/certificate.sh" again "$root/etc/letsencrypt/live/imfine"; }

fetch_certificate() {
    put_certificate_back # whether or not Let's Encrypt can be asked now
    say "Asking Let's Encrypt for the certificate of $domain"
    certbot certonly --non-interactive --agree-tos --email "$email" --domain "$domain" --cert-name imfine \
        --webroot --webroot-path "$root/var/www/acme" --keep-until-expiring \
        --deploy-hook "sh $current/deploy/certificate.sh" ||
        die "the relay runs, with a certificate of its own that browsers refuse. Let $domain lead to this machine, open" \
            "ports 80 and 443, and run this again"
    put_certificate_back
}

check_machine
install_packages
make_user
[ -n "${VENV:-}" ] || build_page
put_release
place_files
render_nginx
switch_release
start_relay
fetch_certificate
prune_releases
lines "" "The relay is at https://$domain" "  its admin's key:   sudo cat $data/admin.key" \
    "  gpus enrol with:   sudo cat $data/enrol.token" "  keys for people:   sudo imfine keys create --user NAME"
