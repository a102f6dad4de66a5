#include "blk_request.h"

#include <endian.h>
#include <linux/virtio_blk.h>

enum {
	HEADER_SIZE = sizeof(struct virtio_blk_outhdr),
	SEGMENT_SIZE = sizeof(struct virtio_blk_discard_write_zeroes),
};

bool kvl_blk_parse(struct kvl_virtq *queue, struct kvl_chain *chain, struct kvl_blk_request *ret)
{
	struct virtio_blk_outhdr header;
	struct iovec *last;
	size_t rest = HEADER_SIZE;

	if (chain->readable_size < HEADER_SIZE) {
		kvl_virtq_fail(queue, KVL_E_REQUEST_HEADER, chain->readable_size, HEADER_SIZE);
		return false;
	}
	if (!chain->writable_size) {
		kvl_virtq_fail(queue, KVL_E_REQUEST_STATUS, 0, 1);
		return false;
	}
	kvl_iov_read(chain->iov, chain->readable_count, 0, &header, HEADER_SIZE);
	ret->head = chain->head;
	ret->type = le32toh(header.type);
	ret->sector = le64toh(header.sector);
	ret->readable = chain->iov;
	ret->readable_count = chain->readable_count;
	while (ret->readable_count && rest >= ret->readable->iov_len) {
		rest -= ret->readable->iov_len;
		ret->readable++;
		ret->readable_count--;
	}
	if (rest) {
		ret->readable->iov_base = (uint8_t *)ret->readable->iov_base + rest;
		ret->readable->iov_len -= rest;
	}
	ret->readable_size = chain->readable_size - HEADER_SIZE;
	/* The status is the very last byte (5.2.6); no iovec is empty. */
	ret->writable = chain->iov + chain->readable_count;
	ret->writable_count = chain->writable_count;
	ret->writable_size = chain->writable_size - 1;
	last = &ret->writable[ret->writable_count - 1];
	last->iov_len--;
	ret->status = (uint8_t *)last->iov_base + last->iov_len;
	if (!last->iov_len)
		ret->writable_count--;
	return true;
}

uint64_t kvl_blk_data_size(const struct kvl_blk_request *request)
{
	if (request->type == VIRTIO_BLK_T_IN)
		return request->writable_size;
	return request->type == VIRTIO_BLK_T_OUT ? request->readable_size : 0;
}

/* Whether the disk has (size) bytes from (sector) on, in whole blocks. */
static bool is_inside(const struct kvl_blk_config *config, uint64_t sector, uint64_t size)
{
	uint64_t sectors = config->disk->size / KVL_BLK_SECTOR, block = config->block_size;

	if (size % block || sector % (block / KVL_BLK_SECTOR))
		return false;
	return sector <= sectors && size / KVL_BLK_SECTOR <= sectors - sector;
}

static struct kvl_blk_answer refuse(struct kvl_blk_stats *stats, uint8_t status)
{
	stats->refused++;
	return (struct kvl_blk_answer){.status = status};
}

static struct kvl_blk_answer accept(uint64_t written)
{
	return (struct kvl_blk_answer){.status = VIRTIO_BLK_S_OK, .written = written};
}

static void count(struct kvl_blk_stats *stats, const struct kvl_blk_request *request)
{
	switch (request->type) {
	case VIRTIO_BLK_T_IN:
		stats->reads++;
		stats->read_bytes += request->writable_size;
		break;
	case VIRTIO_BLK_T_OUT:
		stats->writes++;
		stats->written_bytes += request->readable_size;
		break;
	case VIRTIO_BLK_T_FLUSH:
		stats->flushes++;
		break;
	default:
		stats->others++;
		break;
	}
}

bool kvl_blk_admit(const struct kvl_blk_config *config, struct kvl_blk_stats *stats,
		   const struct kvl_blk_request *request, struct kvl_blk_answer *ret)
{
	bool is_write = request->type == VIRTIO_BLK_T_OUT;

	count(stats, request);
	if (request->type == VIRTIO_BLK_T_FLUSH) {
		*ret = accept(0);
		return !config->is_read_only;
	}
	if (is_inside(config, request->sector, kvl_blk_data_size(request)) && !(is_write && config->is_read_only))
		return true;
	*ret = refuse(stats, VIRTIO_BLK_S_IOERR);
	return false;
}

struct kvl_blk_answer kvl_blk_conclude(struct kvl_blk_stats *stats, const struct kvl_blk_request *request, int error)
{
	if (!error)
		return accept(request->type == VIRTIO_BLK_T_IN ? request->writable_size : 0);
	stats->failed++;
	return (struct kvl_blk_answer){.status = VIRTIO_BLK_S_IOERR, .error = error};
}

static int do_admitted(const struct kvl_blk_config *config, const struct kvl_blk_request *request)
{
	uint64_t offset = request->sector * KVL_BLK_SECTOR;

	switch (request->type) {
	case VIRTIO_BLK_T_IN:
		return kvl_disk_read(config->disk, request->writable, request->writable_count, offset,
				     request->writable_size);
	case VIRTIO_BLK_T_OUT:
		return kvl_disk_write(config->disk, request->readable, request->readable_count, offset,
				      request->readable_size, !config->has_flush);
	default:
		return kvl_disk_flush(config->disk);
	}
}

/* Copy the segments of a discard or write-zeroes once; returns their number, or -1. */
static int copy_segments(const struct kvl_blk_request *request, struct virtio_blk_discard_write_zeroes *ret)
{
	if (!request->readable_size || request->readable_size % SEGMENT_SIZE ||
	    request->readable_size > SEGMENT_SIZE * KVL_BLK_MAX_SEGMENTS)
		return -1;
	kvl_iov_read(request->readable, request->readable_count, 0, ret, request->readable_size);
	return (int)(request->readable_size / SEGMENT_SIZE);
}

/* Judge one segment (5.2.6.2); returns a status. */
static uint8_t check_segment(const struct kvl_blk_config *config, uint32_t type,
			     const struct virtio_blk_discard_write_zeroes *segment)
{
	uint32_t sectors = le32toh(segment->num_sectors), flags = le32toh(segment->flags);
	bool is_discard = type == VIRTIO_BLK_T_DISCARD;
	uint32_t known = is_discard ? 0 : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
	uint32_t most = is_discard ? KVL_BLK_MAX_DISCARD_SECTORS : KVL_BLK_MAX_ZERO_SECTORS;

	if (flags & ~known)
		return VIRTIO_BLK_S_UNSUPP;
	if (sectors > most)
		return VIRTIO_BLK_S_IOERR;
	if (!is_inside(config, le64toh(segment->sector), (uint64_t)sectors * KVL_BLK_SECTOR))
		return VIRTIO_BLK_S_IOERR;
	return VIRTIO_BLK_S_OK;
}

static int do_segment(const struct kvl_blk_config *config, uint32_t type,
		      const struct virtio_blk_discard_write_zeroes *segment)
{
	uint64_t offset = le64toh(segment->sector) * KVL_BLK_SECTOR;
	uint64_t size = (uint64_t)le32toh(segment->num_sectors) * KVL_BLK_SECTOR;
	bool may_unmap = le32toh(segment->flags) & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
	int error;

	if (!size)
		return 0;
	if (type == VIRTIO_BLK_T_DISCARD)
		return kvl_disk_discard(config->disk, offset, size);
	error = kvl_disk_zero(config->disk, offset, size, may_unmap);
	return error || config->has_flush ? error : kvl_disk_flush(config->disk);
}

static struct kvl_blk_answer discard_or_zero(const struct kvl_blk_config *config, struct kvl_blk_stats *stats,
					     const struct kvl_blk_request *request)
{
	struct virtio_blk_discard_write_zeroes segments[KVL_BLK_MAX_SEGMENTS];
	int total = copy_segments(request, segments), error = 0;

	if (total < 0 || config->is_read_only)
		return refuse(stats, VIRTIO_BLK_S_IOERR);
	for (int i = 0; i < total; i++) {
		uint8_t status = check_segment(config, request->type, &segments[i]);

		if (status != VIRTIO_BLK_S_OK)
			return refuse(stats, status);
	}
	for (int i = 0; i < total && !error; i++)
		error = do_segment(config, request->type, &segments[i]);
	return kvl_blk_conclude(stats, request, error);
}

struct kvl_blk_answer kvl_blk_serve(const struct kvl_blk_config *config, struct kvl_blk_stats *stats,
				    const struct kvl_blk_request *request)
{
	struct kvl_blk_answer answer;

	switch (request->type) {
	case VIRTIO_BLK_T_IN:
	case VIRTIO_BLK_T_OUT:
	case VIRTIO_BLK_T_FLUSH:
		if (!kvl_blk_admit(config, stats, request, &answer))
			return answer;
		return kvl_blk_conclude(stats, request, do_admitted(config, request));
	case VIRTIO_BLK_T_DISCARD:
	case VIRTIO_BLK_T_WRITE_ZEROES:
		count(stats, request);
		return discard_or_zero(config, stats, request);
	case VIRTIO_BLK_T_GET_ID:
		count(stats, request);
		return accept(kvl_iov_write(request->writable, request->writable_count, 0, config->id, KVL_BLK_ID_SIZE));
	default:
		return refuse(stats, VIRTIO_BLK_S_UNSUPP);
	}
}

void kvl_blk_complete(struct kvl_virtq *queue, const struct kvl_blk_request *request,
		      const struct kvl_blk_answer *answer)
{
	uint64_t written = answer->written;

	*request->status = answer->status;
	if (written == request->writable_size)
		written++; /* the status follows without a gap */
	kvl_virtq_push(queue, request->head, written < UINT32_MAX ? (uint32_t)written : UINT32_MAX);
}
