#!/bin/sh
# Makes the peers' environments in the folder $1: a virtual environment each, some minutes each. What is there stays.
# A peer that cannot be installed is told, and does not keep the others from being installed.
# pip must find torch for the CPU; where it would take the CUDA build (as from PyPI on Linux), say
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make bench-peers
set -u

peers=$1
here=$(dirname "$0")
failed=0

install() { # name, command to run once pip is done
    name=$1
    [ -f "$peers/$name/.installed" ] && return
    echo "installing $name into $peers/$name"
    if .venv/bin/python -m venv --clear "$peers/$name" &&
        "$peers/$name/bin/python" -m pip --disable-pip-version-check install -q -r "$here/$name.txt" && $2; then
        touch "$peers/$name/.installed"
    else
        echo "$name: not installed" >&2
        failed=1
    fi
}

# They come as dependencies, are not needed for text, and do not load beside torch for the CPU.
without_media() {
    "$peers/vllm/bin/python" -m pip --disable-pip-version-check uninstall -q -y torchvision torchaudio torchcodec
}

bf16_gguf() {
    model=$(.venv/bin/python -c 'from parleyd.model.embedded import find_embedded_model; print(find_embedded_model())') &&
        "$peers/llama-cpp/bin/python" -m benchmarks.peers.llama_cpp --model "$model" \
            --to-bf16 "$peers/SmolLM2-135M-Instruct.BF16.gguf" >"$peers/to-bf16.log" 2>&1
}

mkdir -p "$peers"
install vllm without_media
install transformers true
install llama-cpp bf16_gguf
exit $failed
