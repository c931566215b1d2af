# shellcheck shell=bash
# Sourced by the other scripts: finds a Python, makes the virtual environment and installs an extra into it once.
#   PYTHON    the interpreter to use (default: the first of python3, python3.11 ... python3.14 that is new enough)
#   RTO_VENV  where the virtual environment is (default: .venv in the repository root)
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
VENV=${RTO_VENV:-$ROOT/.venv}
[[ $VENV == /* ]] || VENV=$PWD/$VENV

say() { echo "rto_jax: $*" >&2; }
die() { say "$@"; exit 2; }

# "ok|old|bare VERSION EXECUTABLE" of an interpreter; bare: it cannot make virtual environments. Fails if it doesn't run.
probe() {
  "$1" -c '
import sys
state = "ok" if sys.version_info >= (3, 11) else "old"
try:
    import ensurepip, venv
except ImportError:
    state = "bare" if state == "ok" else state
print(state, "%d.%d.%d" % tuple(sys.version_info[:3]), sys.executable)
' 2>/dev/null
}

# Sets PYTHON to an interpreter that will do, or says in one line what is missing.
find_python() {
  local names=(python3 python3.11 python3.12 python3.13 python3.14) name state version path old="" bare=""
  [[ -z ${PYTHON:-} ]] || names=("$PYTHON")
  for name in "${names[@]}"; do
    # A name on the PATH may be a wrapper that only prints an error: what counts is that it runs.
    read -r state version path < <(probe "$name") || continue
    case $state in
      ok) PYTHON=$path; return ;;
      bare) bare=${bare:-"$name ($version) lacks venv and ensurepip; install them (Debian, Ubuntu: apt install \
python${version%.*}-venv)"} ;;
      *) old=${old:-"$name is Python $version"} ;;
    esac
  done
  [[ -z $bare ]] || die "$bare, or set PYTHON=/path/to/python3.12"
  die "Python 3.11 or newer is needed, but ${old:-"none of ${names[*]} runs"}; install it, or set PYTHON=/path/to/python3.12"
}

# The command as one line that a shell reads back as the same words.
quoted() {
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  echo "${line% }"
}

# Stops unless $1 is a module of experiments/: these scripts start nothing else.
check_module() {
  [[ $1 =~ ^experiments\.[a-z][a-z0-9_]*$ && -f $ROOT/${1//.//}.py ]] || die "no such module of experiments/: $1"
}

# install EXTRAS [REQUIREMENT...]: rto_jax[EXTRAS], editable, into $VENV; a second call with nothing changed does nothing.
install() {
  local extras=$1 state="" version path stamp key started=$SECONDS
  shift
  if [[ -f $VENV/pyvenv.cfg ]] && read -r state version path < <(probe "$VENV/bin/python"); then
    [[ $state != old ]] || die "$VENV is Python $version, and 3.11 is needed: remove it, or set RTO_VENV"
    if [[ -n ${PYTHON:-} ]]; then
      find_python
      [[ $(probe "$PYTHON") == "ok $version "* ]] ||
        die "$VENV is Python $version, not the one of PYTHON=$PYTHON: remove it, or set RTO_VENV"
    fi
  else
    [[ ! -e $VENV || -f $VENV/pyvenv.cfg || -z $(ls -A -- "$VENV") ]] || die "$VENV exists and is no virtual environment"
    find_python
    say "making $VENV with $PYTHON"
    "$PYTHON" -m venv "$VENV" || die "cannot make $VENV"
  fi

  stamp=$VENV/installed-$extras
  key="$ROOT $VENV $("$VENV/bin/python" -V) $* $(cat -- "$ROOT/setup.py" "$ROOT/pyproject.toml" | cksum)"
  if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then return; fi
  # An installation stopped half-way may have left no pip; venv adds what is missing and keeps the rest.
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv "$VENV" || die "cannot repair $VENV"
  say "installing rto_jax[$extras] (a minute or two the first time; log: $VENV/pip.log)"
  (cd -- "$ROOT" && "$VENV/bin/python" -m pip install --no-input -e ".[$extras]" "$@" >"$VENV/pip.log" 2>&1) ||
    { tail -n 5 -- "$VENV/pip.log" >&2; die "pip could not install rto_jax[$extras]; all that it said: $VENV/pip.log"; }
  echo "$key" >"$stamp"
  say "installed in $((SECONDS - started)) s"
}
