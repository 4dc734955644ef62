/*
 * One stream of bytes at a time, to or from standard output and input, or a block device, which takes whole blocks. Each
 * call returns 0 or an errno; EBADMSG for a stream that ends too early.
 */
#ifndef WARDEN_STREAM_H
#define WARDEN_STREAM_H

#include <stddef.h>
#include <stdint.h>

/* Of `device` with `flags` of open(2), or without one the descriptor `otherwise`. With a device a byte on standard output
 * now and then says that it goes on. */
int stream_open(const char *device, int otherwise, int flags);

int stream_put(const void *bytes, size_t length);
int stream_put_number(uint64_t value, size_t length); /* big-endian, of `length` bytes, 8 at most */
int stream_put_end(void);

int stream_take(void *bytes, size_t length);
int stream_take_number(uint64_t *value, size_t length);

/* What is at hand, `*length` bytes at most and at least one; good until the next call. */
int stream_take_some(const unsigned char **bytes, size_t *length);

#endif
