# Uses ccache when it is there and nobody chose a launcher.
find_program(ATTEND_CCACHE ccache)
if(ATTEND_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${ATTEND_CCACHE})
endif()
