# Runners that execute the kernels of one CUDA source on the host (simt.h), without and with sanitizers:
#   cmake -S . -B build/simt -DMLP_SIMT=kernels/src/module.cu && cmake --build build/simt
#     ->  build/simt/simt, simt-thread, simt-address, simt-undefined; each is a --target, too
# Of a .cpp they call the exported functions as they are.
get_filename_component(simt_source ${MLP_SIMT} ABSOLUTE BASE_DIR ${CMAKE_SOURCE_DIR})
set(simt_host ${CMAKE_CURRENT_LIST_DIR})

if(simt_source MATCHES "\\.cpp$")
  set(simt_definitions SIMT_PLAIN KERNELS_SOURCE_HASH="")
  set(simt_preprocess -DKERNELS_SOURCE_HASH="")
  set(simt_head "visibility\\(\"default\"\\)\\)\\) void +")
else()
  set(simt_scheduler ${simt_host}/simt.cpp)
  set(simt_preprocess -D__CUDACC__)
  set(simt_head "__global__ +void +(__launch_bounds__ *\\([^)]*\\) *)?")
endif()

# The kernels' names, from the source after the preprocessor, where macros that make them are expanded.
execute_process(COMMAND ${CMAKE_CXX_COMPILER} -std=c++17 -E -P ${simt_preprocess} -x c++ ${simt_source}
                OUTPUT_VARIABLE text ERROR_VARIABLE error RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${simt_source} cannot be read: ${error}")
endif()
string(REGEX MATCHALL "${simt_head}[A-Za-z_0-9]+ *\\(" heads "${text}")
set(table "")
foreach(head IN LISTS heads)
  string(REGEX REPLACE ".*[ )]([A-Za-z_0-9]+) *\\($" "\\1" name "${head}")
  string(APPEND table "SIMT_ENTRY(${name})\n")
endforeach()
if(NOT table)
  message(FATAL_ERROR "${simt_source} has no kernel: no line matches '${simt_head}name('")
endif()
file(GENERATE OUTPUT ${CMAKE_BINARY_DIR}/simt_table.inc CONTENT "${table}")
get_filename_component(simt_folder ${simt_source} DIRECTORY)
file(GLOB simt_dependencies CONFIGURE_DEPENDS ${simt_folder}/*.cu ${simt_folder}/*.cuh ${simt_host}/*.cpp)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${simt_source} ${simt_dependencies})

find_package(Threads REQUIRED)
add_library(simt_runtime STATIC ${simt_host}/simt_runner.cpp ${simt_scheduler})
target_compile_features(simt_runtime PUBLIC cxx_std_17)
target_compile_options(simt_runtime PRIVATE -O2 -Wall -Wextra)
target_link_libraries(simt_runtime PUBLIC Threads::Threads)

include(CheckCXXSourceCompiles)
function(has_sanitizer result flag)
  set(CMAKE_REQUIRED_FLAGS ${flag})  # links, too: the run-time library may be a package of its own
  check_cxx_source_compiles("int main() {}" ${result})
endfunction()

# All of them notice misaligned accesses: it costs nothing, and a CPU goes on where a GPU's kernel ends.
has_sanitizer(SIMT_UNDEFINED -fsanitize=undefined)
if(SIMT_UNDEFINED)
  set(simt_alignment -fsanitize=alignment -fno-sanitize-recover=all)
endif()

function(add_simt_runner name)
  add_executable(${name} ${simt_host}/simt_kernels.cpp)
  target_compile_definitions(${name} PRIVATE SIMT_SOURCE="${simt_source}"
                             SIMT_TABLE="${CMAKE_BINARY_DIR}/simt_table.inc" ${simt_definitions})
  if(ARGN)
    target_compile_definitions(${name} PRIVATE KERNELS_ORDINARY_STORES)  # see stream.h
  endif()
  # An uninitialised variable holds a pattern. No fused multiply-add and no vectors: nothing comes between a kernel
  # and its meaning.
  target_compile_options(${name} PRIVATE -O1 -g -fdata-sections -ffp-contract=off -ftrivial-auto-var-init=pattern
                         -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-function ${simt_alignment} ${ARGN})
  target_link_options(${name} PRIVATE ${simt_alignment} ${ARGN} -Wl,-T,${simt_host}/simt.ld)
  target_link_libraries(${name} PRIVATE simt_runtime)
endfunction()

add_simt_runner(simt)
foreach(sanitizer thread address undefined)
  string(TOUPPER SIMT_${sanitizer} works)
  has_sanitizer(${works} -fsanitize=${sanitizer})
  if(NOT ${works})
    add_custom_target(simt-${sanitizer})
  elseif(sanitizer STREQUAL undefined)
    add_simt_runner(simt-undefined -fsanitize=undefined,float-cast-overflow)
  elseif(sanitizer STREQUAL address AND SIMT_UNDEFINED)  # the two go together, in half the time of one after another
    add_simt_runner(simt-address -fsanitize=address,undefined,float-cast-overflow)
  else()
    add_simt_runner(simt-${sanitizer} -fsanitize=${sanitizer})
  endif()
endforeach()
