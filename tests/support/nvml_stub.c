/*
 * A stand-in for libnvidia-ml.so.1 that speaks NVML's binary interface, as nvidia-ml-py 13 has it.
 *
 * stub_control() takes commands, one a line; STUB_NVML in the environment holds those to begin with:
 *
 *   gpus COUNT                         this many GPUs, as they are by default
 *   init CODE                          what nvmlInit returns
 *   set GPU NAME VALUE                 a figure; the names are in FIGURES below
 *   fail FUNCTION GPU CODE             a function returns an error; GPU -1: for all; FUNCTION *: every one
 *   link GPU LINK STATE REMOTE         an NVLink; REMOTE: a GPU, -1: a switch
 *   ancestor LEVEL                     of every two GPUs
 *   process GPU PID BYTES              a process computes there; BYTES -1: the driver does not tell
 *   xid GPU CODE INSTANCE              an event; INSTANCE -1: of the whole GPU
 *
 * With -DOLD it is the library of an old driver, without what came later.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_GPUS 16
#define MAX_LINKS 18
#define MAX_PROCESSES 32
#define MAX_EVENTS 128
#define MAX_FAILURES 64
#define PARTS_OF_FIRST 2
#define NOT_SUPPORTED 3
#define INVALID_ARGUMENT 2

typedef int Return;
typedef unsigned long long u64;
typedef struct { int index; int part; } Device; /* part -1: the whole GPU */
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } Pci;
typedef struct { unsigned pid; u64 memory; unsigned instance, compute_instance; } Process;
typedef struct { unsigned id, scope; long long time, latency; int type, result; union { unsigned ui; u64 ull; } value; } Field;
typedef struct { Device *device; u64 type, data; unsigned instance, compute_instance; } Event;
typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;

static const char *FIGURES[] = {
    "utilization", "memory_utilization", "used_bytes", "total_bytes", "celsius", "memory_celsius", "milliwatts",
    "limit_milliwatts", "sm_mhz", "memory_mhz", "max_sm_mhz", "slowdown_celsius", "reasons", "corrected", "uncorrected",
    "pending", "failed", "link_errors", "numa_node", "p2p", 0};
static const long long DEFAULTS[] = {75, 10, 1LL << 30, 80LL << 30, 61, 70, 312500,
    700000, 1980, 2619, 1980, 90, 0, 5, 0,
    0, 0, 1, 1, 0};
enum { UTILIZATION, MEMORY_UTILIZATION, USED, TOTAL, CELSIUS, MEMORY_CELSIUS, MILLIWATTS, LIMIT, SM, MEM, MAX_SM,
    SLOWDOWN, REASONS, CORRECTED, UNCORRECTED, PENDING, FAILED, LINK_ERRORS, NUMA_NODE, P2P, FIGURE_COUNT };

static int running, init_result, gpu_count, ancestor_level, process_count, event_count, failure_count;
static Device gpus[MAX_GPUS], parts[PARTS_OF_FIRST];
static long long figures[MAX_GPUS][FIGURE_COUNT];
static struct { int state, remote; } links[MAX_GPUS][MAX_LINKS];
static struct { int gpu; unsigned pid; u64 bytes; } processes[MAX_PROCESSES];
static struct { int gpu, code, instance; } events[MAX_EVENTS];
static struct { char function[80]; int gpu, code; } failures[MAX_FAILURES];
static unsigned registered; /* A bit for each GPU that events are wanted of. */
static u64 calls;

static void reset(int count) {
  running = 0; init_result = 0; gpu_count = count; ancestor_level = 50;
  process_count = event_count = failure_count = 0; registered = 0;
  for (int gpu = 0; gpu < MAX_GPUS; gpu++) {
    gpus[gpu].index = gpu; gpus[gpu].part = -1;
    memcpy(figures[gpu], DEFAULTS, sizeof DEFAULTS);
    figures[gpu][USED] = (gpu + 1LL) << 30;
    for (int link = 0; link < MAX_LINKS; link++) links[gpu][link].state = -1;
  }
  for (int part = 0; part < PARTS_OF_FIRST; part++) { parts[part].index = 0; parts[part].part = part; }
}

int stub_control(const char *text) {
  char line[256], name[80]; int a, b, c, d; long long value;
  for (; *text; text += strcspn(text, "\n;") + (text[strcspn(text, "\n;")] != 0)) {
    size_t length = strcspn(text, "\n;");
    if (length == 0) continue;
    if (length >= sizeof line) return -1;
    memcpy(line, text, length); line[length] = 0;
    if (sscanf(line, "gpus %d", &a) == 1) reset(a);
    else if (sscanf(line, "init %d", &a) == 1) init_result = a;
    else if (sscanf(line, "ancestor %d", &a) == 1) ancestor_level = a;
    else if (sscanf(line, "set %d %79s %lld", &a, name, &value) == 3) {
      int figure = 0;
      while (FIGURES[figure] && strcmp(FIGURES[figure], name)) figure++;
      if (!FIGURES[figure]) return -2;
      figures[a][figure] = value;
    } else if (sscanf(line, "fail %79s %d %d", name, &a, &b) == 3) {
      if (failure_count == MAX_FAILURES) return -3;
      strcpy(failures[failure_count].function, name);
      failures[failure_count].gpu = a; failures[failure_count++].code = b;
    } else if (!strcmp(line, "mend")) failure_count = 0;
    else if (sscanf(line, "link %d %d %d %d", &a, &b, &c, &d) == 4) { links[a][b].state = c; links[a][b].remote = d; }
    else if (sscanf(line, "process %d %d %lld", &a, &b, &value) == 3) {
      if (process_count == MAX_PROCESSES) return -3;
      processes[process_count].gpu = a; processes[process_count].pid = (unsigned)b;
      processes[process_count++].bytes = (u64)value;
    } else if (!strcmp(line, "no processes")) process_count = 0;
    else if (sscanf(line, "xid %d %d %d", &a, &b, &c) == 3) {
      if (event_count == MAX_EVENTS) return -3;
      events[event_count].gpu = a; events[event_count].code = b; events[event_count++].instance = c;
    } else return -4;
  }
  return 0;
}

u64 stub_calls(void) { return calls; }

__attribute__((constructor)) static void begin(void) {
  const char *text = getenv("STUB_NVML");
  reset(2);
  if (text && stub_control(text)) { fprintf(stderr, "STUB_NVML cannot be read: %s\n", text); abort(); }
}

static Return failing(const char *function, int gpu) {
  calls++;
  if (!running) return 1;
  for (int i = failure_count - 1; i >= 0; i--)
    if ((failures[i].gpu == -1 || failures[i].gpu == gpu) &&
        (!strcmp(failures[i].function, "*") || !strcmp(failures[i].function, function)))
      return failures[i].code;
  return 0;
}
#define CHECK(device) do { Return bad = failing(__func__, (device)->index); if (bad) return bad; } while (0)
/* What a part of a GPU is not asked for. */
#define WHOLE(device) do { CHECK(device); if ((device)->part >= 0) return NOT_SUPPORTED; } while (0)
#define FIGURE(device, name) figures[(device)->index][name]

Return nvmlInitWithFlags(unsigned flags) { (void)flags; if (!init_result) running++; return init_result; }
Return nvmlShutdown(void) { if (running) running--; return 0; }
const char *nvmlErrorString(Return result) { return result == 9 ? "Driver Not Loaded" : "Other"; }
Return nvmlDeviceGetCount_v2(unsigned *count) { Return bad = failing(__func__, -1); *count = gpu_count; return bad; }
Return nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
  Return bad = failing(__func__, index);
  if (bad) return bad;
  if ((int)index >= gpu_count) return INVALID_ARGUMENT;
  *device = &gpus[index]; return 0;
}
Return nvmlDeviceGetIndex(Device *device, unsigned *index) { WHOLE(device); *index = device->index; return 0; }
Return nvmlDeviceGetUUID(Device *device, char *uuid, unsigned size) {
  CHECK(device);
  if (device->part >= 0) snprintf(uuid, size, "MIG-%c0000000-1111-2222-3333-444444444444", 'a' + device->part);
  else snprintf(uuid, size, "GPU-%c0000000-1111-2222-3333-444444444444", 'a' + device->index);
  return 0;
}
Return nvmlDeviceGetName(Device *device, char *name, unsigned size) {
  CHECK(device); snprintf(name, size, "NVIDIA Stand-In 80GB%s", device->part >= 0 ? " MIG 1g.10gb" : ""); return 0;
}
Return nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
  CHECK(device);
  memory->total = device->part >= 0 ? 10ULL << 30 : (u64)FIGURE(device, TOTAL);
  memory->used = device->part >= 0 ? (u64)(device->part + 1) << 20 : (u64)FIGURE(device, USED);
  memory->free = memory->total - memory->used; return 0;
}
static void set_bus_id(int index, Pci *pci) {
  memset(pci, 0, sizeof *pci); pci->bus = 0x17 + index;
  snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", pci->bus);
}
Return nvmlDeviceGetPciInfo_v3(Device *device, Pci *pci) { WHOLE(device); set_bus_id(device->index, pci); return 0; }
#ifdef OLD
Return nvmlDeviceGetCurrentClocksThrottleReasons(Device *device, u64 *reasons) { WHOLE(device); *reasons = 0x8; return 0; }
static Return list_processes(Device *, unsigned *, Process *, const char *);
Return nvmlDeviceGetComputeRunningProcesses_v2(Device *device, unsigned *count, Process *found) {
  return list_processes(device, count, found, __func__);
}
#else
Return nvmlDeviceGetUtilizationRates(Device *device, Utilization *utilization) {
  WHOLE(device); utilization->gpu = FIGURE(device, UTILIZATION); utilization->memory = FIGURE(device, MEMORY_UTILIZATION);
  return 0;
}
Return nvmlDeviceGetTemperature(Device *device, int sensor, unsigned *celsius) {
  WHOLE(device); *celsius = FIGURE(device, CELSIUS); return sensor == 0 ? 0 : INVALID_ARGUMENT;
}
Return nvmlDeviceGetTemperatureThreshold(Device *device, int threshold, unsigned *celsius) {
  WHOLE(device); *celsius = FIGURE(device, SLOWDOWN); return threshold == 1 ? 0 : INVALID_ARGUMENT;
}
Return nvmlDeviceGetPowerUsage(Device *device, unsigned *milliwatts) { WHOLE(device); *milliwatts = FIGURE(device, MILLIWATTS); return 0; }
Return nvmlDeviceGetEnforcedPowerLimit(Device *device, unsigned *milliwatts) { WHOLE(device); *milliwatts = FIGURE(device, LIMIT); return 0; }
Return nvmlDeviceGetClockInfo(Device *device, int type, unsigned *mhz) {
  WHOLE(device);
  if (type != 1 && type != 2) return INVALID_ARGUMENT;
  *mhz = FIGURE(device, type == 1 ? SM : MEM); return 0;
}
Return nvmlDeviceGetMaxClockInfo(Device *device, int type, unsigned *mhz) {
  WHOLE(device); *mhz = FIGURE(device, MAX_SM); return type == 1 ? 0 : INVALID_ARGUMENT;
}
Return nvmlDeviceGetCurrentClocksEventReasons(Device *device, u64 *reasons) { WHOLE(device); *reasons = FIGURE(device, REASONS); return 0; }
Return nvmlDeviceGetTotalEccErrors(Device *device, int type, int counter, u64 *count) {
  WHOLE(device);
  if (counter != 0) return INVALID_ARGUMENT;
  *count = FIGURE(device, type == 1 ? UNCORRECTED : CORRECTED); return 0;
}
Return nvmlDeviceGetRemappedRows(Device *device, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
  WHOLE(device); *corrected = *uncorrected = 0; *pending = FIGURE(device, PENDING); *failed = FIGURE(device, FAILED); return 0;
}
Return nvmlDeviceGetFieldValues(Device *device, int count, Field *values) {
  WHOLE(device);
  for (int i = 0; i < count; i++) {
    values[i].result = values[i].id == 82 ? 0 : NOT_SUPPORTED;
    values[i].type = 1; values[i].value.ui = FIGURE(device, MEMORY_CELSIUS);
  }
  return 0;
}
Return nvmlDeviceGetNvLinkState(Device *device, unsigned link, unsigned *active) {
  WHOLE(device);
  if (link >= MAX_LINKS || links[device->index][link].state < 0) return link ? INVALID_ARGUMENT : NOT_SUPPORTED;
  *active = links[device->index][link].state; return 0;
}
Return nvmlDeviceGetNvLinkRemoteDeviceType(Device *device, unsigned link, unsigned *type) {
  WHOLE(device); *type = links[device->index][link].remote < 0 ? 2 : 0; return 0;
}
Return nvmlDeviceGetNvLinkRemotePciInfo_v2(Device *device, unsigned link, Pci *pci) {
  WHOLE(device); set_bus_id(links[device->index][link].remote < 0 ? 100 : links[device->index][link].remote, pci); return 0;
}
Return nvmlDeviceGetNvLinkErrorCounter(Device *device, unsigned link, unsigned counter, u64 *count) {
  WHOLE(device);
  if (counter > 3) return INVALID_ARGUMENT;
  (void)link; *count = FIGURE(device, LINK_ERRORS); return 0;
}
Return nvmlDeviceGetTopologyCommonAncestor(Device *first, Device *second, int *level) {
  WHOLE(first); (void)second; *level = ancestor_level; return 0;
}
Return nvmlDeviceGetP2PStatus(Device *first, Device *second, int index, int *status) {
  WHOLE(first); (void)second; *status = FIGURE(first, P2P); return index == 2 ? 0 : INVALID_ARGUMENT;
}
Return nvmlDeviceGetMemoryAffinity(Device *device, unsigned size, unsigned long *nodes, int scope) {
  WHOLE(device); (void)size; nodes[0] = 1UL << FIGURE(device, NUMA_NODE); return scope == 0 ? 0 : INVALID_ARGUMENT;
}
static Return list_processes(Device *, unsigned *, Process *, const char *);
Return nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, Process *found) {
  return list_processes(device, count, found, __func__);
}
Return nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
  char own[80];
  for (int part = 0; part < PARTS_OF_FIRST; part++)
    if (!nvmlDeviceGetUUID(&parts[part], own, sizeof own) && !strcmp(uuid, own)) { *device = &parts[part]; return 0; }
  return 6;
}
Return nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device *part, Device **device) {
  CHECK(part);
  if (part->part < 0) return INVALID_ARGUMENT;
  *device = &gpus[part->index]; return 0;
}
Return nvmlDeviceGetGpuInstanceId(Device *device, unsigned *id) { CHECK(device); *id = device->part + 1; return 0; }
Return nvmlEventSetCreate(void **set) { static int one; Return bad = failing(__func__, -1); *set = &one; return bad; }
Return nvmlEventSetFree(void *set) { (void)set; registered = 0; return 0; }
Return nvmlDeviceGetSupportedEventTypes(Device *device, u64 *types) { WHOLE(device); *types = 0x1f; return 0; }
Return nvmlDeviceRegisterEvents(Device *device, u64 types, void *set) {
  WHOLE(device); (void)set;
  if (types != 8) return INVALID_ARGUMENT;
  registered |= 1u << device->index; return 0;
}
Return nvmlEventSetWait_v2(void *set, Event *event, unsigned timeout_ms) {
  Return bad = failing(__func__, -1);
  if (bad) return bad;
  (void)set; (void)timeout_ms;
  for (int i = 0; i < event_count; i++) {
    if (!(registered & 1u << events[i].gpu)) continue;
    event->device = &gpus[events[i].gpu]; event->type = 8; event->data = events[i].code;
    event->instance = (unsigned)events[i].instance; event->compute_instance = 0xffffffff;
    memmove(&events[i], &events[i + 1], (--event_count - i) * sizeof events[0]);
    return 0;
  }
  return 10;
}
#endif
static Return list_processes(Device *device, unsigned *count, Process *found, const char *function) {
  unsigned have = 0, room = *count; Return bad = failing(function, device->index);
  if (bad) return bad;
  for (int i = 0; i < process_count; i++) {
    if (processes[i].gpu != device->index) continue;
    if (found && have < room) {
      found[have].pid = processes[i].pid; found[have].memory = processes[i].bytes;
      found[have].instance = found[have].compute_instance = 0xffffffff;
    }
    have++;
  }
  *count = have;
  return have > (found ? room : 0) ? 7 : 0;
}
