/*
 * Included before everything that is compiled. What the kernel frees after its start (initial code and data, the
 * initramfs, some 3 MiB) is overwritten with a pattern, a help for finding bugs in the kernel. With
 * zeros instead it takes no space in snapshots and templates, which leave out what is zero.
 */
#include <linux/poison.h>
#undef POISON_FREE_INITMEM
#define POISON_FREE_INITMEM 0
