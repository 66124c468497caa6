# The CUDA back end: on when nvcc is found. cudart is linked statically and gcc does the linking, so
# that the library needs neither libcudart nor libstdc++. Architectures: CMAKE_CUDA_ARCHITECTURES if
# given, else those of the GPUs present, else 80 and 90; and PTX for newer ones.
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
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
  endif()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
message(STATUS "CUDA: ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES}")

list(TRANSFORM SK_STEMS REPLACE "(.+)" "cuda/\\1.cu" OUTPUT_VARIABLE cuda_kernels)
add_library(kernels_cuda OBJECT ${cuda_kernels})
set_target_properties(kernels_cuda PROPERTIES CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET hidden)
target_include_directories(kernels_cuda PRIVATE ${CMAKE_SOURCE_DIR} ops cuda)
list(JOIN hardening "," hardening)
target_compile_options(
  kernels_cuda
  PRIVATE "SHELL:-Xcompiler -fno-exceptions,-fno-rtti,-fno-threadsafe-statics,${hardening}")
target_link_libraries(selfkd PRIVATE kernels_cuda CUDA::cudart_static)
target_compile_definitions(selfkd PRIVATE SK_WITH_CUDA)
set_target_properties(selfkd PROPERTIES LINKER_LANGUAGE C)
