# Compiles module.cu ahead of time:
#   cmake -D NVCC=nvcc -D OUTPUT=/path/module.fatbin [-D ARCHITECTURES=80;90] -P fatbin.cmake
#
# Beside OUTPUT it writes OUTPUT.json: the hash of the sources, the options, the architectures and the hash of the
# binary. kernels/cuda.py loads the binary only where all of these are what it expects.
cmake_minimum_required(VERSION 3.18)
if(NOT ARCHITECTURES)
  set(ARCHITECTURES 75 80 86 89 90 100 120)  # as in kernels/cuda.py; an older nvcc does not know the last ones
endif()
set(options -std=c++17 -ftz=true)  # as CuPy compiles at run time

# What is compiled and hashed is a copy, so that the hash is right whatever is edited meanwhile.
set(copy ${CMAKE_CURRENT_BINARY_DIR}/fatbin-sources)
file(REMOVE_RECURSE ${copy})
file(COPY ${CMAKE_CURRENT_LIST_DIR}/ DESTINATION ${copy}
     FILES_MATCHING PATTERN *.cu PATTERN *.cuh PATTERN *.h PATTERN *.cpp)
file(GLOB_RECURSE files RELATIVE ${copy} ${copy}/*)
list(SORT files)
set(hashes "")
foreach(file IN LISTS files)
  file(SHA256 ${copy}/${file} hash)
  string(APPEND hashes ${hash})
endforeach()
string(SHA256 source_hash "${hashes}")

execute_process(COMMAND ${NVCC} --list-gpu-code OUTPUT_VARIABLE known)
string(REGEX MATCHALL "sm_[0-9]+" known "${known}")
set(built "")
set(targets "")
foreach(architecture IN LISTS ARCHITECTURES)
  if("sm_${architecture}" IN_LIST known)
    list(APPEND built ${architecture})
    list(APPEND targets -gencode=arch=compute_${architecture},code=sm_${architecture})
    set(newest ${architecture})
  endif()
endforeach()
if(NOT built)
  message(FATAL_ERROR "${NVCC} compiles for none of the architectures ${ARCHITECTURES}.")
endif()

# PTX of the newest serves GPUs that are newer still. Uncompressed: an older driver cannot unpack a newer nvcc's.
execute_process(
  COMMAND ${NVCC} ${options} ${targets} -gencode=arch=compute_${newest},code=compute_${newest} --threads=0
          --no-compress --fatbin -o ${OUTPUT}.new ${copy}/module.cu
  RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${NVCC} could not compile the GPU kernels.")
endif()
file(SHA256 ${OUTPUT}.new binary_hash)
list(JOIN options "\", \"" options)
list(JOIN built ", " built)
file(WRITE ${OUTPUT}.json.new "{\"sources\": \"${source_hash}\", \"options\": [\"${options}\"], \
\"architectures\": [${built}], \"binary\": \"${binary_hash}\"}\n")
file(RENAME ${OUTPUT}.new ${OUTPUT})
file(RENAME ${OUTPUT}.json.new ${OUTPUT}.json)
