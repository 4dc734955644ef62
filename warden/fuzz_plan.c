/*
 * Feeds the plan parser with damaged plans. With clang: `-fsanitize=fuzzer -DLIBFUZZER`. Without, it
 * mutates the seed files by itself: `fuzz_plan SECONDS RANDOM-SEED FILE…`.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "plan.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Reads every byte that the parser let through: the sanitizer sees one that is not the plan's. */
static uint64_t walk(const struct plan *plan)
{
    uint64_t sum = 0;

    for (size_t i = 0; i < plan->count; i++) {
        const struct record *record = &plan->records[i];
        for (uint32_t at = 0; at < record->size; at++)
            sum += (unsigned char)record->data[at];
        if (record->op == OP_ARGV || record->op == OP_MOUNT || record->op == OP_BIND) {
            char **strings = plan_strings(record);
            for (size_t at = 0; strings[at] != NULL; at++)
                sum += strlen(strings[at]);
            free(strings);
        }
        sum += plan_last(plan, record->op) == record;
        sum += plan_next(plan, record->op, record) != NULL;
    }
    return sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct plan plan = {NULL, 0};
    static volatile uint64_t sink;
    char *copy = malloc(size + (size == 0)); /* of the exact size, so that one byte beyond is caught */

    if (copy == NULL)
        abort();
    memcpy(copy, data, size);
    errno = 0;
    const char *why = plan_parse(&plan, copy, size);
    if (why != NULL && errno == 0)
        abort(); /* a refusal without a cause */
    if (why == NULL)
        sink += walk(&plan);
    free(plan.records);
    free(copy);
    return 0;
}

#ifndef LIBFUZZER
static uint64_t state;

static uint64_t next_random(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static size_t mutate(uint8_t *bytes, size_t size, size_t room)
{
    static const uint32_t numbers[] = {0, 1, 7, 8, 0x7fffffff, 0x80000000, 0xffffffff};

    for (uint64_t times = 1 + next_random() % 6; times > 0 && size > 8; times--) {
        const size_t at = (size_t)(next_random() % size);
        const size_t length = (size_t)(next_random() % 64) % (size - at);
        switch (next_random() % 6) {
        case 0:
            bytes[at] ^= (uint8_t)(1U << (next_random() % 8));
            break;
        case 1:
            if (size - (at & ~3UL) >= 4)
                memcpy(bytes + (at & ~3UL), &numbers[next_random() % 7], 4);
            break;
        case 2: /* cut a piece out */
            memmove(bytes + at, bytes + at + length, size - at - length);
            size -= length;
            break;
        case 3: /* say a piece twice */
            if (size + length <= room) {
                memmove(bytes + at + length, bytes + at, size - at);
                size += length;
            }
            break;
        case 4:
            size = at;
            break;
        default:
            memset(bytes + at, 0, length);
            break;
        }
    }
    return size;
}

int main(int argc, char **argv)
{
    enum { ROOM = 1 << 17 };
    uint8_t *seeds = malloc((size_t)argc * ROOM), work[2 * ROOM];
    size_t sizes[64], count = 0;
    unsigned long runs = 0;

    if (argc < 4 || argc > 66 || seeds == NULL)
        return 2;
    state = strtoull(argv[2], NULL, 10) | 1;
    for (int i = 3; i < argc; i++, count++) {
        FILE *file = fopen(argv[i], "rb");
        if (file == NULL)
            return 2;
        sizes[count] = fread(seeds + count * ROOM, 1, ROOM, file);
        fclose(file);
        LLVMFuzzerTestOneInput(seeds + count * ROOM, sizes[count]);
    }
    for (const time_t end = time(NULL) + atoi(argv[1]); time(NULL) < end; runs++) {
        const size_t seed = (size_t)(next_random() % count);
        memcpy(work, seeds + seed * ROOM, sizes[seed]);
        LLVMFuzzerTestOneInput(work, mutate(work, sizes[seed], sizeof work));
    }
    printf("%lu plans\n", runs);
    free(seeds);
    return 0;
}
#endif
