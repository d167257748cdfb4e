# The levels of the x86-64 kernels, lowest first: enum IsaLevel.
set(attend_isa_levels scalar avx2 avx512 avx512_vnni avx512_spr amx)
set(ATTEND_HIGHEST_ISA amx CACHE STRING
    "Highest level of x86-64 kernels to build; machines with a higher one use it, too")
set_property(CACHE ATTEND_HIGHEST_ISA PROPERTY STRINGS ${attend_isa_levels})
list(FIND attend_isa_levels "${ATTEND_HIGHEST_ISA}" attend_highest_isa)
if(attend_highest_isa LESS 0)
  message(FATAL_ERROR "ATTEND_HIGHEST_ISA=${ATTEND_HIGHEST_ISA}: known are ${attend_isa_levels}")
endif()

if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(attend_highest_isa 0)
endif()
file(CONFIGURE OUTPUT generated/highest_isa.inc
     CONTENT "#define ATTEND_HIGHEST_ISA @attend_highest_isa@\n" @ONLY)

# attend_isa_sources(LEVEL FILES...): adds files of the current folder to the library if the level is
# to be built.
function(attend_isa_sources level)
  list(FIND attend_isa_levels "${level}" index)
  if(index LESS 0)
    message(FATAL_ERROR "attend_isa_sources: no level ${level}")
  endif()
  if(index GREATER attend_highest_isa)
    return()
  endif()
  attend_sources(${ARGN})
  # GCC 12 takes the undefined operands inside its own AVX-512 headers for mistakes.
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND index GREATER_EQUAL 2)
    foreach(file IN LISTS ARGN)
      set_source_files_properties("${CMAKE_CURRENT_SOURCE_DIR}/${file}" TARGET_DIRECTORY attend
                                  PROPERTIES COMPILE_OPTIONS -Wno-uninitialized)
    endforeach()
  endif()
endfunction()
