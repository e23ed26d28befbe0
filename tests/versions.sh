#!/usr/bin/env bash
# Run the tests with another Python and other package versions, in an environment of their own.
#
#   tests/versions.sh 3.10 lowest                   the lower bounds in requirements*.txt, all tests
#   tests/versions.sh 3.13 newest                   the latest versions, all tests
#   tests/versions.sh 3.10 lowest -x tests/test_nms.py        more arguments are for pytest
#
# The first argument is a version, whose python is looked for in PATH and among those of pyenv, or
# the path of a python. The environment takes 6 GB in a temporary folder, and goes when the tests
# end; VENV=FOLDER keeps it there, and uses it again. PIP_FLAGS are more arguments for pip.
set -euo pipefail

usage() {
  sed -n '4,6s/^# *//p' "$0" >&2
  exit 2
}

# The python of the wanted version; versions of pyenv that are not chosen do not count in PATH.
find_python() {
  local candidate versions=${PYENV_ROOT:-$HOME/.pyenv}/versions
  for candidate in "$1" "python$1" "$versions/$1/bin/python" "$versions/$1".*/bin/python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import venv' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  echo "there is no Python $1 here; install it, for example with: pyenv install $1" >&2
  exit 1
}

[ $# -ge 2 ] && [[ $2 == lowest || $2 == newest ]] || usage
python=$(find_python "$1")
bound=$2
shift 2

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
venv=${VENV:-$folder/venv}
mkdir -p "$venv"
venv=$(cd "$venv" && pwd)
"$python" -m venv "$venv"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# All lower bounds as exact versions; what only developers need is always the latest.
if [ "$bound" = lowest ]; then
  sed -n 's/^\([a-z-]*\)>=/\1==/; s/==.*/&.*/p' requirements.txt requirements-export.txt
fi >"$folder/constraints.txt"
# shellcheck disable=SC2086  # several arguments
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${PIP_FLAGS:-} --upgrade \
  -r requirements.txt -r requirements-dev.txt -c "$folder/constraints.txt"

"$venv/bin/python" -c '
import platform
from importlib.metadata import version
packages = "torch torchvision numpy opencv-python onnx onnxruntime openvino".split()
print("Python", platform.python_version(), *(f"{name} {version(name)}" for name in packages))
'
"$venv/bin/python" -m pytest -m "" -n 2 --dist loadfile --no-loadscope-reorder "$@"
