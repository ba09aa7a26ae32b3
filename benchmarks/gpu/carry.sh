#!/usr/bin/env bash
# Packs what a GPU machine without a network lacks, for gpu_check.py: run it where pip works, from the repository's root.
#
#   benchmarks/gpu/carry.sh [small|all] [PYTHON]     PYTHON: version of the GPU machine's python3, default 3.12
#
# small: timm and safetensors (2 MB), which training needs; all: DALI and its needs too (200 MB, some minutes of xz).
# Writes runs/carry/small.00 or runs/carry/all.00, all.01, ... of 50 MiB at most, a transfer each. On the GPU machine, once
# all pieces are there (Python unpacks: xz may be missing):
#
#   cat runs/carry/all.* | python3 -c 'import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall("/tmp/site", filter="data")'
#   PYTHONPATH=/tmp/site python3 benchmarks/gpu_check.py --data runs/carry --budget_s 560
#
# CIFAR-10 travels the same way, in a folder of runs/carry: the official binary files, or tars of lossless WebP. Some of the
# training files may stay behind; the table says how many images there were.
set -euo pipefail
what=${1:-small} python=${2:-3.12}
packages=(timm safetensors)
[ "$what" = all ] && packages+=(nvidia-dali-cuda130 nvidia-nvimgcodec-cu13 nvidia-libnvcomp-cu13 nvidia-nvjpeg
	nvidia-nvjpeg2k-cu13 nvidia-nvtiff-cu13 astunparse gast six optree nvtx makefun libcst packaging)
mapfile -t pins < <(for name in "${packages[@]}"; do grep -oE "^$name==[^ ;]+" requirements.txt; done)
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
.venv/bin/python -m pip install --quiet --no-deps --no-compile --only-binary=:all: --implementation cp \
	--python-version "$python" "${platforms[@]/#/--platform=}" --target "$site" "${pins[@]}"
find "$site/nvidia/dali" -name '*.cpython-3*' ! -name "*.cpython-${python/./}-*" -delete 2>/dev/null || true # of other Pythons
mkdir -p runs/carry && rm -f runs/carry/"$what".*
tar c -C "$site" . | xz -4 --threads=0 | split --bytes=50M --numeric-suffixes - runs/carry/"$what".
ls -l runs/carry
