# The toolchain file of `make wheel` for the other processor.
include(${CMAKE_CURRENT_LIST_DIR}/aarch64.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/manylinux.cmake)
