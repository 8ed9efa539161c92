#!/usr/bin/env bash
# Creates .venv from the lock. Called by `make setup`; running it again repairs or updates what is there.
# Knows nothing of where packages come from: pip's own configuration decides.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# pip refuses to touch anything that is not a virtual environment, and settings that would install elsewhere are dropped.
export PIP_REQUIRE_VIRTUALENV=1
unset PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PYTHONHOME
readonly venv=.venv lock=locks/requirements.txt
readonly unfinished=$venv/.setup-unfinished done_stamp=$venv/.setup-done log=$venv/setup.log

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$@" >&2; exit 3; }

# Prints the first Python that is new enough and able to make an environment.
find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3.14 python3 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

# A bin/python whose folder lost its pyvenv.cfg is the machine's own Python under another name: packages would land there.
is_environment() {
  "$venv/bin/python" -c 'import os, sys; sys.exit(os.path.realpath(sys.prefix) != os.path.realpath(sys.argv[1]))' "$venv" 2>/dev/null
}

# An environment is kept when it was finished, in this very folder, and its Python still runs: scripts hold absolute
# paths, and a pip that was killed can leave a package that looks installed and is not.
reusable() {
  is_environment && [ ! -e "$unfinished" ] && [ -e "$done_stamp" ] && [ "$(cat "$done_stamp")" = "$(pwd -P)" ] \
    && "$venv/bin/python" -m pip --version >/dev/null 2>&1
}

install() {
  local title=$1
  shift
  say "$title"
  if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >>"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    fail "installing failed; the whole output is in $log" "check the network and free disk space (2 GB), then run 'make setup' again"
  fi
}

# Two `make` at once: the second waits for the first instead of taking its half-made environment away.
wait_for_other() {
  local other
  while other=$(cat "$unfinished" 2>/dev/null) && [ -n "$other" ] && [ "$other" != $$ ] \
    && ps -p "$other" -o args= 2>/dev/null | grep -q 'setup\.sh'; do
    [ "${said_waiting:-}" ] || say "another setup (process $other) is at work; waiting"
    said_waiting=1
    sleep 1
  done
  [ -z "${said_waiting:-}" ] || [ ! -e "$done_stamp" ] || exit 0
}

started=$SECONDS
wait_for_other
if ! reusable; then
  python=$(find_python) || fail "Python 3.11 or newer with the venv module is needed, and none was found" \
    "Debian and Ubuntu: apt-get install python3 python3-venv    macOS: brew install python@3.12" \
    "or name one: make setup PYTHON=/path/to/python3"
  say "creating $venv with $("$python" --version) ($(command -v "$python"))"
  # The mark comes first: a removal that is interrupted leaves a folder that must not pass for an environment.
  mkdir -p "$venv"
  echo $$ >"$unfinished"
  find "$venv" -mindepth 1 -maxdepth 1 ! -name "$(basename "$unfinished")" -exec rm -rf {} +
  "$python" -m venv "$venv"
  is_environment || fail "$python -m venv made no working environment in $venv" "remove $venv and run 'make setup' again"
fi
echo $$ >"$unfinished"
rm -f "$done_stamp"
: >"$log"
# torch first and alone: with an exact pin pip takes the build meant for this machine before anything else can ask for another.
install "installing $(grep '^torch==' "$lock") (the largest part; a minute or more)" --constraint "$lock" "$(grep '^torch==' "$lock")"
install "installing $(grep -c '==' "$lock") pinned packages" --requirement "$lock"
if "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$lock" --requirement locks/mlx.txt \
  >>"$log" 2>&1 </dev/null; then
  say "MLX is installed (engine=mlx)"
else
  say "MLX has no build for this machine or could not be fetched; engine=mlx is not available, all else is ($log)"
fi
install "installing model_foundry itself, editable" --no-deps --no-build-isolation --editable .
"$venv/bin/python" -m pip check >>"$log" 2>&1 || fail "installed packages contradict each other: $(tail -n 3 "$log")"
rm -f "$unfinished"
pwd -P >"$done_stamp"
say "done in $((SECONDS - started)) s; the command is $venv/bin/foundry"
