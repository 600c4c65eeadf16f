#!/usr/bin/env python3
"""Which kernels run on which x86-64 processor: this one's by the flags that the system tells, older ones' under qemu's emulation.
Also that nothing but its table leaves the object file of an instruction set. Skipped (77) on other machines.

    dispatch_test.py PRODUCTS_TEST KERNELS_LIBRARY
"""

import platform
import re
import shutil
import subprocess
import sys
import unittest

PRODUCTS_TEST, LIBRARY = sys.argv[1:3]
V3 = {"avx2", "fma", "f16c", "abm", "bmi1", "bmi2"}  # as /proc/cpuinfo has them; abm is LZCNT
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
NEEDS = {  # best first
    "avx512_vbmi": V4 | {"avx512_vnni", "avx512vbmi"}, "avx512_vnni": V4 | {"avx512_vnni"}, "avx512": V4,
    "avx2_vnni": V3 | {"avx_vnni"}, "avx2": V3, "portable_v4": V4, "portable_v3": V3, "portable": set(),
}


def tables(*runner):
    told = subprocess.run([*runner, PRODUCTS_TEST, "--gtest_list_tests"], check=True, capture_output=True, text=True).stdout
    return re.findall(r"MatmulOfBlocks/(\w+)", told)


class Dispatch(unittest.TestCase):
    def test_this_processor(self):
        with open("/proc/cpuinfo") as file:
            flags = set(re.search(r"^flags\s*:(.*)$", file.read(), re.MULTILINE).group(1).split())
        self.assertEqual(tables(), [name for name, needs in NEEDS.items() if needs <= flags])

    @unittest.skipUnless(shutil.which("qemu-x86_64"), "no qemu-x86_64")
    def test_older_processors(self):
        for cpu, want in (("Nehalem", ["portable"]), ("SandyBridge", ["portable"]),
                          ("Haswell", ["avx2", "portable_v3", "portable"]), ("Haswell,-fma", ["portable"]),
                          ("Haswell,-bmi2", ["portable"]), ("Haswell,-f16c", ["portable"])):
            emulated = ("qemu-x86_64", "-cpu", cpu)
            self.assertEqual(tables(*emulated), want, cpu)
            subprocess.run([*emulated, PRODUCTS_TEST, "--gtest_brief=1", "--gtest_filter=*.MatmulWritesItsRowsOnly/*"],
                           check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def test_objects_give_their_table_alone(self):
        told = subprocess.run(["nm", "--defined-only", "--extern-only", LIBRARY], check=True, capture_output=True, text=True)
        objects = re.split(r"\n(?=\S+\.o:\n)", told.stdout.strip())
        isa = [part for part in objects if re.match(r"(avx|portable)\w*\.cpp\.o:", part)]
        self.assertEqual(len(isa), len(NEEDS))
        for part in isa:
            name, *symbols = part.splitlines()
            self.assertEqual(len(symbols), 1, part)
            self.assertRegex(symbols[0], r"kTable", name)


if __name__ == "__main__":
    if platform.machine() != "x86_64":
        print("skipped: no x86-64")
        sys.exit(77)
    unittest.main(argv=sys.argv[:1])
