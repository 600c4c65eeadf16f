# libtorch out of the PyPI wheel. RABIT_TORCH_DIR is the wheel's `torch` folder (include/, lib/);
# scripts/setup.sh puts it under .venv. For the CPU, libtorch_cpu and libc10 are linked directly:
# find_package(Torch) would insist on a CUDA toolkit. For GPUs libtorch_cuda is linked as well; its
# own NVIDIA libraries are looked up when the program starts, so they need not be here to build.
if(NOT RABIT_TORCH_DIR)
  file(GLOB RABIT_TORCH_FOUND ${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch)
  list(APPEND RABIT_TORCH_FOUND NOTFOUND)
  list(GET RABIT_TORCH_FOUND 0 RABIT_TORCH_FIRST)
  set(RABIT_TORCH_DIR ${RABIT_TORCH_FIRST} CACHE PATH "The torch folder of the PyPI wheel" FORCE)
endif()
if(NOT EXISTS ${RABIT_TORCH_DIR}/include/ATen/ATen.h)
  message(FATAL_ERROR "libtorch not found (RABIT_TORCH_DIR=${RABIT_TORCH_DIR}). Run scripts/setup.sh, "
                      "or configure with -DRABIT_TRAIN=OFF for a build without quantize.")
endif()

add_library(rabit_torch INTERFACE)
target_include_directories(rabit_torch SYSTEM INTERFACE
  ${RABIT_TORCH_DIR}/include ${RABIT_TORCH_DIR}/include/torch/csrc/api/include)
target_link_directories(rabit_torch INTERFACE ${RABIT_TORCH_DIR}/lib)
target_link_options(rabit_torch INTERFACE -Wl,--allow-shlib-undefined -Wl,-rpath,${RABIT_TORCH_DIR}/lib)
target_link_libraries(rabit_torch INTERFACE torch_cpu c10)
if(RABIT_CUDA)
  # Nothing of ours names a symbol of it: its kernels register themselves when it is loaded.
  target_link_libraries(rabit_torch INTERFACE -Wl,--no-as-needed torch_cuda c10_cuda -Wl,--as-needed)
endif()
