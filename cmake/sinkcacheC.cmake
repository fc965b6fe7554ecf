# sinkcache_add_c_interface(<target> [STATIC|SHARED]): a library of the C interface (sinkcache/sinkcache.h), compiled from
# its source with the host's own flags: give it -march as you give it to the engine.
function(sinkcache_add_c_interface target)
  if(NOT CMAKE_CXX_COMPILER_LOADED)
    message(FATAL_ERROR "sinkcache: the C interface is compiled as C++: project(... LANGUAGES C CXX)")
  endif()
  find_package(Threads REQUIRED)
  get_target_property(include sinkcache::sinkcache INTERFACE_INCLUDE_DIRECTORIES)
  string(REGEX REPLACE "\\$<BUILD_INTERFACE:([^>]*)>.*" "\\1" include "${include}")
  list(GET include 0 include)
  add_library(${target} ${ARGN} "${include}/sinkcache/sinkcache.cpp")
  target_include_directories(${target} SYSTEM PUBLIC "$<BUILD_INTERFACE:${include}>")
  target_link_libraries(${target} PRIVATE sinkcache::sinkcache Threads::Threads)
endfunction()
