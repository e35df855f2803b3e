// What triton's driver and launcher call of libcuda, over no device: every call succeeds, and of
// the last launch everything that a GPU would have been given is kept.
#include <stddef.h>
#include <string.h>

typedef struct {  // as CUlaunchConfig of cuda.h begins
  unsigned grid[3], block[3], shared_bytes;
} LaunchConfig;

enum { kMost = 128, kBytes = 8 };

static int shared_limit = 232448;  // bytes that a block may have, on sm_90

static struct {
  int launches;
  LaunchConfig config;
  unsigned char values[kMost][kBytes];
} last;

static int expected;
static int widths[kMost];

void stub_limit_shared(int bytes) { shared_limit = bytes; }

// How many parameters the next kernel has, and the bytes of each: a launch passes addresses alone.
void stub_expect(int count, const int* bytes) {
  expected = count < kMost ? count : kMost;
  memcpy(widths, bytes, expected * sizeof *bytes);
}

int stub_launches(void) { return last.launches; }
void stub_config(unsigned* out) { memcpy(out, &last.config, sizeof last.config); }
void stub_values(unsigned char* out) { memcpy(out, last.values, sizeof last.values); }

int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
  (void)function;
  (void)extra;
  ++last.launches;
  last.config = *config;
  memset(last.values, 0, sizeof last.values);
  for (int i = 0; i < expected; ++i) memcpy(last.values[i], parameters[i], widths[i]);
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 10: *value = 32; return 0;            // threads of a warp
    case 12: *value = 65536; return 0;         // registers of a block
    case 16: *value = 132; return 0;           // multiprocessors
    case 81: *value = 233472; return 0;        // shared memory of a multiprocessor
    case 97: *value = shared_limit; return 0;  // of a block that asks for it
    default: *value = 1; return 0;
  }
}

int cuFuncGetAttribute(int* value, int attribute, void* function) {
  (void)function;
  *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0;  // threads of a block; registers
  return 0;
}

static int some;  // what handles point to

int cuCtxGetCurrent(void** context) {
  *context = &some;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  (void)device;
  *context = &some;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  (void)image;
  *module = &some;
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module;
  (void)name;
  *function = &some;
  return 0;
}
int cuPointerGetAttribute(unsigned long long* data, int attribute, unsigned long long pointer) {
  (void)attribute;
  *data = pointer;
  return 0;
}
// The address is all that a tensor map has here.
int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address) {
  (void)type;
  (void)rank;
  memcpy(map, &address, sizeof address);
  return 0;
}
int cuGetErrorString(int error, const char** text) {
  (void)error;
  *text = "an error of the stub";
  return 0;
}

// Whatever these are asked for, nothing comes of it.
#define DO_NOTHING(name) \
  int name(void) { return 0; }
DO_NOTHING(cuCtxSetCurrent)
DO_NOTHING(cuCtxGetLimit)
DO_NOTHING(cuCtxSetLimit)
DO_NOTHING(cuFuncSetAttribute)
DO_NOTHING(cuFuncSetCacheConfig)
DO_NOTHING(cuDriverGetVersion)
DO_NOTHING(cuOccupancyMaxActiveClusters)
DO_NOTHING(cuTensorMapEncodeIm2col)
