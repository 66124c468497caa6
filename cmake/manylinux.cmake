# A toolchain file for `make wheel`: the machine's gcc and nvcc compile, Zig links against the symbols of
# glibc 2.28, so that the library loads on every Linux since 2018. (The CUDA runtime alone would tie it to
# the newer glibc of the machine that built it.)
find_package(Python3 REQUIRED COMPONENTS Interpreter)
set(CMAKE_C_CREATE_SHARED_LIBRARY
    "${Python3_EXECUTABLE} -m ziglang cc -target x86_64-linux-gnu.2.28 <LINK_FLAGS> -s \
<CMAKE_SHARED_LIBRARY_CREATE_C_FLAGS> <SONAME_FLAG><TARGET_SONAME> -o <TARGET> <OBJECTS> <LINK_LIBRARIES>")
