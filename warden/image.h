/* A file system in a file: attached to a loop device and mounted, for as long as anybody has it mounted. */
#ifndef WARDEN_IMAGE_H
#define WARDEN_IMAGE_H

#include <stdint.h>

/* The ext4 file system in the regular file that `path` is open on (O_PATH), as a detached tree with `attributes`.
 * Several mounts of one file share one loop device and one superblock. Needs root of the host; exits through fail(). */
int image_mount(int path, const char *source, uint64_t attributes);

#endif
