#!/usr/bin/env bash
# Builds the C++ library with AddressSanitizer and UndefinedBehaviorSanitizer into out/sanitize and runs the tests of
# the operations on it. Any out-of-bounds access (torch's tensors lie on the sanitized heap) or undefined behaviour
# ends the run with a stack trace. Arguments go to pytest; PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
CXX=${CXX:-g++}
OUT=out/sanitize

# vptr needs RTTI of classes that other libraries own; the kernels have no virtual functions.
CHECKS="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
FASTTUNE_BUILD_CUDA=0 FASTTUNE_BUILD_CPP=1 FASTTUNE_CXXFLAGS="$CHECKS -O1 -g -fno-omit-frame-pointer" FASTTUNE_LDFLAGS="$CHECKS" \
  "$PYTHON" setup.py -q build --build-base "$OUT/build" --build-lib "$OUT/lib"

# The sanitizers' runtimes must come before everything else; libstdc++ with them, or exceptions crash.
preload=""
for library in libasan.so libubsan.so libstdc++.so.6; do
  preload+=" $("$CXX" -print-file-name="$library")"
done
# The checkout, and with it the ordinary library, stays off sys.path, in pytest's workers too.
export PYTHONSAFEPATH=1 PYTHONPATH="$PWD/$OUT/lib"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1
export OMP_WAIT_POLICY=PASSIVE  # two processes of two threads each
LD_PRELOAD="$preload" "$PYTHON" -c "
import fasttune.ops._cpp as cpp, sys
assert cpp.library is not None, cpp.unavailable_reason
assert '/$OUT/' in cpp.library.__file__, cpp.library.__file__
print('sanitized library:', cpp.library.__file__)"
# --capture=sys leaves stderr itself alone: a sanitizer's report would be lost in pytest's capture.
# What is freed stays in the sanitizer's quarantine for a while: peak memory says nothing here.
LD_PRELOAD="$preload" "$PYTHON" -m pytest tests/ops -p no:cacheprovider --capture=sys -m "not slow" \
  -k "not test_extra_memory" -n 2 --dist loadfile "$@"
