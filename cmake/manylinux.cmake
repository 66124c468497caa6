# A toolchain file for `make wheel`: gcc and nvcc compile, Zig links against the symbols of glibc 2.28, so
# that the library loads on every Linux since 2018. (The CUDA runtime alone would tie it to the newer glibc
# of the machine that builds.) gcc's own runtime comes before Zig's, which else would also bring its own
# memcpy, exp and __stack_chk_fail in place of glibc's.
if(NOT CMAKE_C_COMPILER)
  set(CMAKE_C_COMPILER gcc)
endif()
foreach(what print-libgcc-file-name dumpmachine)
  execute_process(COMMAND ${CMAKE_C_COMPILER} -${what} OUTPUT_VARIABLE ${what} OUTPUT_STRIP_TRAILING_WHITESPACE
                  COMMAND_ERROR_IS_FATAL ANY)
endforeach()
string(REGEX MATCH "^[^-]+" processor ${dumpmachine})
find_package(Python3 REQUIRED COMPONENTS Interpreter)
set(CMAKE_C_CREATE_SHARED_LIBRARY
    "${Python3_EXECUTABLE} -m ziglang cc -target ${processor}-linux-gnu.2.28 <LINK_FLAGS> -s -shared \
<SONAME_FLAG><TARGET_SONAME> -o <TARGET> <OBJECTS> <LINK_LIBRARIES> ${print-libgcc-file-name}")
