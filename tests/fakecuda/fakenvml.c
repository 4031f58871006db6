/* SPDX-License-Identifier: Apache-2.0
 *
 * Fake libnvidia-ml.so.1: enough of NVML for counting GPUs and MIG instances and reading UUIDs
 * and PCI addresses.
 * The variables that steer it are in README.md.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9 };
enum { MIG = 1000, MOST_INSTANCES = 7 };

static int init_pid = 0;

static void log_call(const char *call) {
    const char *path = getenv("FAKECUDA_LOG");
    int fd = path ? open(path, O_WRONLY | O_APPEND | O_CREAT, 0644) : -1;
    if (fd < 0) return;
    char line[200];
    int n = snprintf(line, sizeof line, "pid=%d NVML %s (init pid %d)\n", getpid(), call, init_pid);
    if (write(fd, line, n) < 0) perror("FAKECUDA_LOG");
    close(fd);
}

static unsigned number(const char *variable, unsigned otherwise) {
    const char *value = getenv(variable);
    return value ? (unsigned)atoi(value) : otherwise;
}

int nvmlInit_v2(void) {
    if (getenv("FAKENVML_FAIL")) return DRIVER_NOT_LOADED;
    init_pid = getpid();
    log_call("init");
    return SUCCESS;
}

int nvmlInit(void) { return nvmlInit_v2(); }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return nvmlInit_v2(); }
int nvmlShutdown(void) { log_call("shutdown"); return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    log_call("count");
    *count = number("FAKECUDA_NDEV", 2);
    return SUCCESS;
}

int nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

/* A handle is the index plus one; that of a MIG instance the same above MIG. */
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (index >= number("FAKECUDA_NDEV", 2)) return INVALID_ARGUMENT;
    *device = (void *)(long)(index + 1);
    return SUCCESS;
}

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
    long handle = (long)device;
    if (handle > MIG) snprintf(uuid, length, "MIG-%08lx-1111-2222-3333-444444444444", handle - MIG);
    else snprintf(uuid, length, "GPU-%08lx-1111-2222-3333-444444444444", handle);
    return SUCCESS;
}

/* Handle n has the address 0000:n0:00.0; a MIG instance has none of its own. */
typedef struct {
    char legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char id[32];
} pci_info;

int nvmlDeviceGetPciInfo_v3(void *device, pci_info *pci) {
    long handle = (long)device;
    if (handle > MIG) return NOT_SUPPORTED;
    *pci = (pci_info){.bus = (unsigned)(16 * handle)};
    snprintf(pci->id, sizeof pci->id, "00000000:%02X:00.0", pci->bus);
    return SUCCESS;
}

/* GPU 0 is split where FAKECUDA_MIG says so; no other GPU knows MIG. */
int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    if (!getenv("FAKECUDA_MIG") || (long)device != 1) return NOT_SUPPORTED;
    *current = *pending = 1;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count) {
    (void)device;
    *count = MOST_INSTANCES;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned index, void **instance) {
    (void)device;
    if (index >= MOST_INSTANCES) return INVALID_ARGUMENT;
    if (index >= number("FAKECUDA_MIG", 0)) return NOT_FOUND;
    *instance = (void *)(long)(MIG + index + 1);
    return SUCCESS;
}

const char *nvmlErrorString(int result) { (void)result; return "fake nvml error"; }
