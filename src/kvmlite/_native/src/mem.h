/* Guest RAM: the one place where a guest-physical range becomes a host pointer. */
#ifndef KVL_MEM_H
#define KVL_MEM_H

#include <stdbool.h>
#include <stdint.h>

enum { KVL_MEM_MAX_REGIONS = 8 };

struct kvl_region {
	uint64_t gpa;
	uint64_t size;
	uint8_t *hva;
};

/* Written once by Python before any vCPU or worker runs, then only read. */
struct kvl_mem {
	uint32_t count;
	struct kvl_region regions[KVL_MEM_MAX_REGIONS];
};

/*
 * Host pointer to guest RAM [gpa, gpa + size), or NULL unless the whole range lies inside one region.
 * A size of 0 is valid where the address itself is. Any thread.
 */
void *kvl_mem_at(const struct kvl_mem *mem, uint64_t gpa, uint64_t size);

/* Copy between a flat buffer and guest RAM; 0, or -1 if the range is not wholly inside one region. Any thread. */
int kvl_mem_read(const struct kvl_mem *mem, uint64_t gpa, void *to, uint64_t size);
int kvl_mem_write(const struct kvl_mem *mem, uint64_t gpa, const void *from, uint64_t size);

/*
 * Map guest RAM: size bytes at a 2 MiB aligned host address with a no-access guard page on both sides.
 * (fd) is a memfd or file, or -1 for anonymous memory; (shared) maps it MAP_SHARED rather than MAP_PRIVATE.
 * Private memory is not reserved in advance. Returns NULL with errno set on failure. Any thread.
 */
uint8_t *kvl_mem_map(uint64_t size, int fd, uint64_t offset, bool shared);
int kvl_mem_unmap(uint8_t *hva, uint64_t size);

/*
 * Map a file like guest RAM: its first (file_size) bytes, then zeros up to (size), a multiple of 4096 not below it.
 * Without (shared) what is written stays in this mapping; without (writable) the file's part is read-only. What lies
 * after the file's end within its last page reads as zeros. To be given back by kvl_mem_unmap(). NULL with errno set on
 * failure. Any thread.
 */
uint8_t *kvl_mem_map_file(uint64_t size, int fd, uint64_t file_size, bool shared, bool writable);

/* Ask for transparent huge pages. 0, or -1 with errno where the kernel has none: a wish, not a need. */
int kvl_mem_advise_huge(uint8_t *hva, uint64_t size);

/*
 * Give host pages back; they read as zeros when touched again. Anonymous memory if (fd) is -1, else a hole in that memfd
 * at (offset), for every process that maps it. Whole pages only. 0, or -1 with errno. Any thread.
 */
int kvl_mem_discard(uint8_t *hva, uint64_t size, int fd, uint64_t offset);

#endif
