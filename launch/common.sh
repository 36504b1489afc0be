# shellcheck shell=bash
# Sourced by the launch scripts: sets up the project's own virtual environment once and puts it on PATH.
#
# LATTE_FLOW_PYTHON=/path/to/python   use this interpreter as it is (an environment, a module): nothing is installed.
# LATTE_FLOW_VENV=DIR                 folder of the environment, relative to the repository; default: .venv.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '[latte-flow] %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

# Print the first Python 3.11 or 3.12 found on PATH.
find_python() {
    local candidate
    for candidate in python3.12 python3.11 python3 python; do
        # Debian's python3 comes without ensurepip.
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 with the modules venv and ensurepip found on PATH (Debian: apt-get install python3-venv); \
install one, or set LATTE_FLOW_PYTHON to one that has the packages of setup.cfg"
}

# What an environment depends on. Its scripts contain its absolute path, so a moved repository needs a new one.
stamp_of() {
    printf '%s\n' "$1" "$("$1/bin/python" -c 'import sys; print(sys.version)' 2>/dev/null)"
    cat "$ROOT/setup.cfg" "$ROOT/pyproject.toml" | sha256sum
}

# Create or complete the virtual environment. A stamp file inside it records what was installed. It is written last, so the next
# start repairs an interrupted installation, and a changed setup.cfg is installed again.
setup_environment() {
    if [ -n "${LATTE_FLOW_PYTHON:-}" ]; then
        local bin problem
        problem=$("$LATTE_FLOW_PYTHON" -c 'import deepspeed, transformers' 2>&1 >/dev/null) ||
            fail "LATTE_FLOW_PYTHON: $LATTE_FLOW_PYTHON lacks the packages of setup.cfg (${problem##*$'\n'}); run: $LATTE_FLOW_PYTHON -m pip install -e '${ROOT}[test]'"
        bin=$(dirname "$LATTE_FLOW_PYTHON")
        # The scripts call both by name: with only an interpreter they would run another environment's.
        if [ ! -x "$bin/python" ] || [ ! -x "$bin/deepspeed" ]; then
            fail "LATTE_FLOW_PYTHON: $bin lacks python or deepspeed; accepted: the python of an environment with both in the same folder"
        fi
        PATH="$bin:$PATH"
        export PATH PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi
    local venv=${LATTE_FLOW_VENV:-$ROOT/.venv} python started=$SECONDS
    case $venv in /*) ;; *) venv=$ROOT/$venv ;; esac
    (
        # Scripts started at the same time must not install into the environment concurrently.
        flock 9
        local stamp=$venv/latte_flow.stamp unfinished=$venv/latte_flow.unfinished
        if [ "$(cat "$stamp" 2>/dev/null)" != "$(stamp_of "$venv")" ]; then
            # pip treats a partially installed package as installed, so an environment left by a kill is not reused.
            if [ -e "$unfinished" ] || { [ -e "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$venv" ]; } ||
                ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
                if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ ! -e "$unfinished" ]; then
                    fail "$venv: holds files and is not a virtual environment; accepted for LATTE_FLOW_VENV: a new or empty folder, or an environment"
                fi
                python=$(find_python) || exit 2
                say "creating $venv with $("$python" --version)"
                [ ! -L "$venv" ] || rm "$venv" # do not empty the target of a link
                mkdir -p "$venv"
                touch "$unfinished"
                # The marker stays while the rest is deleted: after a kill it identifies the folder as ours.
                find "$venv" -mindepth 1 -maxdepth 1 ! -path "$unfinished" -exec rm -rf {} +
                "$python" -m venv "$venv" || fail "$python could not create $venv"
            fi
            say "installing the packages of setup.cfg into $venv: several GB, about 2 minutes on a fast connection"
            touch "$unfinished"
            if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "${ROOT}[test]"; then
                rm -f "$unfinished" # pip was not killed: what it installed is complete
                fail "installation failed; the next start continues it"
            fi
            stamp_of "$venv" >"$stamp"
            rm -f "$unfinished"
            say "environment ready after $((SECONDS - started)) s; it is reused from now on"
        fi
    ) 9>"$ROOT/.setup.lock" || exit $?
    PATH="$venv/bin:$PATH"
    export PATH
    # Compiled operators belong to the environment: shared between two environments, they would be recompiled at every switch.
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}
}

# Without a GPU, DeepSpeed runs on the CPU.
setup_accelerator() {
    local gpus=
    if [ "${DS_ACCELERATOR:-}" != cpu ] && command -v nvidia-smi >/dev/null; then
        # Into a variable: a pipe to grep -q may kill nvidia-smi with SIGPIPE, which pipefail would treat as "no GPU".
        gpus=$(nvidia-smi -L 2>&1) || { say "nvidia-smi failed: $gpus"; gpus=; }
    fi
    case $gpus in *GPU*) return ;; esac
    # One node on the CPU would stall all other nodes on GPUs.
    if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && [ "${DS_ACCELERATOR:-}" != cpu ]; then
        fail "$(hostname): the job has $SLURM_GPUS_ON_NODE GPUs here and nvidia-smi shows none; fix the node, or set DS_ACCELERATOR=cpu"
    fi
    [ "${DS_ACCELERATOR:-}" = cpu ] || say "no GPU found: using the CPU"
    export DS_ACCELERATOR=cpu
    # Waiting OpenMP threads sleep. By default they spin and take the core from the thread they wait for.
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
}

if [ -n "${LATTE_FLOW_PYTHON:-}" ]; then
    # Before the cd below, which would break a relative path.
    LATTE_FLOW_PYTHON=$("$LATTE_FLOW_PYTHON" -c 'import sys; print(sys.executable)') ||
        fail "LATTE_FLOW_PYTHON: not a working Python; accepted: the path of one"
fi
cd "$ROOT" || exit 2
