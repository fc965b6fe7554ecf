# Sets ggml_targets to what to link with, where ggml is found; its tests and the comparison with peers use it.
set(GGML_DIR "" CACHE PATH "ggml's source tree (llama.cpp/ggml), or the prefix it is installed under")
if(EXISTS "${GGML_DIR}/CMakeLists.txt" AND EXISTS "${GGML_DIR}/include/ggml.h")
  # As a part of this build: the CPU backend alone, with threads of its own.
  set(CMAKE_POLICY_DEFAULT_CMP0077 NEW) # these count as its options
  set(BUILD_SHARED_LIBS OFF)
  set(GGML_OPENMP OFF)
  if(NOT TARGET ggml)
    add_subdirectory("${GGML_DIR}" "${CMAKE_CURRENT_BINARY_DIR}/ggml" EXCLUDE_FROM_ALL)
  endif()
  set(ggml_targets ggml ggml-cpu)
elseif(GGML_DIR)
  find_package(ggml CONFIG QUIET PATHS "${GGML_DIR}" NO_DEFAULT_PATH)
else()
  find_package(ggml CONFIG QUIET)
endif()
if(NOT ggml_targets AND TARGET ggml::ggml)
  enable_language(C) # an installed ggml names a C standard, which CMake knows of a C compiler alone
  set(ggml_targets ggml::ggml ggml::ggml-base)
  if(TARGET ggml::ggml-cpu)
    list(APPEND ggml_targets ggml::ggml-cpu)
  endif()
endif()
