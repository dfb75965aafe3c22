// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * Steers a broker's payload packets to its AF_XDP sockets; everything else goes on to the kernel.
 *
 * A packet is the broker's when it is a whole UDP datagram over IPv4 or IPv6, with at most two VLAN
 * tags, to one of the broker's addresses and its port, and begins with the magic of a payload
 * packet. Its socket is the entry of the receive queue and of the worker that the stream belongs to.
 * Where there is no such stream the packet ends here, before it costs a buffer or anybody's time.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define MAX_ADDRESSES 64
#define MAX_VLAN_TAGS 2
#define IP_FRAGMENT 0x3fff /* more fragments, or an offset */

/* What became of a packet; the loader knows the same list. */
enum outcome {
	STEERED,
	NO_SOCKET,
	UNKNOWN_STREAM,
	NOT_IP,
	NOT_UDP,
	FRAGMENT,
	OTHER_PORT,
	OTHER_ADDRESS,
	NOT_PAYLOAD,
	MALFORMED,
	OUTCOMES,
};

/* What the program looks at of a payload packet; docs/protocol.md has the whole. */
struct payload {
	__u32 magic;
	__u32 checksum;
	__u64 key;
	__u16 stream;
} __attribute__((packed));

struct vlan {
	__be16 tag;
	__be16 protocol;
};

/* IPv4 as ::ffff:a.b.c.d; nothing is sent to ::, which stands for a place that is free */
struct address {
	__u64 high;
	__u64 low;
};

struct addresses {
	__u64 count; /* of places that may be taken */
	struct address places[MAX_ADDRESSES];
};

/* Set by the loader before the program is loaded. */
const volatile __u16 port;	       /* network byte order */
const volatile __u32 magic;	       /* as its four bytes lie in the packet */
const volatile __u32 sockets_per_queue = 1;
const volatile __u32 last_place;       /* of streams; their number is a power of two */

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, 1); /* the loader knows better */
	__type(key, __u32);
	__type(value, __u32);
} sockets SEC(".maps");

/*
 * Addresses come and go while the broker runs. It writes them through memory that it shares with the
 * kernel, like the streams below.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct addresses);
} addresses SEC(".maps");

/*
 * Keys of the streams that there are, each in the place that its lowest bits name, 0 where there is
 * none. The broker writes them through memory that it shares with the kernel: it takes no system call
 * and no capability.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* the loader knows better */
	__type(key, __u32);
	__type(value, __u64);
} streams SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, OUTCOMES);
	__type(key, __u32);
	__type(value, __u64);
} outcomes SEC(".maps");

static __always_inline int count(enum outcome outcome, int action)
{
	__u32 key = outcome;
	__u64 *counter = bpf_map_lookup_elem(&outcomes, &key);

	if (counter)
		*counter += 1;
	return action;
}

/*
 * A broker has few addresses, nearly always one: comparing is cheaper than a hash. Unrolled, for where each
 * lies is a constant then: Linux before 6.16 lets a loader without CAP_PERFMON work out no address that a
 * CPU could use for another while it speculates.
 */
static __always_inline int is_ours(const struct address *to)
{
	__u32 first = 0;
	const volatile struct addresses *ours = bpf_map_lookup_elem(&addresses, &first);
	__u64 count;

	if (!ours || !(to->high | to->low))
		return 0;
	count = ours->count;
#pragma unroll
	for (__u32 i = 0; i < MAX_ADDRESSES; i++) {
		if (i >= count)
			break;
		if (ours->places[i].high == to->high && ours->places[i].low == to->low)
			return 1;
	}
	return 0;
}

static __always_inline int is_known(__u64 key)
{
	__u32 place = key & last_place;
	const __u64 *known = bpf_map_lookup_elem(&streams, &place);

	return known && *known == key && key;
}

/* The worker of a stream among those that share a queue; the broker works it out the same way. */
static __always_inline __u32 worker_of(__u64 key, __u16 stream)
{
	__u64 mixed = (key ^ stream) * 0x9e3779b97f4a7c15ULL;

	return (__u32)(mixed >> 32) % sockets_per_queue;
}

/*
 * What follows an IPv4 header. Word by word, since a loader without CAP_PERFMON may add only constants
 * to a packet's address: the kernel guards against a CPU that speculates past the check before it.
 */
static __always_inline const void *after(const struct iphdr *ip)
{
	const void *at = ip + 1;

	for (int words = 5; words < 15 && words < ip->ihl; words++) {
		at += 4;
		barrier_var(at);
	}
	return at;
}

static __always_inline int steer(struct xdp_md *ctx, const struct udphdr *udp, const void *end)
{
	const struct payload *payload = (const void *)(udp + 1);
	__u32 socket;
	int action;

	if ((const void *)(payload + 1) > end || payload->magic != magic)
		return count(NOT_PAYLOAD, XDP_PASS);
	if (!is_known(payload->key))
		return count(UNKNOWN_STREAM, XDP_DROP);
	socket = ctx->rx_queue_index * sockets_per_queue +
		 worker_of(payload->key, payload->stream);
	action = bpf_redirect_map(&sockets, socket, XDP_PASS);
	return count(action == XDP_REDIRECT ? STEERED : NO_SOCKET, action);
}

SEC("xdp.frags")
int penstock_steer(struct xdp_md *ctx)
{
	const void *end = (const void *)(long)ctx->data_end;
	const void *at = (const void *)(long)ctx->data;
	const struct ethhdr *eth = at;
	struct address to = {};
	const struct udphdr *udp;
	__be16 protocol;

	if ((const void *)(eth + 1) > end)
		return count(MALFORMED, XDP_PASS);
	protocol = eth->h_proto;
	at = eth + 1;
	for (int tag = 0; tag < MAX_VLAN_TAGS; tag++) {
		const struct vlan *vlan = at;

		if (protocol != bpf_htons(ETH_P_8021Q) && protocol != bpf_htons(ETH_P_8021AD))
			break;
		if ((const void *)(vlan + 1) > end)
			return count(MALFORMED, XDP_PASS);
		protocol = vlan->protocol;
		at = vlan + 1;
	}

	if (protocol == bpf_htons(ETH_P_IP)) {
		const struct iphdr *ip = at;

		if ((const void *)(ip + 1) > end || ip->version != 4 || ip->ihl < 5)
			return count(MALFORMED, XDP_PASS);
		if (ip->protocol != IPPROTO_UDP)
			return count(NOT_UDP, XDP_PASS);
		if (ip->frag_off & bpf_htons(IP_FRAGMENT))
			return count(FRAGMENT, XDP_PASS);
		to.low = bpf_cpu_to_be64(0xffff00000000ULL | bpf_ntohl(ip->daddr));
		udp = after(ip);
	} else if (protocol == bpf_htons(ETH_P_IPV6)) {
		const struct ipv6hdr *ip = at;

		if ((const void *)(ip + 1) > end || ip->version != 6)
			return count(MALFORMED, XDP_PASS);
		if (ip->nexthdr == IPPROTO_FRAGMENT)
			return count(FRAGMENT, XDP_PASS);
		if (ip->nexthdr != IPPROTO_UDP)
			return count(NOT_UDP, XDP_PASS);
		__builtin_memcpy(&to, &ip->daddr, sizeof(to));
		udp = (const void *)(ip + 1);
	} else {
		return count(NOT_IP, XDP_PASS);
	}

	if ((const void *)(udp + 1) > end)
		return count(MALFORMED, XDP_PASS);
	if (udp->dest != port)
		return count(OTHER_PORT, XDP_PASS);
	if (!is_ours(&to))
		return count(OTHER_ADDRESS, XDP_PASS);
	return steer(ctx, udp, end);
}

/* Only what needs no GPL helper; the kernel wants a licence named. */
char LICENSE[] SEC("license") = "Dual MIT/GPL";
