# For -DCMAKE_PROJECT_sinkcache_INCLUDE: the dependencies as headers alone, since this machine's libraries are of no use
# to a cross compiler. They are linked into one folder: all of /usr/include would bring in the wrong libc.
foreach(headers eigen3/Eigen fmt nlohmann CLI catch2)
  cmake_path(GET headers FILENAME name)
  file(MAKE_DIRECTORY "${PROJECT_BINARY_DIR}/host_headers")
  file(CREATE_LINK /usr/include/${headers} "${PROJECT_BINARY_DIR}/host_headers/${name}" SYMBOLIC)
endforeach()
foreach(target Eigen3::Eigen fmt::fmt nlohmann_json::nlohmann_json CLI11::CLI11 Catch2::Catch2)
  add_library(${target} INTERFACE IMPORTED)
  target_include_directories(${target} INTERFACE "${PROJECT_BINARY_DIR}/host_headers")
endforeach()
target_compile_definitions(fmt::fmt INTERFACE FMT_HEADER_ONLY)
# First, or fmt 9's unqualified compare() finds the examples' namespace of that name.
target_compile_options(fmt::fmt INTERFACE "SHELL:-include fmt/format.h")
