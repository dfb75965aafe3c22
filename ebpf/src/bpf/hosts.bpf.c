// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * Measures how long the kernel works on received packets, by the host that they are received on and
 * by the process that happens to be interrupted for it.
 *
 * Two network namespaces stand for two hosts. On veth the receiver's work is done on the sender's core,
 * in its process's time. veth_poll() serves one interface, so it is measured as a whole. The core's
 * own queue (process_backlog()) serves all of them: there every packet says whose it is, and only one in
 * PERIOD is timed, for the clock costs as much as a part of the work.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

/* A prime, so that it does not fall into step with bursts. */
#define PERIOD 13

#define SENDER 0
#define RECEIVER 1
#define NOBODY 2
#define HOSTS 2

/* What is used of the kernel's structures; libbpf finds the fields' places. */
#define KERNEL __attribute__((preserve_access_index))

struct ns_common {
	unsigned int inum;
} KERNEL;

struct net {
	struct ns_common ns;
} KERNEL;

typedef struct {
	struct net *net;
} KERNEL possible_net_t;

struct net_device {
	possible_net_t nd_net;
} KERNEL;

struct napi_struct {
	struct net_device *dev;
} KERNEL;

struct sk_buff {
	struct net_device *dev;
} KERNEL;

/* What a core is doing. */
struct now {
	__u64 poll_at; /* ns; 0 outside veth_poll() */
	__u64 packet_at; /* 0 unless a packet is being timed */
	__u64 conversion_at;
	__u32 host; /* of what is being received */
	__u32 packets;
	__u32 conversions;
	__u32 unused;
};

struct sum {
	__u64 poll_ns;
	__u64 packets;
	__u64 packets_timed;
	__u64 packet_ns; /* of those timed */
	__u64 conversions;
	__u64 conversions_timed;
	__u64 conversion_ns; /* of those timed; a part of the above */
};

/* Inodes of both namespaces; set by the loader before the program is loaded. */
const volatile __u32 namespaces[HOSTS];

/* Processes of the hosts; 0 as long as there is none. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, HOSTS);
	__type(key, __u32);
	__type(value, __u32);
} processes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct now);
} cores SEC(".maps");

/* By host, then by whose process was interrupted. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, HOSTS * (NOBODY + 1));
	__type(key, __u32);
	__type(value, struct sum);
} sums SEC(".maps");

static __always_inline struct now *core(void)
{
	__u32 only = 0;

	return bpf_map_lookup_elem(&cores, &only);
}

static __always_inline __u32 host_of(struct net_device *device)
{
	__u32 namespace = device->nd_net.net->ns.inum;

	if (namespace == namespaces[RECEIVER])
		return RECEIVER;
	return namespace == namespaces[SENDER] ? SENDER : NOBODY;
}

static __always_inline __u32 interrupted(void)
{
	__u32 process = bpf_get_current_pid_tgid() >> 32;

	for (__u32 host = 0; host < HOSTS; host++) {
		__u32 key = host, *known = bpf_map_lookup_elem(&processes, &key);

		if (known && process && *known == process)
			return host;
	}
	return NOBODY;
}

static __always_inline struct sum *sum_of(__u32 host)
{
	__u32 key = host * (NOBODY + 1) + interrupted();

	return host >= HOSTS ? 0 : bpf_map_lookup_elem(&sums, &key);
}

SEC("fentry/veth_poll")
int penstock_poll(__u64 *arguments)
{
	struct napi_struct *napi = (void *)arguments[0];
	struct now *now = core();

	if (!now)
		return 0;
	now->host = host_of(napi->dev);
	now->poll_at = bpf_ktime_get_ns();
	return 0;
}

SEC("fexit/veth_poll")
int penstock_polled(void)
{
	struct now *now = core();

	if (!now || !now->poll_at)
		return 0;
	struct sum *sum = sum_of(now->host);
	if (sum)
		sum->poll_ns += bpf_ktime_get_ns() - now->poll_at;
	now->poll_at = 0;
	now->host = NOBODY;
	return 0;
}

static __always_inline int packet_begins(struct sk_buff *packet)
{
	struct now *now = core();

	/* What veth_poll() hands on is in its time already. */
	if (!now || now->poll_at)
		return 0;
	now->host = host_of(packet->dev);
	if (++now->packets % PERIOD == 0)
		now->packet_at = bpf_ktime_get_ns();
	return 0;
}

static __always_inline int packet_ends(void)
{
	struct now *now = core();

	if (!now || now->poll_at)
		return 0;
	struct sum *sum = sum_of(now->host);
	if (sum) {
		sum->packets++;
		if (now->packet_at) {
			sum->packets_timed++;
			sum->packet_ns += bpf_ktime_get_ns() - now->packet_at;
		}
	}
	now->packet_at = 0;
	now->host = NOBODY;
	return 0;
}

SEC("fentry/__netif_receive_skb")
int penstock_packet(__u64 *arguments)
{
	return packet_begins((void *)arguments[0]);
}

SEC("fexit/__netif_receive_skb")
int penstock_packet_done(void)
{
	return packet_ends();
}

/* Where the compiler has merged the former with its caller. */
SEC("fentry/__netif_receive_skb_one_core")
int penstock_packet_core(__u64 *arguments)
{
	return packet_begins((void *)arguments[0]);
}

SEC("fexit/__netif_receive_skb_one_core")
int penstock_packet_core_done(void)
{
	return packet_ends();
}

/* Makes an XDP buffer of a socket buffer, in native mode on veth and in generic mode; no NIC does. */
SEC("fentry/skb_pp_cow_data")
int penstock_convert(void)
{
	struct now *now = core();

	if (now && ++now->conversions % PERIOD == 0)
		now->conversion_at = bpf_ktime_get_ns();
	return 0;
}

SEC("fexit/skb_pp_cow_data")
int penstock_converted(void)
{
	struct now *now = core();

	if (!now)
		return 0;
	struct sum *sum = sum_of(now->host);
	if (sum) {
		sum->conversions++;
		if (now->conversion_at) {
			sum->conversions_timed++;
			sum->conversion_ns += bpf_ktime_get_ns() - now->conversion_at;
		}
	}
	now->conversion_at = 0;
	return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
