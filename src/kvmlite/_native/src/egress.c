#include "egress.h"

#include <linux/if_ether.h>
#include <linux/in.h>
#include <string.h>

enum {
	ETH_SIZE = 14,
	IPV4_SIZE = 20,
	IPV6_SIZE = 40,
	TCP_SIZE = 20,
	UDP_SIZE = 8,
	ICMP_SIZE = 8,
	ICMPV6 = 58,
	TCP_FLAG_SYN = 0x02,
	TCP_FLAG_ACK = 0x10,
	TCP_CSUM_OFFSET = 16,
	UDP_CSUM_OFFSET = 6,
	IPV4_FRAGMENT = 0x3fff, /* more fragments, or an offset */
	ROUTER_SOLICITATION = 133,
	NEIGHBOUR_SOLICITATION = 135,
	NEIGHBOUR_ADVERTISEMENT = 136,
	GSO_UDP_L4 = 5, /* VIRTIO_NET_HDR_GSO_UDP_L4, which older headers lack */
};

/* Where a packet goes to, once its headers are understood. */
struct packet {
	uint8_t family;
	uint8_t protocol;
	uint16_t source_port, port; /* of TCP and UDP; otherwise 0 */
	uint8_t tcp_flags, icmp_type;
	size_t transport; /* offset of the header behind IP's in the frame */
	uint8_t source[4]; /* of IPv4 */
	uint8_t address[16];
};

static uint16_t load_be16(const uint8_t *at)
{
	return (uint16_t)(at[0] << 8 | at[1]);
}

static bool read_ipv4(const uint8_t *ip, size_t size, struct packet *ret)
{
	if (size < IPV4_SIZE || ip[0] != 0x45) /* version 4, no options: source routes are among them */
		return false;
	if (load_be16(ip + 6) & IPV4_FRAGMENT)
		return false;
	ret->family = 4;
	ret->protocol = ip[9];
	ret->transport = ETH_SIZE + IPV4_SIZE;
	memcpy(ret->source, ip + 12, 4);
	memcpy(ret->address, ip + 16, 4);
	return ret->protocol != ICMPV6;
}

static bool read_ipv6(const uint8_t *ip, size_t size, struct packet *ret)
{
	if (size < IPV6_SIZE || ip[0] >> 4 != 6)
		return false;
	ret->family = 6;
	ret->protocol = ip[6]; /* an extension header is no protocol that read_transport knows */
	ret->transport = ETH_SIZE + IPV6_SIZE;
	memcpy(ret->address, ip + 24, 16);
	return ret->protocol != IPPROTO_ICMP;
}

static bool read_transport(const uint8_t *at, size_t size, struct packet *ret)
{
	switch (ret->protocol) {
	case IPPROTO_TCP:
		if (size < TCP_SIZE)
			return false;
		ret->tcp_flags = at[13];
		break;
	case IPPROTO_UDP:
		if (size < UDP_SIZE)
			return false;
		break;
	case IPPROTO_ICMP:
	case ICMPV6:
		if (size < ICMP_SIZE)
			return false;
		ret->icmp_type = at[0];
		return true;
	default:
		return false;
	}
	ret->source_port = load_be16(at);
	ret->port = load_be16(at + 2);
	return true;
}

static bool read_packet(const uint8_t *frame, size_t size, struct packet *ret)
{
	uint16_t type = load_be16(frame + 12);
	bool is_known = type == ETH_P_IP     ? read_ipv4(frame + ETH_SIZE, size - ETH_SIZE, ret)
			: type == ETH_P_IPV6 ? read_ipv6(frame + ETH_SIZE, size - ETH_SIZE, ret)
					     : false;

	return is_known && read_transport(frame + ret->transport, size - ret->transport, ret);
}

/* The host stores a checksum where the header says. Nowhere but in the checksum field: addresses are judged by now. */
static bool is_checksum_honest(const struct virtio_net_hdr *header, const struct packet *packet)
{
	if (!(header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM))
		return true;
	if (header->csum_start != packet->transport)
		return false;
	return (packet->protocol == IPPROTO_TCP && header->csum_offset == TCP_CSUM_OFFSET) ||
	       (packet->protocol == IPPROTO_UDP && header->csum_offset == UDP_CSUM_OFFSET);
}

/* A frame that is to be cut up is of the kind it says: the pieces get their headers from ours. */
static bool is_segmentation_honest(const struct virtio_net_hdr *header, const struct packet *packet)
{
	switch (header->gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
	case VIRTIO_NET_HDR_GSO_NONE:
		return true;
	case VIRTIO_NET_HDR_GSO_TCPV4:
		return packet->family == 4 && packet->protocol == IPPROTO_TCP;
	case VIRTIO_NET_HDR_GSO_TCPV6:
		return packet->family == 6 && packet->protocol == IPPROTO_TCP;
	case GSO_UDP_L4:
		return packet->protocol == IPPROTO_UDP;
	default: /* VIRTIO_NET_HDR_GSO_UDP makes fragments */
		return false;
	}
}

static bool matches_prefix(const struct kvl_egress_rule *rule, const struct packet *packet)
{
	uint8_t bytes = rule->prefix_size / 8, bits = rule->prefix_size % 8;

	if (rule->family != packet->family || memcmp(rule->address, packet->address, bytes) != 0)
		return false;
	return bits == 0 || (rule->address[bytes] ^ packet->address[bytes]) >> (8 - bits) == 0;
}

static bool matches(const struct kvl_egress_rule *rule, const struct packet *packet)
{
	bool has_ports = packet->protocol == IPPROTO_TCP || packet->protocol == IPPROTO_UDP;

	if (rule->protocol != 0 && rule->protocol != packet->protocol)
		return false;
	if (rule->port != 0 && (!has_ports || rule->port != packet->port))
		return false;
	return matches_prefix(rule, packet);
}

static bool is_reply(const struct kvl_egress *egress, const struct packet *packet)
{
	if (packet->protocol != IPPROTO_TCP || (packet->tcp_flags & (TCP_FLAG_SYN | TCP_FLAG_ACK)) == TCP_FLAG_SYN)
		return false;
	for (uint32_t i = 0; i < egress->reply_count && i < KVL_EGRESS_MAX_REPLIES; i++)
		if (egress->reply_ports[i] == packet->source_port)
			return true;
	return false;
}

/* What a guest needs to find its neighbours and its own address. None of it leaves the link. */
static bool is_link_service(const struct packet *packet)
{
	static const uint8_t everybody[4] = {255, 255, 255, 255};
	static const uint8_t dhcp_servers[16] = {0xff, 2, [13] = 1, [15] = 2};

	if (packet->protocol == IPPROTO_UDP && packet->family == 4)
		return packet->source_port == 68 && packet->port == 67 && memcmp(packet->address, everybody, 4) == 0;
	if (packet->protocol == IPPROTO_UDP)
		return packet->source_port == 546 && packet->port == 547 &&
		       memcmp(packet->address, dhcp_servers, 16) == 0;
	if (packet->protocol != ICMPV6)
		return false;
	if (packet->icmp_type != ROUTER_SOLICITATION && packet->icmp_type != NEIGHBOUR_SOLICITATION &&
	    packet->icmp_type != NEIGHBOUR_ADVERTISEMENT)
		return false;
	return (packet->address[0] == 0xff && packet->address[1] == 0x02) ||
	       (packet->address[0] == 0xfe && (packet->address[1] & 0xc0) == 0x80);
}

static bool has_own_source(const struct kvl_egress *egress, const struct packet *packet)
{
	static const uint8_t nobody[4];

	if (!egress->has_source || packet->family != 4 || memcmp(packet->source, egress->source, 4) == 0)
		return true;
	return memcmp(packet->source, nobody, 4) == 0 && is_link_service(packet);
}

bool kvl_egress_allows(const struct kvl_egress *egress, const struct virtio_net_hdr *header, const uint8_t *frame,
		       size_t size)
{
	struct packet packet = {0};

	if (size < ETH_SIZE)
		return false;
	if (load_be16(frame + 12) == ETH_P_ARP)
		return header == NULL || (header->flags == 0 && header->gso_type == VIRTIO_NET_HDR_GSO_NONE);
	if (!read_packet(frame, size, &packet))
		return false;
	if (header != NULL && !(is_checksum_honest(header, &packet) && is_segmentation_honest(header, &packet)))
		return false;
	if (!has_own_source(egress, &packet))
		return false;
	if (is_link_service(&packet) || is_reply(egress, &packet))
		return true;
	for (uint32_t i = 0; i < egress->rule_count && i < KVL_EGRESS_MAX_RULES; i++)
		if (matches(&egress->rules[i], &packet))
			return true;
	return false;
}
