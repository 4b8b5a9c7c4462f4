# The optional module cit_fast._native_cuda. Included by the CMakeLists.txt of the project after the CPU module, which nothing
# here may break: under AUTO whatever is wrong with the CUDA toolkit is one status line.

if(NOT CIT_FAST_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "CIT_FAST_CUDA=${CIT_FAST_CUDA}: accepted are AUTO, ON and OFF")
endif()
if(CIT_FAST_CUDA STREQUAL "OFF")
  message(STATUS "cit-fast: CUDA kernels left out (CIT_FAST_CUDA=OFF)")
  return()
endif()

# Machine code for A100 and H100, and PTX that later GPUs translate when they load it.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES $ENV{CUDAARCHS})
elseif(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 90-virtual)
endif()

# Sets `problem`, empty when nvcc can compile for these architectures. enable_language() would end the configuration.
function(cit_fast_try_nvcc)
  # What was not there, or did not work, the last time may be there now; and the other way round.
  if(NOT CMAKE_CUDA_COMPILER OR (IS_ABSOLUTE "${CMAKE_CUDA_COMPILER}" AND NOT EXISTS "${CMAKE_CUDA_COMPILER}"))
    unset(CMAKE_CUDA_COMPILER CACHE)
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(problem "no nvcc that works (searched: CUDACXX, CMAKE_CUDA_COMPILER, PATH)" PARENT_SCOPE)
    return()
  endif()
  # The kernels themselves, because a toolkit may lack headers, or be too old for an architecture or too new for the compiler.
  set(flags -std=c++17 -I${PROJECT_SOURCE_DIR}/csrc)
  foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
    if(architecture MATCHES "^([0-9]+[a-z]?)(-real)?$")
      list(APPEND flags -gencode arch=compute_${CMAKE_MATCH_1},code=sm_${CMAKE_MATCH_1})
    elseif(architecture MATCHES "^([0-9]+[a-z]?)-virtual$")
      list(APPEND flags -gencode arch=compute_${CMAKE_MATCH_1},code=compute_${CMAKE_MATCH_1})
    endif()
  endforeach()
  execute_process(
    COMMAND ${CMAKE_CUDA_COMPILER} ${flags} -c ${PROJECT_SOURCE_DIR}/csrc/cuda/balance_ema/balance_ema.cu
            -o ${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/cit_fast_try_nvcc.o
    RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(result EQUAL 0)
    set(problem "" PARENT_SCOPE)
  else()
    string(STRIP "${output}" output)
    set(problem "${CMAKE_CUDA_COMPILER} cannot compile for ${CMAKE_CUDA_ARCHITECTURES}: ${output}" PARENT_SCOPE)
  endif()
endfunction()

cit_fast_try_nvcc()
if(problem AND CIT_FAST_CUDA STREQUAL "ON")
  message(FATAL_ERROR "CIT_FAST_CUDA=ON: ${problem}")
elseif(problem)
  message(STATUS "cit-fast: CUDA kernels left out: ${problem}")
  return()
endif()

enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

# What `cit-fast doctor` shows: "sm_80, sm_90a, PTX 90".
set(architectures)
foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
  string(REGEX REPLACE "^(.*)-real$" "sm_\\1" architecture ${architecture})
  string(REGEX REPLACE "^(.*)-virtual$" "PTX \\1" architecture ${architecture})
  list(APPEND architectures ${architecture})
endforeach()
list(JOIN architectures ", " architectures)
message(STATUS "cit-fast: CUDA kernels for ${architectures}")

add_library(cit_fast_cuda STATIC csrc/cuda/balance_ema/balance_ema.cu csrc/cuda/wasserstein/wasserstein.cu)
target_include_directories(cit_fast_cuda PUBLIC csrc)
# As on the CPU: without contraction into fused multiply-add the average has the same bits for the same weight.
target_compile_options(cit_fast_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false -Xcompiler=-fvisibility=hidden>)

pybind11_add_module(_native_cuda csrc/cuda/bindings.cpp)
target_compile_definitions(_native_cuda PRIVATE CIT_FAST_CUDA_ARCHITECTURES="${architectures}")
target_link_libraries(_native_cuda PRIVATE cit_fast_cuda)
target_link_options(_native_cuda PRIVATE -Wl,--exclude-libs,ALL) # another module's CUDA runtime stays its own
install(TARGETS _native_cuda DESTINATION cit_fast)
