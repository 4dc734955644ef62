#define _GNU_SOURCE
#include "plan.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "report.h"
#include "sys.h"

#define ANY UINT64_MAX
#define FD INT_MAX
#define ID (UINT32_MAX - 1U) /* (uid_t)-1 is no id (setresuid(2)) */
#define FLAG 1U
#define MODE 07777U
#define ATTRS (ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC | ATTR_NOATIME)
#define TREES 63U
#define NAMESPACES (NEW_NS | NEW_CGROUP | NEW_UTS | NEW_IPC | NEW_USER | NEW_PID | NEW_NET)

enum payload { NOTHING, STRING, PAIR, LIST, GIDS, FILTER };

/* What each op may carry: its payload, and the greatest value of each number. */
static const struct shape {
    enum payload payload;
    uint64_t most[4];
} shapes[] = {
    [OP_NAMESPACES] = {NOTHING, {NAMESPACES, 0, 0, 0}},
    [OP_MAP] = {NOTHING, {FLAG, ID, ID, ID}},
    [OP_MAP_WAY] = {NOTHING, {MAP_SINGLE, 0, 0, 0}},
    [OP_MAP_HELPERS] = {PAIR, {0, 0, 0, 0}},
    [OP_HOSTNAME] = {STRING, {0, 0, 0, 0}},
    [OP_LOOPBACK] = {NOTHING, {0, 0, 0, 0}},
    [OP_RLIMIT] = {NOTHING, {15, ANY, ANY, 0}},
    [OP_IDS] = {NOTHING, {ID, ID, 0, 0}},
    [OP_GROUPS] = {GIDS, {0, 0, 0, 0}},
    [OP_CAPABILITIES] = {NOTHING, {ANY, 0, 0, 0}},
    [OP_UMASK] = {NOTHING, {0777, 0, 0, 0}},
    [OP_DIRECTORY] = {STRING, {0, 0, 0, 0}},
    [OP_ARGV] = {LIST, {0, 0, 0, 0}},
    [OP_ENV] = {STRING, {FLAG, 0, 0, 0}},
    [OP_FORKS] = {NOTHING, {0, 0, 0, 0}},
    [OP_LIFELINE] = {NOTHING, {0, 0, 0, 0}},
    [OP_TERMINAL] = {NOTHING, {UINT16_MAX, UINT16_MAX, 0, 0}},
    [OP_GATE] = {NOTHING, {FD, FLAG, 0, 0}},
    [OP_STATUS] = {NOTHING, {FD, 0, 0, 0}},
    [OP_STATE] = {NOTHING, {FD, 0, 0, 0}},
    [OP_LOG] = {STRING, {INT64_MAX, 99, 0, 0}},
    [OP_PASS] = {NOTHING, {FD, PASS_MOST, 0, 0}},
    [OP_CHROOT] = {STRING, {0, 0, 0, 0}},
    [OP_DETACH] = {NOTHING, {0, 0, 0, 0}},
    [OP_LEASH] = {NOTHING, {FD, 0, 0, 0}},
    [OP_ON_FAILURE] = {LIST, {0, 0, 0, 0}},
    [OP_ENTER] = {NOTHING, {FD, 0, 0, 0}},
    [OP_BASE] = {STRING, {0, 0, 0, 0}},
    [OP_EPHEMERAL] = {NOTHING, {INT64_MAX, 0, 0, 0}},
    [OP_CGROUP_DIR] = {STRING, {FLAG, 0, 0, 0}},
    [OP_WRITE] = {PAIR, {0, 0, 0, 0}},
    [OP_CGROUP_JOIN] = {STRING, {0, 0, 0, 0}},
    [OP_REMOVE] = {STRING, {0, 0, 0, 0}},
    [OP_HELPER] = {LIST, {0, 0, 0, 0}},
    [OP_SYSCTL] = {PAIR, {0, 0, 0, 0}},
    [OP_LANDLOCK] = {NOTHING, {ANY, ANY, ANY, 0}},
    [OP_LANDLOCK_PATH] = {STRING, {ANY, FLAG, 0, 0}},
    [OP_LANDLOCK_PORT] = {NOTHING, {ANY, UINT16_MAX, 0, 0}},
    [OP_SECCOMP] = {FILTER, {UINT32_MAX, 0, 0, 0}},
    [OP_ROOT] = {STRING, {TREES, ATTRS, 0, 0}},
    [OP_BIND] = {PAIR, {TREES, ATTRS, 0, 0}},
    [OP_MOUNT] = {LIST, {ATTRS, TREES, 0, 0}},
    [OP_MKDIR] = {STRING, {MODE, ID, ID, 0}},
    [OP_MKFILE] = {STRING, {0, 0, 0, 0}},
    [OP_SYMLINK] = {PAIR, {0, 0, 0, 0}},
    [OP_READONLY] = {STRING, {TREES, 0, 0, 0}},
    [OP_LOG_SOCKET] = {STRING, {0, 0, 0, 0}},
    [OP_HELPER_FD] = {NOTHING, {FD, 0, 0, 0}},
    [OP_RESTART] = {NOTHING, {RESTART_ALWAYS, INT32_MAX, INT32_MAX, INT32_MAX}},
    [OP_AGAIN] = {NOTHING, {UINT32_MAX, INT32_MAX, INT32_MAX, 0}},
    [OP_KEEP] = {NOTHING, {FD, 0, 0, 0}},
    [OP_INSTANCE] = {STRING, {0, 0, 0, 0}},
};

static bool ends_in_nul(const struct record *record)
{
    return record->size > 0 && record->data[record->size - 1] == '\0';
}

static size_t nuls(const struct record *record)
{
    size_t count = 0;

    for (uint32_t i = 0; i < record->size; i++)
        count += record->data[i] == '\0';
    return count;
}

static bool payload_fits(const struct record *record, enum payload payload)
{
    switch (payload) {
    case NOTHING:
        return record->size == 0;
    case STRING:
        return ends_in_nul(record) && nuls(record) == 1;
    case PAIR:
        return ends_in_nul(record) && nuls(record) == 2;
    case LIST:
        return ends_in_nul(record);
    case GIDS:
        return record->size % sizeof(uint32_t) == 0 && record->size <= 65536 * sizeof(uint32_t);
    case FILTER: /* BPF_MAXINSNS instructions of 8 bytes */
        return record->size > 0 && record->size % 8 == 0 && record->size <= 4096 * 8;
    }
    return false;
}

static const char *check(const struct record *record)
{
    const size_t op = (size_t)record->op;

    if (op >= sizeof shapes / sizeof *shapes || op == 0)
        return "unknown op";
    const struct shape *shape = &shapes[op];
    const uint64_t numbers[4] = {record->a, record->b, record->c, record->d};

    for (int i = 0; i < 4; i++)
        if (numbers[i] > shape->most[i])
            return "number out of range";
    if (record->op == OP_NAMESPACES && (record->a & ~(uint64_t)NAMESPACES) != 0)
        return "number out of range";
    if (!payload_fits(record, shape->payload))
        return "malformed payload";
    if (record->op == OP_MOUNT && nuls(record) < 2)
        return "mount without a target";
    return NULL;
}

static const char *bad(const char *why)
{
    errno = EINVAL;
    return why;
}

const char *plan_parse(struct plan *plan, const char *bytes, size_t length)
{
    struct { char magic[8]; uint32_t version, count; } header;
    struct { uint32_t op, size; uint64_t a, b, c, d; } fixed;
    size_t at = sizeof header;

    if (length < sizeof header || length > PLAN_LIMIT)
        return bad("length");
    memcpy(&header, bytes, sizeof header);
    if (memcmp(header.magic, PLAN_MAGIC, sizeof header.magic) != 0)
        return bad("magic");
    if (header.version != PLAN_VERSION)
        return bad("version");
    if (header.count > RECORD_LIMIT || header.count > (length - at) / sizeof fixed)
        return bad("count");

    struct record *records = reallocarray(plan->records, plan->count + header.count + 1, sizeof *records);
    if (records == NULL)
        return "memory";
    plan->records = records;
    for (uint32_t i = 0; i < header.count; i++) {
        if (length - at < sizeof fixed)
            return bad("truncated record");
        memcpy(&fixed, bytes + at, sizeof fixed);
        at += sizeof fixed;
        const size_t padded = ((size_t)fixed.size + 7) & ~(size_t)7;
        if (padded > length - at)
            return bad("truncated payload");
        struct record *record = &records[plan->count];
        *record = (struct record){(enum op)fixed.op, fixed.size, fixed.a, fixed.b, fixed.c, fixed.d, bytes + at};
        const char *why = check(record);
        if (why != NULL)
            return bad(why);
        plan->count++;
        at += padded;
    }
    return at == length ? NULL : bad("bytes after the last record");
}

const struct record *plan_last(const struct plan *plan, enum op op)
{
    for (size_t i = plan->count; i-- > 0;)
        if (plan->records[i].op == op)
            return &plan->records[i];
    return NULL;
}

const struct record *plan_next(const struct plan *plan, enum op op, const struct record *previous)
{
    for (size_t i = previous == NULL ? 0 : (size_t)(previous - plan->records) + 1; i < plan->count; i++)
        if (plan->records[i].op == op)
            return &plan->records[i];
    return NULL;
}

const char *plan_string(const struct record *record, const char *string)
{
    const char *next = string + strlen(string) + 1;

    return next < record->data + record->size ? next : NULL;
}

static bool names_path_outside(const struct record *record)
{
    return record->op == OP_CGROUP_DIR || record->op == OP_WRITE || record->op == OP_CGROUP_JOIN;
}

static void fill(struct record *record, const char *mark, const char *value)
{
    const size_t mark_length = strlen(mark), value_length = strlen(value);
    char *filled = malloc(record->size * (value_length + 1));
    size_t length = 0;

    if (filled == NULL)
        fail("memory", "");
    for (size_t at = 0; at < record->size;)
        if (record->size - at >= mark_length && memcmp(record->data + at, mark, mark_length) == 0) {
            memcpy(filled + length, value, value_length);
            length += value_length;
            at += mark_length;
        } else {
            filled[length++] = record->data[at++];
        }
    record->data = filled;
    record->size = (uint32_t)length;
}

void plan_fill(struct plan *plan, const char *mark, const char *value)
{
    for (size_t i = 0; i < plan->count; i++)
        if (names_path_outside(&plan->records[i]))
            fill(&plan->records[i], mark, value);
}

char **plan_strings(const struct record *record)
{
    char **vector = calloc(nuls(record) + 1, sizeof *vector);
    size_t count = 0;

    if (vector == NULL)
        fail("memory", "");
    /* exec(3) takes char *const[] and does not write: the casts only drop const. */
    for (const char *string = record->data; string != NULL; string = plan_string(record, string))
        vector[count++] = (char *)(uintptr_t)string;
    return vector;
}
