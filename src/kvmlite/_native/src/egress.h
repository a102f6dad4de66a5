/*
 * What a guest may send: an allow-list of destinations, judged frame by frame on the host.
 *
 * Whoever carries the guest's frames asks here before it passes one on. The frame has to be a copy: the guest could
 * change its own after the answer. So a worker copies the first KVL_EGRESS_HEAD bytes of a frame (or all of a shorter
 * one), asks about the copy, and sends the copy and the rest.
 *
 * Whatever is not understood is refused: fragments, IP options, IPv6 extension headers, VLAN tags, other EtherTypes
 * and protocols, headers cut short. Allowed besides the rules: ARP; neighbour and router solicitation and neighbour
 * advertisement to link-local or multicast addresses; DHCP and DHCPv6 to all servers of the link.
 */
#ifndef KVL_EGRESS_H
#define KVL_EGRESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <linux/virtio_net.h>

enum {
	KVL_EGRESS_HEAD = 128, /* no header that is looked at ends behind it */
	KVL_EGRESS_MAX_RULES = 256,
	KVL_EGRESS_MAX_REPLIES = 64,
};

struct kvl_egress_rule {
	uint8_t family;      /* 4 or 6: the version of IP */
	uint8_t prefix_size; /* bits of (address) that count; 0: any destination */
	uint8_t protocol;    /* IPPROTO_TCP or IPPROTO_UDP; 0: these and ICMP */
	uint16_t port;       /* destination, in host byte order; 0: any. With a port, never ICMP */
	uint8_t address[16]; /* in network byte order; of IPv4, the first four bytes */
};

/* Written once by Python before any worker runs, then only read. */
struct kvl_egress {
	uint32_t rule_count;
	uint32_t reply_count;
	/*
	 * IPv4: whether the guest has to send from (source), DHCP apart. For carriers to whom a guest's own address means
	 * something: passt may send to it what was for the gateway.
	 */
	bool has_source;
	uint8_t source[4];
	struct kvl_egress_rule rules[KVL_EGRESS_MAX_RULES];
	/*
	 * TCP ports the guest serves: from these it may answer anybody, but open nothing. Only for carriers that know
	 * their connections and drop what belongs to none, as passt does.
	 */
	uint16_t reply_ports[KVL_EGRESS_MAX_REPLIES];
};

/*
 * Whether the guest may send this frame. (frame) holds its first (size) bytes, all of them or at least
 * KVL_EGRESS_HEAD, where no guest can write. (header) is the copy of its virtio_net_hdr, NULL where none travels with
 * the frame: what it asks the host to write into the frame has to be a checksum and nothing else.
 * Any thread; does not block.
 */
bool kvl_egress_allows(const struct kvl_egress *egress, const struct virtio_net_hdr *header, const uint8_t *frame,
		       size_t size);

#endif
