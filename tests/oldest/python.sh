#!/usr/bin/env bash
# Prints the path of an interpreter of the oldest Python that setup.py admits.
set -euo pipefail
wanted=$(sed -nE 's/.*python_requires=">=([0-9.]+)".*/\1/p' "$(dirname "$0")/../../setup.py")

# A shim of pyenv is on PATH even where its version is not selected, so each candidate has to run.
is_wanted() {
  [ "$("$1" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$wanted" ]
}

candidates=(
  "${OLDEST_PYTHON:-}"
  "$(command -v "python$wanted" || true)"
  "${PYENV_ROOT:-$HOME/.pyenv}/versions/$wanted"*/bin/python
  "$(command -v uv > /dev/null && uv python find "$wanted" 2> /dev/null || true)"
)
for candidate in "${candidates[@]}"; do
  if [ -n "$candidate" ] && is_wanted "$candidate"; then
    echo "$candidate"
    exit
  fi
done
echo "There is no Python $wanted, the oldest that setup.py admits: install it (pyenv install $wanted, or" \
  "uv python install $wanted), name it in OLDEST_PYTHON, or set SKIP_OLDEST=1 to go without these tests." >&2
exit 1
