#!/usr/bin/env python3
"""Kernels for 64-bit ARM: cross-compiles them and kernels_test into the folder it is given, and runs
all of kernels_test under qemu's emulation. Skipped (77) where the compiler, qemu or GoogleTest's
sources are missing."""
import os
import shutil
import subprocess
import sys

GOOGLETEST = "/usr/src/googletest/googletest"


def main() -> int:
    source, build = os.environ["RABIT_SOURCE_DIR"], sys.argv[1]
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    missing = [name for name, found in [
        ("aarch64-linux-gnu-g++", shutil.which("aarch64-linux-gnu-g++")),
        ("qemu-aarch64", emulator),
        (GOOGLETEST, os.path.isdir(GOOGLETEST)),
    ] if not found]
    if missing:
        print("skipped: no", ", ".join(missing))
        return 77
    launcher = shutil.which("ccache") or ""
    subprocess.run(["cmake", "-S", f"{source}/tests/aarch64", "-B", build, "-DCMAKE_BUILD_TYPE=Release",
                    f"-DCMAKE_TOOLCHAIN_FILE={source}/cmake/aarch64.cmake",
                    f"-DRABIT_GOOGLETEST={GOOGLETEST}", f"-DCMAKE_CXX_COMPILER_LAUNCHER={launcher}"],
                   check=True)
    subprocess.run(["cmake", "--build", build, "--target", "kernels_test", "-j", str(os.cpu_count())],
                   check=True)
    listed = subprocess.run([emulator, f"{build}/kernels_test", "--gtest_list_tests"], check=True,
                            capture_output=True, text=True).stdout
    for table in ("neon", "neon_dotprod"):
        if f"/{table}  #" not in listed:
            print("error: no test of the table", table)
            return 1
    return subprocess.run([emulator, f"{build}/kernels_test", "--gtest_brief=1"]).returncode


if __name__ == "__main__":
    sys.exit(main())
