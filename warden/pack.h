/*
 * Trees of files in one stream, into a guest and out of it: over the serial line, or by a block device that the host
 * attaches meanwhile, which is hundreds of times faster. Entries of u8 kind, u8 zero, u16 mode, u16 length and a path
 * below the top, big-endian, in which a directory comes before what is in it:
 * 'd'; 'l' with u16 length and target; 'f' with chunks of u64 length and bytes, or, with the highest bit, a hole of
 * that length, ended by a u64 0; 'e' ends it all. The path of the top is empty.
 */
#ifndef WARDEN_PACK_H
#define WARDEN_PACK_H

/* Writes the file or tree at `path` to `device`, or to standard output without one. 0, or an errno; then the path that
 * it is about is on standard error. With a device a byte on standard output now and then says that it goes on. */
int pack(const char *path, const char *device);

/* Makes what the stream of `device`, or of standard input without one, has, at `path`. Each file is there whole or not
 * at all; directories that are there stay as they are. Returns as `pack` does. */
int unpack(const char *path, const char *device);

#endif
