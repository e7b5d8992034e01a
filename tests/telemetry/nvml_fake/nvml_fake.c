/* A small libnvidia-ml.so.1 that plays scripted cards, for tests of the real ctypes path.
 *
 * Takes a script from the file that NVML_FAKE names, read anew by each first nvmlInit; without one there is no driver.
 * Exports the symbols that gpuplan reaches through pynvml, with structures laid out as NVML's reference has them. A
 * line of a script is a word and its values:
 *
 *   card NAME UUID TOTAL_BYTES              begins a card; what follows is about it. Spaces in NAME are written as _
 *   mig 0|1                                 MIG mode; without the line the card has no MIG
 *   gpm                                     the card has GPM
 *   READING VALUE...                        what a reading gives, call by call; the last value stays.
 *                                           used gpu_util memory_util power_mw energy_mj sm_mhz memory_mhz celsius
 *                                           throttle pcie_tx_kb pcie_rx_kb processes gpm_sm gpm_dram gpm_tx gpm_rx
 *                                           drawing
 *   profile NUMBER ID SLICES COUNT SMS MEMORY_MB WIDTH STARTS NAME   NUMBER is NVML_GPU_INSTANCE_PROFILE_*; 0,2,4
 *   instance ID PROFILE_ID START UUID       a GPU instance with one MIG device, or none where UUID is -
 *   READING VALUE...                        after an instance: its own used, processes, gpm_sm, gpm_dram
 *   fail FUNCTION CODE [AFTER]              that function returns CODE after AFTER calls on this card; before the
 *                                           first card: on any
 *
 * A reading without a line is not supported. Functions are named without `nvml`, versions without their suffix.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9 };
enum { USED, GPU_UTIL, MEMORY_UTIL, POWER, ENERGY, SM_MHZ, MEMORY_MHZ, CELSIUS, THROTTLE, PCIE_TX, PCIE_RX, PROCESSES,
       GPM_SM, GPM_DRAM, GPM_TX, GPM_RX, DRAWING, READINGS };
static const char *const reading_names[READINGS] = {
    "used", "gpu_util", "memory_util", "power_mw", "energy_mj", "sm_mhz", "memory_mhz", "celsius", "throttle",
    "pcie_tx_kb", "pcie_rx_kb", "processes", "gpm_sm", "gpm_dram", "gpm_tx", "gpm_rx",
    "drawing"};

#define CARDS 16
#define PARTS 8
#define PROFILES 20
#define FAILS 16
#define VALUES 64

struct reading { int count, calls; double values[VALUES]; };
struct fail { char function[64]; int code, after, calls; };
struct profile { unsigned number, id, slices, count, sms, memory_mb, width, starts[8], places; char name[96]; };
struct card;
struct part { unsigned id, profile_id, start; char uuid[96]; struct reading readings[READINGS]; struct card *card; };
struct card {
    char name[96], uuid[96];
    unsigned long long total;
    int mig, gpm, profiles_count, parts_count, fails_count;
    struct profile profiles[PROFILES];
    struct part parts[PARTS];
    struct fail fails[FAILS];
    struct reading readings[READINGS];
};
struct sample { struct part *part; struct card *card; };

static struct card cards[CARDS], world; /* `world` holds the faults of no card in particular */
static int cards_count, users, script_there;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* --- the script ------------------------------------------------------------------------------------------------- */

static void line_of(char *line, struct card **card, struct part **part) {
    char *rest = line, *word = strsep(&rest, " \t\n");
    char *fields[VALUES + 1];
    int n = 0;
    for (char *field; n < VALUES && rest && (field = strsep(&rest, " \t\n"));)
        if (*field && *field == '#') break;
        else if (*field) fields[n++] = field;
    if (!strcmp(word, "card")) {
        *card = &cards[cards_count++];
        *part = NULL;
        (*card)->mig = -1;
        snprintf((*card)->name, 96, "%s", fields[0]);
        for (char *c = (*card)->name; *c; c++) if (*c == '_') *c = ' ';
        snprintf((*card)->uuid, 96, "%s", fields[1]);
        (*card)->total = strtoull(fields[2], NULL, 10);
    } else if (!strcmp(word, "mig")) {
        (*card)->mig = atoi(fields[0]);
    } else if (!strcmp(word, "gpm")) {
        (*card)->gpm = 1;
    } else if (!strcmp(word, "profile")) {
        struct profile *p = &(*card)->profiles[(*card)->profiles_count++];
        unsigned *numbers[] = {&p->number, &p->id, &p->slices, &p->count, &p->sms, &p->memory_mb, &p->width};
        for (int i = 0; i < 7; i++) *numbers[i] = (unsigned)strtoul(fields[i], NULL, 0);
        for (char *starts = fields[7], *one; (one = strsep(&starts, ","));) p->starts[p->places++] = (unsigned)atoi(one);
        snprintf(p->name, 96, "MIG %s", fields[8]);
    } else if (!strcmp(word, "instance")) {
        *part = &(*card)->parts[(*card)->parts_count++];
        **part = (struct part){.id = (unsigned)atoi(fields[0]), .profile_id = (unsigned)atoi(fields[1]),
                               .start = (unsigned)atoi(fields[2]), .card = *card};
        snprintf((*part)->uuid, 96, "%s", fields[3]);
    } else if (!strcmp(word, "fail")) {
        struct fail *f = &(*card)->fails[(*card)->fails_count++];
        snprintf(f->function, 64, "%s", fields[0]);
        f->code = atoi(fields[1]);
        f->after = n > 2 ? atoi(fields[2]) : 0;
    }
    for (int r = 0; r < READINGS; r++)
        if (!strcmp(word, reading_names[r])) {
            struct reading *reading = *part ? &(*part)->readings[r] : &(*card)->readings[r];
            reading->count = n;
            for (int i = 0; i < n; i++) reading->values[i] = atof(fields[i]);
        }
}

static void read_script(void) {
    const char *path = getenv("NVML_FAKE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[2048];
    struct card *card = &world;
    struct part *part = NULL;
    memset(cards, 0, sizeof cards);
    memset(&world, 0, sizeof world);
    cards_count = 0;
    script_there = file != NULL;
    while (file && fgets(line, sizeof line, file)) line_of(line, &card, &part);
    if (file) fclose(file);
}

/* --- answering -------------------------------------------------------------------------------------------------- */

/* A handle is a card or a part of one; a part is told by its address. */
static struct part *part_of(void *handle) {
    for (int c = 0; c < cards_count; c++)
        if ((struct part *)handle >= cards[c].parts && (struct part *)handle < cards[c].parts + PARTS) return handle;
    return NULL;
}

static struct card *card_of(void *handle) { return part_of(handle) ? part_of(handle)->card : handle; }

static int failed_in(struct card *card, const char *function) {
    for (int i = 0; i < card->fails_count; i++)
        if (!strcmp(card->fails[i].function, function) && card->fails[i].calls++ >= card->fails[i].after)
            return card->fails[i].code;
    return SUCCESS;
}

static int fault(void *handle, const char *function) {
    pthread_mutex_lock(&lock);
    int code = failed_in(&world, function);
    if (!code && users == 0) code = UNINITIALIZED;
    if (!code && handle) code = failed_in(card_of(handle), function);
    if (!code && handle) code = failed_in(card_of(handle), "*");
    pthread_mutex_unlock(&lock);
    return code;
}

static int next(void *handle, int which, double *value) {
    struct part *part = part_of(handle);
    struct reading *reading = part ? &part->readings[which] : &((struct card *)handle)->readings[which];
    if (!reading->count) return NOT_SUPPORTED;
    pthread_mutex_lock(&lock);
    int call = reading->calls++;
    pthread_mutex_unlock(&lock);
    *value = reading->values[call < reading->count ? call : reading->count - 1];
    return SUCCESS;
}

#define ASK(handle, function) do { int code = fault(handle, function); if (code) return code; } while (0)

static int number(void *handle, const char *function, int which, unsigned *answer) {
    double value = 0;
    ASK(handle, function);
    int code = next(handle, which, &value);
    if (!code) *answer = (unsigned)value;
    return code;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&lock);
    if (users == 0) read_script();
    int code = script_there ? failed_in(&world, "InitWithFlags") : DRIVER_NOT_LOADED;
    if (!code) users++;
    pthread_mutex_unlock(&lock);
    return code;
}

int nvmlShutdown(void) {
    ASK(NULL, "Shutdown");
    users--;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    (void)code;
    return "an error that only this driver knows";
}

int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    ASK(NULL, "SystemGetDriverVersion");
    snprintf(text, size, "%s", "570.00.fake");
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    ASK(NULL, "DeviceGetCount");
    *count = (unsigned)cards_count;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    if (index >= (unsigned)cards_count) return INVALID_ARGUMENT;
    ASK(&cards[index], "DeviceGetHandleByIndex");
    *handle = &cards[index];
    return SUCCESS;
}

int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
    ASK(handle, "DeviceGetName");
    struct part *part = part_of(handle);
    struct card *card = card_of(handle);
    const char *profile = "";
    for (int i = 0; part && i < card->profiles_count; i++)
        if (card->profiles[i].id == part->profile_id) profile = card->profiles[i].name;
    snprintf(text, size, part ? "%s %s" : "%s", card->name, profile);
    return SUCCESS;
}

int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {
    ASK(handle, "DeviceGetUUID");
    snprintf(text, size, "%s", part_of(handle) ? part_of(handle)->uuid : card_of(handle)->uuid);
    return SUCCESS;
}

struct memory { unsigned long long total, free, used; };

int nvmlDeviceGetMemoryInfo(void *handle, struct memory *memory) {
    double used = 0;
    ASK(handle, part_of(handle) ? "SliceGetMemoryInfo" : "DeviceGetMemoryInfo");
    struct part *part = part_of(handle);
    struct card *card = card_of(handle);
    (void)next(handle, USED, &used);
    memory->total = card->total;
    for (int i = 0; part && i < card->profiles_count; i++)
        if (card->profiles[i].id == part->profile_id) memory->total = (unsigned long long)card->profiles[i].memory_mb << 20;
    memory->used = (unsigned long long)used;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

struct rates { unsigned gpu, memory; };

int nvmlDeviceGetUtilizationRates(void *handle, struct rates *rates) {
    int code = number(handle, "DeviceGetUtilizationRates", GPU_UTIL, &rates->gpu);
    double memory = 0;
    if (!code) code = next(handle, MEMORY_UTIL, &memory);
    rates->memory = (unsigned)memory;
    return code;
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) {
    return number(handle, "DeviceGetPowerUsage", POWER, milliwatts);
}

int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *millijoules) {
    double value = 0;
    ASK(handle, "DeviceGetTotalEnergyConsumption");
    int code = next(handle, ENERGY, &value);
    *millijoules = (unsigned long long)value;
    return code;
}

int nvmlDeviceGetClockInfo(void *handle, unsigned type, unsigned *mhz) {
    return number(handle, "DeviceGetClockInfo", type == 1 ? SM_MHZ : MEMORY_MHZ, mhz);
}

int nvmlDeviceGetTemperature(void *handle, unsigned sensor, unsigned *celsius) {
    (void)sensor;
    return number(handle, "DeviceGetTemperature", CELSIUS, celsius);
}

static int throttle(void *handle, const char *function, unsigned long long *reasons) {
    unsigned bits = 0;
    int code = number(handle, function, THROTTLE, &bits);
    *reasons = bits;
    return code;
}

int nvmlDeviceGetCurrentClocksEventReasons(void *handle, unsigned long long *reasons) {
    return throttle(handle, "DeviceGetCurrentClocksEventReasons", reasons);
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *reasons) {
    return throttle(handle, "DeviceGetCurrentClocksThrottleReasons", reasons);
}

int nvmlDeviceGetPcieThroughput(void *handle, unsigned counter, unsigned *kilobytes) {
    return number(handle, "DeviceGetPcieThroughput", counter == 0 ? PCIE_TX : PCIE_RX, kilobytes);
}

struct process { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };

static int processes(void *handle, const char *function, int kind, unsigned *count, struct process *found) {
    unsigned there = 0, room = *count;
    struct part *part = part_of(handle);
    struct reading *reading = part ? &part->readings[kind] : &card_of(handle)->readings[kind];
    ASK(handle, function);
    if (!reading->count) return NOT_SUPPORTED;
    there = (unsigned)reading->values[0];
    *count = there;
    if (there > room) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < there; i++) found[i] = (struct process){(kind == DRAWING ? 200 : 100) + i, 1 << 20, 0, 0};
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, struct process *found) {
    return processes(handle, "DeviceGetComputeRunningProcesses_v2", PROCESSES, count, found);
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, struct process *found) {
    return processes(handle, "DeviceGetComputeRunningProcesses", PROCESSES, count, found);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, struct process *found) {
    return processes(handle, "DeviceGetGraphicsRunningProcesses", DRAWING, count, found);
}

/* --- MIG -------------------------------------------------------------------------------------------------------- */

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    ASK(handle, "DeviceGetMigMode");
    if (card_of(handle)->mig < 0) return NOT_SUPPORTED;
    *current = *pending = (unsigned)card_of(handle)->mig;
    return SUCCESS;
}

struct profile_info {
    unsigned id, p2p, slices, count, sms, copy, decode, encode, jpeg, ofa;
    unsigned long long memory_mb;
};
struct profile_info_v2 {
    unsigned version, id, p2p, slices, count, sms, copy, decode, encode, jpeg, ofa;
    unsigned long long memory_mb;
    char name[96];
};

static int profile_by(struct card *card, unsigned number, struct profile **found) {
    for (int i = 0; i < card->profiles_count; i++)
        if (card->profiles[i].number == number) {
            *found = &card->profiles[i];
            return SUCCESS;
        }
    return NOT_SUPPORTED;
}

int nvmlDeviceGetGpuInstanceProfileInfo(void *handle, unsigned profile, struct profile_info *info) {
    struct profile *p = NULL;
    ASK(handle, "DeviceGetGpuInstanceProfileInfo");
    int code = profile_by(handle, profile, &p);
    if (!code)
        *info = (struct profile_info){.id = p->id, .slices = p->slices, .count = p->count, .sms = p->sms,
                                      .memory_mb = p->memory_mb};
    return code;
}

int nvmlDeviceGetGpuInstanceProfileInfoV(void *handle, unsigned profile, struct profile_info_v2 *info) {
    struct profile *p = NULL;
    ASK(handle, "DeviceGetGpuInstanceProfileInfoV");
    if (info->version != (sizeof *info | 2u << 24)) return 25; /* ARGUMENT_VERSION_MISMATCH */
    int code = profile_by(handle, profile, &p);
    if (!code) {
        *info = (struct profile_info_v2){.version = info->version, .id = p->id, .slices = p->slices, .count = p->count,
                                         .sms = p->sms, .memory_mb = p->memory_mb};
        memcpy(info->name, p->name, sizeof info->name);
    }
    return code;
}

struct placement { unsigned start, size; };

int nvmlDeviceGetGpuInstancePossiblePlacements_v2(void *handle, unsigned id, struct placement *places, unsigned *count) {
    struct card *card = card_of(handle);
    ASK(handle, "DeviceGetGpuInstancePossiblePlacements");
    for (int i = 0; i < card->profiles_count; i++)
        if (card->profiles[i].id == id) {
            struct profile *p = &card->profiles[i];
            if (places && *count < p->places) return INSUFFICIENT_SIZE;
            for (unsigned k = 0; places && k < p->places; k++) places[k] = (struct placement){p->starts[k], p->width};
            *count = p->places;
            return SUCCESS;
        }
    return INVALID_ARGUMENT;
}

int nvmlDeviceGetGpuInstances(void *handle, unsigned id, void **found, unsigned *count) {
    struct card *card = card_of(handle);
    unsigned n = 0;
    ASK(handle, "DeviceGetGpuInstances");
    for (int i = 0; i < card->parts_count; i++)
        if (card->parts[i].profile_id == id) found[n++] = &card->parts[i];
    *count = n;
    return SUCCESS;
}

struct instance_info { void *device; unsigned id, profile_id; struct placement place; };

int nvmlGpuInstanceGetInfo(void *instance, struct instance_info *info) {
    struct part *part = instance;
    ASK(instance, "GpuInstanceGetInfo");
    info->device = part->card;
    info->id = part->id;
    info->profile_id = part->profile_id;
    info->place = (struct placement){part->start, 0};
    for (int i = 0; i < part->card->profiles_count; i++)
        if (part->card->profiles[i].id == part->profile_id) info->place.size = part->card->profiles[i].width;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) {
    ASK(handle, "DeviceGetMaxMigDeviceCount");
    *count = card_of(handle)->mig < 0 ? 0 : PARTS;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **found) {
    struct card *card = card_of(handle);
    ASK(handle, "DeviceGetMigDeviceHandleByIndex");
    if (card->mig != 1 || index >= (unsigned)card->parts_count || card->parts[index].uuid[0] == '-') return NOT_FOUND;
    *found = &card->parts[index];
    return SUCCESS;
}

int nvmlDeviceGetGpuInstanceId(void *handle, unsigned *id) {
    ASK(handle, "DeviceGetGpuInstanceId");
    if (!part_of(handle)) return NOT_SUPPORTED;
    *id = part_of(handle)->id;
    return SUCCESS;
}

/* --- GPM -------------------------------------------------------------------------------------------------------- */

struct metric { unsigned id, code; double value; const char *names[3]; };
struct metrics { unsigned version, count; struct sample *first, *second; struct metric metrics[]; };

struct support { unsigned version, supported; };

int nvmlGpmQueryDeviceSupport(void *handle, struct support *support) {
    ASK(handle, "GpmQueryDeviceSupport");
    support->supported = (unsigned)card_of(handle)->gpm;
    return SUCCESS;
}

int nvmlGpmSampleAlloc(struct sample **sample) {
    *sample = calloc(1, sizeof **sample);
    return SUCCESS;
}

int nvmlGpmSampleFree(struct sample *sample) {
    free(sample);
    return SUCCESS;
}

int nvmlGpmSampleGet(void *handle, struct sample *sample) {
    ASK(handle, "GpmSampleGet");
    *sample = (struct sample){NULL, handle};
    return SUCCESS;
}

int nvmlGpmMigSampleGet(void *handle, unsigned id, struct sample *sample) {
    struct card *card = card_of(handle);
    ASK(handle, "GpmMigSampleGet");
    for (int i = 0; i < card->parts_count; i++)
        if (card->parts[i].id == id) {
            *sample = (struct sample){&card->parts[i], card};
            return SUCCESS;
        }
    return INVALID_ARGUMENT;
}

int nvmlGpmMetricsGet(struct metrics *asked) {
    static const struct { unsigned id; int reading; } known[] = {{2, GPM_SM}, {10, GPM_DRAM}, {20, GPM_TX}, {21, GPM_RX}};
    if (asked->version != 1 || !asked->first->card || !asked->second->card) return INVALID_ARGUMENT;
    ASK(asked->second->card, "GpmMetricsGet");
    for (unsigned i = 0; i < asked->count; i++) {
        struct metric *metric = &asked->metrics[i];
        void *whose = asked->second->part ? (void *)asked->second->part : (void *)asked->second->card;
        metric->code = INVALID_ARGUMENT;
        for (unsigned k = 0; k < 4; k++)
            if (known[k].id == metric->id) metric->code = (unsigned)next(whose, known[k].reading, &metric->value);
    }
    return SUCCESS;
}
