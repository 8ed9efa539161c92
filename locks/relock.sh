#!/usr/bin/env bash
# Solves pyproject.toml afresh in an empty environment and writes locks/requirements.txt. torch stays at the version that
# the old lock names, unless TORCH=x.y.z says otherwise. Called by `make lock`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_REQUIRE_VIRTUALENV=1
readonly lock=locks/requirements.txt
pin=$(grep '^torch==' "$lock")
pin=${TORCH:+torch==$TORCH}${TORCH:-$pin}
pin=torch==${pin##*=}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet "$pin"
"$work/venv/bin/python" -m pip install --quiet "$pin" --editable '.[train,data,code,generate,gguf,quant,serve,service,eval,track,dev]'
# A local part such as +cpu names one platform's build, not the version.
"$work/venv/bin/python" -m pip freeze --all --exclude-editable | grep -v -E '^(pip|wheel)==' | sed 's/+[a-z0-9.]*$//' >"$work/pins"
{
  grep '^#' "$lock"
  # What the old lock keeps to some machines stays kept to them, installed on this one or not.
  grep ';' "$lock" | grep -v '^#' | awk '
    { name = $0; sub(/==.*/, "", name) }
    FILENAME == "-" { kept[name] = $0; sub(/^[^;]*/, ""); marker[name] = $0; next }
    { print $0 marker[name]; delete kept[name] }
    END { for (name in kept) print kept[name] }' - "$work/pins"
} >"$work/lock"
cp "$work/lock" "$lock"
echo "lock: $(grep -c == "$lock") packages pinned in $lock"
