# shellcheck shell=bash
# Sourced by the launch scripts: sets up the project's own virtual environment, once, and puts it on PATH.
#
# LATTE_FLOW_PYTHON=/path/to/python   use this interpreter as it is (an environment, a module): nothing is installed.
# LATTE_FLOW_VENV=DIR                 where the environment lives; default: .venv in the repository.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '[latte-flow] %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

# Print the first Python 3.11 or 3.12 found on PATH.
find_python() {
    local candidate
    for candidate in python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 with the module venv found on PATH; install one, or name it with LATTE_FLOW_PYTHON"
}

# Create or complete the virtual environment. A stamp inside it says what was installed: it is written last, so an interrupted
# installation is completed by the next start, and a changed setup.cfg is installed again.
setup_environment() {
    if [ -n "${LATTE_FLOW_PYTHON:-}" ]; then
        "$LATTE_FLOW_PYTHON" -c 'import deepspeed, transformers' ||
            fail "LATTE_FLOW_PYTHON: $LATTE_FLOW_PYTHON lacks the packages of setup.cfg; run: $LATTE_FLOW_PYTHON -m pip install -e '${ROOT}[test]'"
        PATH="$(dirname "$LATTE_FLOW_PYTHON"):$PATH"
        export PATH PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi
    local venv=${LATTE_FLOW_VENV:-$ROOT/.venv} python wanted started=$SECONDS
    (
        # Two scripts started together must not install into one environment at the same time.
        flock 9
        wanted=$(cat "$ROOT/setup.cfg" "$ROOT/pyproject.toml" | sha256sum | cut -d' ' -f1)
        if [ "$(cat "$venv/latte_flow.stamp" 2>/dev/null)" != "$wanted" ]; then
            if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
                python=$(find_python) || exit 2
                say "creating $venv with $("$python" --version)"
                rm -rf "$venv"
                "$python" -m venv "$venv" || fail "$python has no module venv (Debian: apt-get install python3-venv)"
            fi
            say "installing the packages of setup.cfg into $venv: several GB, about 2 minutes on a fast connection"
            "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "${ROOT}[test]" ||
                fail "installation failed; the next start goes on with it"
            printf '%s' "$wanted" >"$venv/latte_flow.stamp"
            say "environment ready after $((SECONDS - started)) s; it is reused from now on"
        fi
    ) 9>"$ROOT/.setup.lock" || exit $?
    PATH="$venv/bin:$PATH"
    export PATH
    # Compiled operators belong to the environment: shared between two environments they would be compiled anew at every change.
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}
}

# Without a GPU, DeepSpeed runs on the CPU; it compiles a small communication operator at its first start.
setup_accelerator() {
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        return
    fi
    export DS_ACCELERATOR=cpu
    command -v g++ >/dev/null || fail "g++ not found; DeepSpeed on the CPU compiles an operator (Debian: apt-get install g++)"
}

cd "$ROOT" || exit 2
