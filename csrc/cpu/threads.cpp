#include <omp.h>

// Has calls of this thread of the program, of PyTorch's operators and of oneDNN's as well, share
// their work among so many threads at most. Other threads of the program keep their number.
extern "C" __attribute__((visibility("default"))) void set_threads(int most) {
  omp_set_num_threads(most);
}
