// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * Samples what the cores do: for which of two hosts the kernel works on received packets, and whose
 * process it interrupts for that.
 *
 * Two network namespaces stand for two hosts. On veth the receiver's work is done on the sender's core,
 * in its process's time. A sample belongs to it if the call chain has veth_poll() or process_backlog().
 * The latter serves all interfaces of a core; whose packet it is working on is noted by a tracepoint.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#define SENDER 0
#define RECEIVER 1
#define NOBODY 2

/* What a sample is about, beside the process: a host's packets, a conversion among them, or neither. */
#define AT_SENDER 0
#define AT_RECEIVER 1
#define CONVERSION 2
#define ELSEWHERE 3
#define KINDS 4

/* Frames of a call chain that are looked at, innermost first. */
#define FRAMES 48

/* Functions of the kernel. */
#define VETH_POLL 0
#define PROCESS_BACKLOG 1
#define SKB_PP_COW_DATA 2
#define FUNCTIONS 3

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

struct sk_buff {
	struct net_device *dev;
} KERNEL;

/* Arguments of the raw tracepoint netif_receive_skb. */
struct received {
	struct sk_buff *packet;
};

/* What a core receives at present, and room for a call chain. */
struct core {
	struct net_device *device;
	__u32 host;
	__u32 unused;
	__u64 frames[FRAMES];
};

/* Set by the loader before the program is loaded. */
const volatile __u32 namespaces[2]; /* inodes, by host */
const volatile __u64 begins[FUNCTIONS], ends[FUNCTIONS];
const volatile __u32 polled_host; /* whose interface has NAPI of its own; NOBODY if both or neither */

/* Processes of the hosts; 0 as long as there is none. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u32);
} processes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct core);
} cores SEC(".maps");

/* Number of samples by process (of the sender, of the receiver, another), then by what they are about. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, (NOBODY + 1) * KINDS);
	__type(key, __u32);
	__type(value, __u64);
} samples SEC(".maps");

static __always_inline struct core *this_core(void)
{
	__u32 only = 0;

	return bpf_map_lookup_elem(&cores, &only);
}

SEC("raw_tracepoint/netif_receive_skb")
int penstock_received(struct received *received)
{
	struct core *core = this_core();
	struct sk_buff *packet = received->packet;
	struct net_device *device = BPF_CORE_READ(packet, dev);

	/* Most packets come in by the same interface as the one before. */
	if (!core || core->device == device)
		return 0;
	__u32 namespace = BPF_CORE_READ(device, nd_net.net, ns.inum);

	core->device = device;
	core->host = namespace == namespaces[RECEIVER] ? RECEIVER :
		     namespace == namespaces[SENDER]   ? SENDER :
							 NOBODY;
	return 0;
}

static __always_inline __u32 whose_process(void)
{
	__u32 process = bpf_get_current_pid_tgid() >> 32;

	for (__u32 host = 0; host < NOBODY; host++) {
		__u32 key = host, *known = bpf_map_lookup_elem(&processes, &key);

		if (known && process && *known == process)
			return host;
	}
	return NOBODY;
}

SEC("perf_event")
int penstock_sample(void *context)
{
	struct core *core = this_core();
	__u32 seen = 0, kind = ELSEWHERE;

	if (!core)
		return 0;
	long bytes = bpf_get_stack(context, core->frames, sizeof(core->frames), 0);
	for (__u32 i = 0; i < FRAMES; i++) {
		if ((long)(i * sizeof(__u64)) >= bytes)
			break;
		__u64 frame = core->frames[i];
		/* By signs instead of branches, which the verifier would follow one by one. */
		for (__u32 f = 0; f < FUNCTIONS; f++) {
			__u64 from_begin = frame - begins[f], from_end = frame - ends[f];

			seen |= (~from_begin & from_end) >> 63 << f;
		}
	}
	__u32 host = core->host;
	if (seen & 1 << VETH_POLL && polled_host != NOBODY)
		host = polled_host;
	if (seen & (1 << VETH_POLL | 1 << PROCESS_BACKLOG) && host != NOBODY)
		kind = host == SENDER		       ? AT_SENDER :
		       seen & 1 << SKB_PP_COW_DATA ? CONVERSION :
						       AT_RECEIVER;
	__u32 key = whose_process() * KINDS + kind;
	__u64 *count = bpf_map_lookup_elem(&samples, &key);
	if (count)
		*count += 1;
	return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
