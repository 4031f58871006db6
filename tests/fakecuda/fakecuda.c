/* SPDX-License-Identifier: Apache-2.0
 *
 * Fake libcuda.so.1 for tests on machines without a GPU.
 *
 * It logs who calls cuInit, when and with which CUDA_VISIBLE_DEVICES, and keeps the driver's
 * fork rule: a cuInit inherited through fork answers CUDA_ERROR_NOT_INITIALIZED (3). It runs
 * no kernels. The variables that steer it are in README.md.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <execinfo.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101 };
enum { MOST_DEVICES = 64, MIG = 1000 }; /* a physical id from MIG up is an instance of GPU 0 */

static int init_pid = 0;          /* the process that called cuInit; 0 = none */
static int ndev = 0;              /* devices visible to it */
static int physical[MOST_DEVICES]; /* their physical ids */

static int log_fd(void) {
    const char *path = getenv("FAKECUDA_LOG");
    return path ? open(path, O_WRONLY | O_APPEND | O_CREAT, 0644) : -1;
}

/* One write() per line: O_APPEND keeps lines of several processes whole. */
static void log_line(const char *format, ...) {
    int fd = log_fd();
    if (fd < 0) return;
    char line[600];
    int n = snprintf(line, sizeof line, "pid=%d ppid=%d ", getpid(), getppid());
    va_list args;
    va_start(args, format);
    n += vsnprintf(line + n, sizeof line - n, format, args);
    va_end(args);
    if (n > (int)sizeof line - 2) n = sizeof line - 2;
    line[n++] = '\n';
    if (write(fd, line, n) < 0) perror("FAKECUDA_LOG");
    close(fd);
}

static int number(const char *variable, int otherwise) {
    const char *value = getenv(variable);
    int n = value ? atoi(value) : otherwise;
    return n < 0 ? 0 : n > MOST_DEVICES ? MOST_DEVICES : n;
}

/* The UUIDs are fakenvml.c's. */
static void uuid_of(int id, char *uuid, size_t size) {
    if (id >= MIG) snprintf(uuid, size, "MIG-%08x-1111-2222-3333-444444444444", id - MIG + 1);
    else snprintf(uuid, size, "GPU-%08x-1111-2222-3333-444444444444", id + 1);
}

/* Physical id of the device a token names, or -1. As in the driver, a prefix of a UUID is enough;
 * GPU 0, where it is split, stands for its first instance. */
static int device_of(const char *token, size_t length) {
    int total = number("FAKECUDA_NDEV", 2), instances = total ? number("FAKECUDA_MIG", 0) : 0, id = -1;
    char *end, uuid[64];
    long index = strtol(token, &end, 10);
    if (length && end == token + length) id = index >= 0 && index < total ? (int)index : -1;
    for (int i = 0; id < 0 && length > 4 && i < total + instances; i++) {
        int candidate = i < total ? i : MIG + i - total;
        uuid_of(candidate, uuid, sizeof uuid);
        if (!strncmp(token, uuid, length)) id = candidate;
    }
    return id == 0 && instances ? MIG : id;
}

/* As in the driver: the list ends at the first invalid token, a list with a duplicate shows nothing,
 * and a process that sees a MIG instance sees no second device. */
static int visible_devices(const char *visible) {
    int n = 0, total = number("FAKECUDA_NDEV", 2);
    char every[MOST_DEVICES * 4] = "";
    if (!visible) {
        for (int i = 0; i < total; i++) sprintf(every + strlen(every), "%d,", i);
        visible = every;
    }
    while (*visible && n < MOST_DEVICES) {
        size_t length = strcspn(visible, ",");
        int id = device_of(visible, length);
        if (id < 0) break;
        for (int i = 0; i < n; i++)
            if (physical[i] == id) return 0;
        physical[n++] = id;
        if (id >= MIG) return physical[0] = id, 1;
        visible += length;
        if (*visible == ',') visible++;
    }
    return n;
}

static void print_python_stack(void) {
    int (*ensure)(void) = dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
    void (*release)(int) = dlsym(RTLD_DEFAULT, "PyGILState_Release");
    int (*run)(const char *) = dlsym(RTLD_DEFAULT, "PyRun_SimpleString");
    if (!ensure || !release || !run) return;
    int state = ensure();
    run("import sys, traceback; print('cuInit called from:', file=sys.stderr); traceback.print_stack(limit=8)");
    release(state);
}

static void log_backtrace(void) {
    void *frames[40];
    int fd = log_fd(), n = backtrace(frames, 40);
    if (fd < 0) return;
    backtrace_symbols_fd(frames, n, fd);
    close(fd);
}

int cuInit(unsigned flags) {
    (void)flags;
    const char *visible = getenv("CUDA_VISIBLE_DEVICES"), *shown = visible ? visible : "(unset)";
    if (init_pid && init_pid != getpid()) {
        log_line("cuInit -> %d (inherited from pid %d) CVD=%s", NOT_INITIALIZED, init_pid, shown);
        return NOT_INITIALIZED;
    }
    if (!init_pid) { /* the variable is read once, at the first cuInit */
        init_pid = getpid();
        ndev = visible_devices(visible);
    }
    int result = ndev ? SUCCESS : NO_DEVICE;
    log_line("cuInit -> %d ndev=%d CVD=%s", result, ndev, shown);
    if (getenv("FAKECUDA_PYSTACK")) print_python_stack();
    if (getenv("FAKECUDA_BT")) log_backtrace();
    return result;
}

int cuDeviceGetCount(int *count) {
    if (init_pid != getpid()) return NOT_INITIALIZED; /* never, or in a parent */
    log_line("cuDeviceGetCount=%d", ndev);
    *count = ndev;
    return SUCCESS;
}

int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }

int cuDeviceGet(int *device, int index) {
    if (index < 0 || index >= ndev) return INVALID_DEVICE;
    *device = index;
    return SUCCESS;
}

int cuDeviceGetName(char *name, int length, int device) {
    if (device < 0 || device >= ndev) return INVALID_DEVICE;
    if (physical[device] >= MIG) snprintf(name, length, "Fake GPU 0 MIG 1g.10gb");
    else snprintf(name, length, "Fake GPU %d", physical[device]);
    return SUCCESS;
}

int cuDeviceGetUuid_v2(unsigned char *bytes, int device) {
    char uuid[64], *digit = uuid + 4;
    if (device < 0 || device >= ndev) return INVALID_DEVICE;
    uuid_of(physical[device], uuid, sizeof uuid);
    for (int i = 0; i < 16; i++) {
        unsigned byte;
        if (*digit == '-') digit++;
        if (sscanf(digit, "%2x", &byte) != 1) return INVALID_DEVICE;
        bytes[i] = (unsigned char)byte;
        digit += 2;
    }
    return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 1; /* compute capability 9.0 */
    return SUCCESS;
}

int cuGetErrorString(int error, const char **text) {
    *text = error == NOT_INITIALIZED ? "initialization error"
          : error == NO_DEVICE       ? "no CUDA-capable device is detected"
                                     : "fake error";
    return SUCCESS;
}

int cuGetErrorName(int error, const char **text) { (void)error; *text = "CUDA_ERROR_FAKE"; return SUCCESS; }

int cuGetExportTable(const void **table, const void *id) {
    (void)id;
    log_line("cuGetExportTable");
    *table = 0;
    return NO_DEVICE;
}

static int unknown_call(void) { log_line("generic call"); return NO_DEVICE; }

int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status);

int cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, 0);
}

static const struct { const char *name; void *function; } EXPORTS[] = {
    {"cuInit", cuInit},
    {"cuDriverGetVersion", cuDriverGetVersion},
    {"cuDeviceGetCount", cuDeviceGetCount},
    {"cuDeviceGet", cuDeviceGet},
    {"cuDeviceGetName", cuDeviceGetName},
    {"cuDeviceGetUuid", cuDeviceGetUuid_v2},
    {"cuDeviceGetUuid_v2", cuDeviceGetUuid_v2},
    {"cuDeviceGetAttribute", cuDeviceGetAttribute},
    {"cuGetErrorString", cuGetErrorString},
    {"cuGetErrorName", cuGetErrorName},
    {"cuGetExportTable", cuGetExportTable},
    {"cuGetProcAddress", cuGetProcAddress_v2}, /* callers ask for the v2 signature by this name */
    {"cuGetProcAddress_v2", cuGetProcAddress_v2},
};

int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status) {
    (void)version;
    (void)flags;
    *function = unknown_call;
    for (size_t i = 0; i < sizeof EXPORTS / sizeof *EXPORTS; i++)
        if (!strcmp(name, EXPORTS[i].name)) *function = EXPORTS[i].function;
    if (status) *status = 0;
    return SUCCESS;
}

__attribute__((constructor)) static void loaded(void) { log_line("libcuda loaded"); }
