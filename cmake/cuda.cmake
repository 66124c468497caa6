# The CUDA back end: on when nvcc is found. cudart is linked statically and gcc does the linking, so
# that the library needs neither libcudart nor libstdc++. Architectures: CMAKE_CUDA_ARCHITECTURES if
# given, else those of the GPUs present, else 80 and 90. All of them are made of one PTX, that of the
# oldest, which is kept for newer GPUs: half of the time goes into PTX, and the machine code is the same.
if(NOT SELFKD_CUDA)
  message(STATUS "CUDA: off")
  return()
endif()
include(CheckLanguage)
if(SELFKD_CUDA STREQUAL "AUTO")
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    message(STATUS "CUDA: off (no nvcc found)")
    return()
  endif()
endif()
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  execute_process(
    COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE found ERROR_QUIET RESULT_VARIABLE failed OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT failed AND found MATCHES "^[0-9.\n]+$")
    string(REPLACE "." "" found "${found}")
    string(REPLACE "\n" ";" found "${found}")
    list(REMOVE_DUPLICATES found)
    set(CMAKE_CUDA_ARCHITECTURES ${found})
  else()
    set(CMAKE_CUDA_ARCHITECTURES 80 90)
  endif()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
message(STATUS "CUDA: ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES}")

file(GLOB cuda_kernels CONFIGURE_DEPENDS cuda/*.cu) # an operator's, or part of them
add_library(kernels_cuda OBJECT ${cuda_kernels})
if(CMAKE_CUDA_ARCHITECTURES MATCHES "^[0-9;]+$") # otherwise CMake knows what it means: "native", "90a"
  list(SORT CMAKE_CUDA_ARCHITECTURES COMPARE NATURAL)
  list(GET CMAKE_CUDA_ARCHITECTURES 0 oldest)
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES PREPEND "sm_" OUTPUT_VARIABLE code)
  list(JOIN code "," code)
  set_target_properties(kernels_cuda PROPERTIES CUDA_ARCHITECTURES OFF)
  target_compile_options(
    kernels_cuda PRIVATE "--generate-code=arch=compute_${oldest},code=[compute_${oldest},${code}]")
endif()
set_target_properties(kernels_cuda PROPERTIES CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET hidden)
target_include_directories(kernels_cuda PRIVATE ${CMAKE_SOURCE_DIR} ops cuda)
list(JOIN hardening "," hardening)
target_compile_options(
  kernels_cuda
  PRIVATE "SHELL:-Xcompiler -fno-exceptions,-fno-rtti,-fno-threadsafe-statics,${hardening}")
target_link_libraries(selfkd PRIVATE kernels_cuda CUDA::cudart_static)
target_compile_definitions(selfkd PRIVATE SK_WITH_CUDA)
# It links no CUDA code of its own; CMake wants to hear it of every target.
set_target_properties(selfkd PROPERTIES LINKER_LANGUAGE C CUDA_ARCHITECTURES OFF)
