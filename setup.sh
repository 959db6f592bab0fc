#!/usr/bin/env bash
# Make .venv with everything that Percept needs. Safe to run again: it does nothing when nothing has changed.
# Variables: PYTHON (the interpreter to use, 3.11 or newer; uv finds one by default).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

stamp=.venv/.percept-setup
want=$(cat requirements.lock pyproject.toml | cksum | tr -d ' ')
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
    say ".venv is up to date"
    exit 0
fi

if command -v uv >/dev/null 2>&1; then
    uv=uv
elif [ -x .uv/bin/uv ]; then
    uv=.uv/bin/uv
else
    command -v python3 >/dev/null 2>&1 || die "python3 is missing: install Python 3.11 or newer, then run this again."
    say "fetching uv into .uv"
    python3 -m venv .uv 2>/dev/null || die "python3 cannot make virtual environments: install the package python3-venv, then run this again."
    .uv/bin/python -m pip install --quiet --disable-pip-version-check uv || die "could not fetch uv: check the network and pip's settings, then run this again."
    uv=.uv/bin/uv
fi

if [ ! -x .venv/bin/python ]; then
    say "making .venv"
    "$uv" venv --quiet --python "${PYTHON:->=3.11}" .venv || die "no Python 3.11 or newer was found: install one, or name it in the variable PYTHON."
fi
say "installing the packages of requirements.lock (some minutes and about 6 GB the first time)"
VIRTUAL_ENV="$PWD/.venv" "$uv" pip install --quiet -r requirements.lock || die "the packages could not be installed: the lines above say which and why."
VIRTUAL_ENV="$PWD/.venv" "$uv" pip install --quiet --no-deps -e . || die "Percept itself could not be installed into .venv."
printf '%s' "$want" > "$stamp"
say "done: . .venv/bin/activate"
