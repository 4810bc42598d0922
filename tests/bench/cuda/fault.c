// A driver library that stands before the real one and answers some calls with faults that a test asks for by environment:
//   FAULT_DRIVER=12080       cuDriverGetVersion says so
//   FAULT_CAPABILITY=75      cuDeviceGetAttribute says compute capability 7.5
//   FAULT_FILE, FAULT_CODE   once the file exists, launches, copies and waits return the code (719 launch failed, 214 ECC)
// cudarc opens `libcuda.so` by name, so LD_LIBRARY_PATH puts this first; everything else is found in the real libcuda.so.1 that
// this library depends on. Built with -DBARE it has nothing behind it and FAULT_DEVICES devices: refusals on any machine.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int Result;

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

#ifdef BARE
Result cuInit(unsigned flags) { (void)flags; return number("FAULT_INIT", 0); }
Result cuGetErrorName(Result error, const char **text) { *text = error == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR"; return 0; }
Result cuGetErrorString(Result error, const char **text) { return cuGetErrorName(error, text); }
Result cuDriverGetVersion(int *version) { *version = number("FAULT_DRIVER", 13000); return 0; }
Result cuDeviceGetCount(int *count) { *count = number("FAULT_DEVICES", 0); return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
Result cuDeviceGetName(char *name, int length, int device) { (void)device; snprintf(name, length, "a card"); return 0; }
Result cuDeviceGetAttribute(int *value, int which, int device) {
    (void)device;
    int capability = number("FAULT_CAPABILITY", 90);
    *value = which == 75 ? capability / 10 : which == 76 ? capability % 10 : 0;
    return 0;
}
#else
static void *real(const char *name) {
    static void *library;
    if (!library) library = dlopen("libcuda.so.1", RTLD_NOW);
    void *found = library ? dlsym(library, name) : NULL;
    if (!found) { fprintf(stderr, "fault.c: no %s in libcuda.so.1\n", name); abort(); }
    return found;
}

// The code to fail with, 0 for none.
static Result fault(void) {
    static Result failed;
    const char *file = getenv("FAULT_FILE");
    if (!failed && file && access(file, F_OK) == 0) failed = number("FAULT_CODE", 719);
    return failed;
}

#define FORWARD(name, parameters, arguments)                    \
    Result name parameters {                                    \
        static Result (*next) parameters;                       \
        if (!next) next = (Result (*) parameters)real(#name);   \
        Result failed = fault();                                \
        return failed ? failed : next arguments;                \
    }

FORWARD(cuGraphLaunch, (void *graph, void *stream), (graph, stream))
FORWARD(cuLaunchKernelEx, (const void *config, void *function, void **parameters, void **extra), (config, function, parameters, extra))
FORWARD(cuStreamSynchronize, (void *stream), (stream))
FORWARD(cuEventSynchronize, (void *event), (event))
FORWARD(cuMemcpyHtoDAsync_v2, (unsigned long long to, const void *from, size_t bytes, void *stream), (to, from, bytes, stream))
FORWARD(cuMemcpyDtoHAsync_v2, (void *to, unsigned long long from, size_t bytes, void *stream), (to, from, bytes, stream))

Result cuDriverGetVersion(int *version) {
    Result (*next)(int *) = (Result (*)(int *))real("cuDriverGetVersion");
    Result result = next(version);
    *version = number("FAULT_DRIVER", *version);
    return result;
}

Result cuDeviceGetAttribute(int *value, int which, int device) {
    Result (*next)(int *, int, int) = (Result (*)(int *, int, int))real("cuDeviceGetAttribute");
    Result result = next(value, which, device);
    if (getenv("FAULT_CAPABILITY") && (which == 75 || which == 76)) {
        int capability = number("FAULT_CAPABILITY", 0);
        *value = which == 75 ? capability / 10 : capability % 10;
    }
    return result;
}
#endif
