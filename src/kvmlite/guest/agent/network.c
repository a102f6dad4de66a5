#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/neighbour.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

enum {
    MAC_SIZE = 6,
    ENTRIES_MAX = 256,
    APPEAR_STEPS = 100, /* of 10 ms: a driver may still be at it */
    RUNNING_STEPS = 500, /* of 2 ms: the kernel notices a carrier later, when it gets round to it */
    REQUEST_SIZE = 256,
    RESOLV_LINKS_MAX = 8,
};

#define RESOLV_CONF "/etc/resolv.conf"
#define RESOLV_SPARE "/run/kvmlite-resolv.conf"

/* NETWORK: 0 MAC / 6 le16 MTU, 0 to leave it / 8 le16 count of addresses / 10 le16 count of routes / then addresses, then
 * routes, then the text of resolv.conf; without a text the file is left alone. */
struct settings {
    uint8_t mac[MAC_SIZE];
    uint16_t mtu, address_count, route_count;
} __attribute__((packed));

/* Families are 4 and 6; an IPv4 address is the first four bytes. */
struct address {
    uint8_t family, prefix_size, address[16];
} __attribute__((packed));

/* A gateway of zeros: whoever is meant is on the link. */
struct route {
    uint8_t family, prefix_size, destination[16], gateway[16];
} __attribute__((packed));

struct request {
    struct nlmsghdr header;
    uint8_t body[REQUEST_SIZE];
};

static struct rtattr *tail(struct request *request)
{
    return (struct rtattr *)((uint8_t *)request + NLMSG_ALIGN(request->header.nlmsg_len));
}

static void *begin(struct request *request, uint16_t type, uint16_t flags, size_t size)
{
    memset(request, 0, sizeof(*request));
    request->header = (struct nlmsghdr){
        .nlmsg_len = (uint32_t)NLMSG_LENGTH(size), .nlmsg_type = type,
        .nlmsg_flags = (uint16_t)(NLM_F_REQUEST | NLM_F_ACK | flags), .nlmsg_seq = 1,
    };
    return NLMSG_DATA(&request->header);
}

static void add(struct request *request, uint16_t type, const void *data, size_t size)
{
    struct rtattr *attribute = tail(request);

    *attribute = (struct rtattr){.rta_type = type, .rta_len = (uint16_t)RTA_LENGTH(size)};
    memcpy(RTA_DATA(attribute), data, size);
    request->header.nlmsg_len = (uint32_t)(NLMSG_ALIGN(request->header.nlmsg_len) + RTA_ALIGN(attribute->rta_len));
}

/* Send one request and wait for its answer: 0 or an errno. */
static int ask(int fd, const struct request *request)
{
    struct {
        struct nlmsghdr header;
        struct nlmsgerr error;
        uint8_t rest[1024];
    } answer;

    if (send(fd, request, request->header.nlmsg_len, 0) < 0)
        return errno;
    ssize_t size = recv(fd, &answer, sizeof(answer), 0);

    if (size < 0)
        return errno;
    if ((size_t)size < sizeof(answer.header) + sizeof(answer.error) || answer.header.nlmsg_type != NLMSG_ERROR)
        return EPROTO;
    return -answer.error.error;
}

static uint8_t kernel_family(uint8_t family)
{
    return family == 4 ? AF_INET : AF_INET6;
}

static size_t address_size(uint8_t family)
{
    return family == 4 ? 4 : 16;
}

static int raise_link(int fd, int index, uint16_t mtu)
{
    struct request request;
    struct ifinfomsg *link = begin(&request, RTM_NEWLINK, 0, sizeof(*link));

    link->ifi_index = index;
    link->ifi_flags = link->ifi_change = IFF_UP;
    if (mtu != 0)
        add(&request, IFLA_MTU, &(uint32_t){mtu}, sizeof(uint32_t));
    return ask(fd, &request);
}

static int add_address(int fd, int index, const struct address *address)
{
    struct request request;
    struct ifaddrmsg *message = begin(&request, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, sizeof(*message));

    message->ifa_family = kernel_family(address->family);
    message->ifa_prefixlen = address->prefix_size;
    message->ifa_index = (uint32_t)index;
    message->ifa_flags = IFA_F_NODAD; /* the host chose it, and a command may want it at once */
    add(&request, IFA_LOCAL, address->address, address_size(address->family));
    add(&request, IFA_ADDRESS, address->address, address_size(address->family));
    if (address->family == 4 && address->prefix_size < 31) {
        uint32_t broadcast;

        memcpy(&broadcast, address->address, sizeof(broadcast));
        broadcast |= htobe32(UINT32_MAX >> address->prefix_size);
        add(&request, IFA_BROADCAST, &broadcast, sizeof(broadcast));
    }
    return ask(fd, &request);
}

static bool has_gateway(const struct route *route)
{
    static const uint8_t nobody[16];

    return memcmp(route->gateway, nobody, address_size(route->family)) != 0;
}

static int add_route(int fd, int index, const struct route *route)
{
    struct request request;
    struct rtmsg *message = begin(&request, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, sizeof(*message));
    size_t size = address_size(route->family);

    message->rtm_family = kernel_family(route->family);
    message->rtm_dst_len = route->prefix_size;
    message->rtm_table = RT_TABLE_MAIN;
    message->rtm_protocol = RTPROT_BOOT;
    message->rtm_scope = has_gateway(route) ? RT_SCOPE_UNIVERSE : RT_SCOPE_LINK;
    message->rtm_type = RTN_UNICAST;
    message->rtm_flags = has_gateway(route) ? RTNH_F_ONLINK : 0; /* also outside our prefix: the host knows better */
    if (route->prefix_size > 0)
        add(&request, RTA_DST, route->destination, size);
    if (has_gateway(route))
        add(&request, RTA_GATEWAY, route->gateway, size);
    add(&request, RTA_OIF, &index, sizeof(index));
    return ask(fd, &request);
}

/* Have the kernel ask for a gateway's address now. That tells the other side ours: until it has heard of the guest, passt
 * serving the card (vhost-user) sends all to everybody, and Linux takes no connection that came in so. */
static int greet(int fd, int index, const struct route *route)
{
    struct request request;

    if (!has_gateway(route))
        return 0;
    struct ndmsg *neighbour = begin(&request, RTM_NEWNEIGH, NLM_F_CREATE, sizeof(*neighbour));

    neighbour->ndm_family = kernel_family(route->family);
    neighbour->ndm_ifindex = index;
    neighbour->ndm_flags = NTF_USE;
    add(&request, NDA_DST, route->gateway, address_size(route->family));
    return ask(fd, &request);
}

/* Index of the interface with this address now; 0 if there is none. */
static int find_link(int fd, const uint8_t *mac)
{
    struct if_nameindex *links = if_nameindex();
    int index = 0;

    for (struct if_nameindex *link = links; link != NULL && link->if_index != 0; link++) {
        struct ifreq request = {0};

        memcpy(request.ifr_name, link->if_name, strnlen(link->if_name, IFNAMSIZ - 1));
        if (ioctl(fd, SIOCGIFHWADDR, &request) == 0 && memcmp(request.ifr_hwaddr.sa_data, mac, MAC_SIZE) == 0)
            index = (int)link->if_index;
    }
    if_freenameindex(links);
    return index;
}

static int wait_for_link(int fd, const uint8_t *mac)
{
    int index = find_link(fd, mac);

    for (int step = 0; index == 0 && step < APPEAR_STEPS; step++) {
        nanosleep(&(struct timespec){.tv_nsec = 10 * NS_PER_MS}, NULL);
        index = find_link(fd, mac);
    }
    return index;
}

/* What is sent before the kernel has noticed the carrier is dropped. A card that has none is left as it is. */
static void wait_for_carrier(int fd, int index)
{
    struct ifreq request = {.ifr_ifindex = index};

    if (ioctl(fd, SIOCGIFNAME, &request) != 0)
        return;
    for (int step = 0; step < RUNNING_STEPS; step++) {
        if (ioctl(fd, SIOCGIFFLAGS, &request) != 0 || request.ifr_flags & IFF_RUNNING)
            return;
        nanosleep(&(struct timespec){.tv_nsec = 2 * NS_PER_MS}, NULL);
    }
}

static int configure(const struct settings *settings, const struct address *addresses, const struct route *routes)
{
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);

    if (fd < 0)
        return errno;
    int index = wait_for_link(fd, settings->mac);
    int error = index == 0 ? ENODEV : raise_link(fd, index, le16toh(settings->mtu));

    for (int count = 0; error == 0 && count < le16toh(settings->address_count); count++)
        error = add_address(fd, index, &addresses[count]);
    for (int count = 0; error == 0 && count < le16toh(settings->route_count); count++)
        error = add_route(fd, index, &routes[count]);
    if (error == 0)
        wait_for_carrier(fd, index);
    for (int count = 0; error == 0 && count < le16toh(settings->route_count); count++)
        error = greet(fd, index, &routes[count]);
    close(fd);
    return error;
}

static int write_file(const char *path, const char *text, size_t size)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

    if (fd < 0)
        return errno;
    ssize_t written = write(fd, text, size);
    int error = written == (ssize_t)size ? 0 : written < 0 ? errno : ENOSPC;

    close(fd);
    return error;
}

static void make_parents(char *path)
{
    for (char *slash = strchr(path + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(path, 0755); /* what cannot be made shows when the file is opened */
        *slash = '/';
    }
}

/* Make the directories that the file, or the last of a row of links it is, lies in: an image of a full system has a link
 * to a file below /run that a daemon would have made. */
static void make_way(const char *path)
{
    char here[PATH_MAX], target[PATH_MAX], next[2 * PATH_MAX];

    snprintf(here, sizeof(here), "%s", path);
    for (int count = 0; count < RESOLV_LINKS_MAX; count++) {
        make_parents(here);
        ssize_t size = readlink(here, target, sizeof(target) - 1);

        if (size < 0)
            return;
        target[size] = '\0';
        if (target[0] == '/')
            snprintf(next, sizeof(next), "%s", target);
        else
            snprintf(next, sizeof(next), "%.*s/%s", (int)(strrchr(here, '/') - here), here, target);
        if (strlen(next) >= sizeof(here))
            return;
        memcpy(here, next, strlen(next) + 1);
    }
}

/* A root that cannot be written to gets the file from /run, laid over its own. */
static int write_resolv_conf(const char *text, size_t size)
{
    make_way(RESOLV_CONF);
    int error = write_file(RESOLV_CONF, text, size);

    if (error != EROFS)
        return error;
    error = write_file(RESOLV_SPARE, text, size);
    if (error == 0 && mount(RESOLV_SPARE, RESOLV_CONF, NULL, MS_BIND, NULL) != 0)
        error = errno;
    return error;
}

static bool is_prefix(uint8_t family, uint8_t prefix_size)
{
    return (family == 4 && prefix_size <= 32) || (family == 6 && prefix_size <= 128);
}

int network_configure(const uint8_t *payload, size_t size)
{
    struct settings settings;

    if (size < sizeof(settings))
        return EBADMSG;
    memcpy(&settings, payload, sizeof(settings));
    size_t address_count = le16toh(settings.address_count), route_count = le16toh(settings.route_count);
    const struct address *addresses = (const void *)(payload + sizeof(settings));
    const struct route *routes = (const void *)(addresses + address_count);
    size_t text_offset = sizeof(settings) + address_count * sizeof(*addresses) + route_count * sizeof(*routes);

    if (address_count > ENTRIES_MAX || route_count > ENTRIES_MAX || text_offset > size)
        return EBADMSG;
    for (size_t index = 0; index < address_count; index++)
        if (!is_prefix(addresses[index].family, addresses[index].prefix_size))
            return EBADMSG;
    for (size_t index = 0; index < route_count; index++)
        if (!is_prefix(routes[index].family, routes[index].prefix_size))
            return EBADMSG;
    int error = configure(&settings, addresses, routes);

    if (error == 0 && text_offset < size)
        error = write_resolv_conf((const char *)payload + text_offset, size - text_offset);
    return error;
}
