#!/usr/bin/env bash
# Make .venv with what Percept needs. Safe to run again: it does nothing when nothing has changed.
#
#   bash setup.sh                 what every recipe needs (`make demo` calls this)
#   bash setup.sh --extra NAME    and one extra: nsd, search, captions, attribution, tracking, docs,
#                                 scale
#   bash setup.sh --all           every extra but scale, and what tests need (`make test` calls this)
#
# Variables: PYTHON (the interpreter to use, 3.11 or newer; uv finds one by default).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

level=core
extras=()
while [ $# -gt 0 ]; do
    case "$1" in
        --all) level=all ;;
        --extra)
            [ $# -gt 1 ] ||
                die "--extra takes a name: nsd, search, captions, attribution, tracking, docs or scale."
            case "$2" in
                nsd | search | captions | attribution | tracking | docs | scale) extras+=("$2") ;;
                *) die "there is no extra '$2': choose nsd, search, captions, attribution, tracking, docs or scale." ;;
            esac
            shift
            ;;
        *) die "'$1' is no option: choose --all or --extra NAME, or none." ;;
    esac
    shift
done

# The stamp holds a checksum of what .venv was made from, and then the sets that were installed.
stamp=.venv/.percept-setup
sum=$(cat requirements.lock requirements-all.lock pyproject.toml | cksum | tr -d ' ')
installed=""
if [ -x .venv/bin/python ] && [ "$(head -n 1 "$stamp" 2>/dev/null)" = "$sum" ]; then
    installed=" $(tail -n +2 "$stamp" | tr '\n' ' ')"
fi
has() { case "$installed" in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

missing=()
has all || has "$level" || missing+=("$level")
for extra in ${extras[@]+"${extras[@]}"}; do
    if has "$extra" || { [ "$extra" != scale ] && { has all || [ "$level" = all ]; }; }; then
        continue
    fi
    missing+=("$extra")
done
if [ ${#missing[@]} -eq 0 ]; then
    say ".venv is up to date"
    exit 0
fi

if command -v uv >/dev/null 2>&1; then
    uv=uv
elif [ -x .uv/bin/uv ]; then
    uv=.uv/bin/uv
else
    command -v python3 >/dev/null 2>&1 ||
        die "python3 is missing: install Python 3.11 or newer, then run this again."
    say "fetching uv into .uv"
    python3 -m venv .uv 2>/dev/null ||
        die "python3 cannot make virtual environments: install the package python3-venv, then run this again."
    .uv/bin/python -m pip install --quiet --disable-pip-version-check uv ||
        die "could not fetch uv: check the network and pip's settings, then run this again."
    uv=.uv/bin/uv
fi

if [ ! -x .venv/bin/python ]; then
    say "making .venv"
    "$uv" venv --quiet --python "${PYTHON:->=3.11}" .venv ||
        die "no Python 3.11 or newer was found: install one, or name it in the variable PYTHON."
fi
export VIRTUAL_ENV="$PWD/.venv"
for set in "${missing[@]}"; do
    case "$set" in
        core)
            say "installing the packages of requirements.lock (some minutes, about 6 GB)"
            "$uv" pip install --quiet -r requirements.lock ||
                die "the packages could not be installed: the lines above say which and why."
            ;;
        all)
            say "installing the packages of requirements-all.lock (some minutes, about 7 GB)"
            "$uv" pip install --quiet -r requirements-all.lock ||
                die "the packages could not be installed: the lines above say which and why."
            ;;
        *)
            say "installing the extra $set"
            "$uv" pip install --quiet -c requirements-all.lock -e ".[$set]" ||
                die "the extra $set could not be installed: the lines above say why."
            ;;
    esac
done
"$uv" pip install --quiet --no-deps -e . || die "Percept itself could not be installed into .venv."
{ printf '%s\n' "$sum"; for set in $installed "${missing[@]}"; do printf '%s\n' "$set"; done; } > "$stamp"
say "done: . .venv/bin/activate"
