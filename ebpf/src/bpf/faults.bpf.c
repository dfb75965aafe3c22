// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * A bad network: sits where packets come in on one interface and sends them out on another, less
 * those that it loses, and not quite as they were.
 *
 * Treated are UDP and TCP packets, over IPv4 or IPv6, from or to one port; everything else goes
 * through untouched. What happens to a packet is decided by a generator of which user space gives the
 * seed, so that the same packets in the same order meet the same faults.
 *
 * A program of this kind cannot keep a packet. One that is to come late leaves its bytes in a slot,
 * and a packet that comes some places later carries them: it is sent on as a clone and then
 * overwritten. When nothing follows, user space lets it out in time with a packet of its own.
 * A checksum that is still to be filled in would be left to the carrier, so TCP packets must come with
 * theirs; the xdp path does not look at that of UDP.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* Packets that may wait at once, and bytes of each: a 9,000-byte MTU and its Ethernet header. */
#define SLOTS 8
#define SLOT_BYTES 9216
/* In place of a packet's number: nobody uses the slot, or somebody fills or empties it. */
#define FREE 0
#define TAKEN (~0ULL)
/* One damaged packet in so many is damaged in its headers. */
#define IN_HEADERS 8
/* Packets that a late one may be late by, and nanoseconds. */
#define FURTHEST 16
#define LONGEST 2000000
#define IP_FRAGMENT 0x3fff /* more fragments, or an offset */

/* What became of packets; the loader knows the same list. */
enum event {
	SEEN,	    /* treated at all */
	LOST,
	HELD,	    /* to come late */
	LET_OUT,    /* came late */
	CORRUPTED,
	DUPLICATED,
	TRUNCATED,
	SWALLOWED,  /* larger than what gets through */
	NO_ROOM,    /* were to come late, but no slot was free or large enough */
	EVENTS,
};

/* Set by the loader before the program is loaded. */
const volatile __u16 port;	/* network byte order */
const volatile __u8 udp = 1;
const volatile __u8 tcp;
const volatile __u32 output;	/* number of the interface that packets go out on */
const volatile __u64 seed = 1;	/* not 0 */

/* May change at any time; the loader writes it field by field. Chances are parts of 2^32. */
struct settings {
	__u64 lose;
	__u64 reorder;
	__u64 corrupt;
	__u64 duplicate;
	__u64 truncate;
	__u64 largest;	/* bytes of an IP packet that gets through */
};

struct state {
	struct bpf_spin_lock lock;
	__u32 reserved;
	__u64 random;	/* 0 before the first packet */
	__u64 packets;
	__u64 due[SLOTS];	/* number of the packet that is to carry it; or FREE, TAKEN */
	__u64 overdue[SLOTS];	/* when it is let out in any case */
};

struct slot {
	__u32 len;
	__u8 bytes[SLOT_BYTES];
};

/* Protocols, each with settings of its own; the loader knows the same numbers. */
enum protocol { UDP, TCP, PROTOCOLS };

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PROTOCOLS);
	__type(key, __u32);
	__type(value, struct settings);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct state);
} state SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SLOTS);
	__type(key, __u32);
	__type(value, struct slot);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, EVENTS);
	__type(key, __u32);
	__type(value, __u64);
} events SEC(".maps");

/* Which packet it is, and where its parts begin. */
struct layout {
	__u32 protocol;
	__u32 transport;
	__u32 payload;
};

/* What is to happen to a packet. */
struct plan {
	__u8 lose;
	__u8 corrupt;
	__u8 duplicate;
	__u8 truncate;
	__u8 hold;
	__u32 into;	/* slot that it is to wait in, or SLOTS */
	__u32 from;	/* slot whose packet it carries, or SLOTS */
	__u64 due;	/* number of the packet that is to carry it */
	__u32 where;	/* random numbers: which byte and bit changes, how much is left */
	__u32 bit;
	__u32 rest;
};

static __always_inline void count(enum event event)
{
	__u32 key = event;
	__u64 *counter = bpf_map_lookup_elem(&events, &key);

	if (counter)
		*counter += 1;
}

/* Marsaglia's xorshift, of period 2^64 - 1. */
static __always_inline __u32 draw(__u64 *random)
{
	__u64 x = *random;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	*random = x;
	return x >> 32;
}

/* A number below `limit`, of a random one. */
static __always_inline __u32 below(__u32 random, __u32 limit)
{
	return ((__u64)random * limit) >> 32;
}

/* Whether the packet is to be treated, and where its parts are. */
static __always_inline int treats(struct __sk_buff *skb, struct layout *layout)
{
	__u32 at = sizeof(struct ethhdr);
	__be16 ports[2];
	__u8 protocol;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr ip;

		if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) || ip.ihl < 5 ||
		    ip.frag_off & bpf_htons(IP_FRAGMENT))
			return 0;
		protocol = ip.protocol;
		at += ip.ihl * 4;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr ip;

		if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)))
			return 0;
		protocol = ip.nexthdr;
		at += sizeof(ip);
	} else {
		return 0;
	}
	if (bpf_skb_load_bytes(skb, at, ports, sizeof(ports)))
		return 0;
	if (ports[0] != port && ports[1] != port)
		return 0;
	layout->transport = at;
	if (protocol == IPPROTO_UDP && udp) {
		layout->protocol = UDP;
		layout->payload = at + sizeof(struct udphdr);
		return 1;
	}
	if (protocol == IPPROTO_TCP && tcp) {
		struct tcphdr header;

		if (bpf_skb_load_bytes(skb, at, &header, sizeof(header)))
			return 0;
		layout->protocol = TCP;
		layout->payload = at + header.doff * 4;
		return 1;
	}
	return 0;
}

/*
 * Decides on a packet. Every packet takes as many random numbers, so that the chance of one fault
 * does not change which packets another one hits.
 */
static __always_inline void decide(struct state *state, const struct settings *chances, __u32 len,
				   struct plan *plan)
{
	__u32 lose, reorder, corrupt, duplicate, truncate, distance;
	__u64 now;

	plan->into = SLOTS;
	plan->from = SLOTS;
	bpf_spin_lock(&state->lock);
	now = ++state->packets;
	if (!state->random)
		state->random = seed;
	lose = draw(&state->random);
	reorder = draw(&state->random);
	corrupt = draw(&state->random);
	duplicate = draw(&state->random);
	truncate = draw(&state->random);
	distance = draw(&state->random);
	plan->where = draw(&state->random);
	plan->bit = draw(&state->random);
	plan->rest = draw(&state->random);
	plan->lose = lose < chances->lose;
	plan->hold = !plan->lose && reorder < chances->reorder;
	for (int i = 0; i < SLOTS; i++) {
		if (state->due[i] == FREE) {
			if (plan->hold && plan->into == SLOTS && len <= SLOT_BYTES) {
				plan->into = i;
				state->due[i] = TAKEN;
			}
		} else if (plan->from == SLOTS && state->due[i] <= now) {
			plan->from = i;
			state->due[i] = TAKEN;
		}
	}
	bpf_spin_unlock(&state->lock);
	plan->corrupt = !plan->lose && corrupt < chances->corrupt;
	plan->duplicate = !plan->lose && duplicate < chances->duplicate;
	plan->truncate = !plan->lose && truncate < chances->truncate;
	plan->due = now + 1 + below(distance, FURTHEST);
}

static __always_inline void set_due(struct state *state, __u32 slot, __u64 due)
{
	__u64 overdue = due == FREE ? 0 : bpf_ktime_get_ns() + LONGEST;

	if (slot >= SLOTS)
		return;
	bpf_spin_lock(&state->lock);
	state->due[slot] = due;
	state->overdue[slot] = overdue;
	bpf_spin_unlock(&state->lock);
}

/* Flips one bit, most often of the payload. */
static __always_inline void corrupt(struct __sk_buff *skb, const struct layout *layout,
				    const struct plan *plan)
{
	__u32 low = layout->payload < skb->len ? layout->payload : 0, high = skb->len, at;
	__u8 byte;

	if (plan->bit % IN_HEADERS == 0) {
		low = 0;
		high = layout->payload < high ? layout->payload : high;
	}
	at = low + below(plan->where, high - low);
	if (bpf_skb_load_bytes(skb, at, &byte, 1))
		return;
	byte ^= 1 << (plan->bit >> 29);
	if (!bpf_skb_store_bytes(skb, at, &byte, 1, 0))
		count(CORRUPTED);
}

/* Cuts something off the end, the IP header excepted. */
static __always_inline void truncate(struct __sk_buff *skb, const struct layout *layout,
				     const struct plan *plan)
{
	__u32 least = layout->transport;

	if (!bpf_skb_change_tail(skb, least + below(plan->rest, skb->len - least), 0))
		count(TRUNCATED);
}

/*
 * Whether so many bytes may lie in a slot. The barriers keep the compiler from folding the two
 * comparisons into one that the verifier cannot follow.
 */
#define FITS(len) ({				\
	int fits = 0;				\
						\
	barrier_var(len);			\
	if (len > 0) {				\
		barrier_var(len);		\
		fits = len <= SLOT_BYTES;	\
	}					\
	fits;					\
})

/* Puts the packet's bytes in a slot; says whether they are there. */
static __always_inline int hold(struct __sk_buff *skb, struct state *state, __u32 key, __u64 due)
{
	__u64 len = skb->len;
	struct slot *slot = bpf_map_lookup_elem(&slots, &key);

	if (!slot || !FITS(len) || bpf_skb_load_bytes(skb, 0, slot->bytes, len)) {
		set_due(state, key, FREE);
		count(NO_ROOM);
		return 0;
	}
	slot->len = len;
	set_due(state, key, due);
	count(HELD);
	return 1;
}

/* Turns the packet into that of a slot; says whether that went well. */
static __always_inline int let_out(struct __sk_buff *skb, struct state *state, __u32 key)
{
	__u64 len;
	struct slot *slot = bpf_map_lookup_elem(&slots, &key);
	int out = 0;

	if (!slot)
		return 0;
	len = slot->len;
	if (!bpf_skb_change_tail(skb, len, 0) && FITS(len))
		out = !bpf_skb_store_bytes(skb, 0, slot->bytes, len, 0);
	set_due(state, key, FREE);
	if (out)
		count(LET_OUT);
	return out;
}

SEC("tcx/ingress")
int penstock_faults(struct __sk_buff *skb)
{
	struct layout layout = {};
	const struct settings *chances;
	struct plan plan = {};
	struct state *now;
	__u32 key = 0;
	int goes;

	if (!treats(skb, &layout))
		return bpf_redirect(output, 0);
	chances = bpf_map_lookup_elem(&settings, &layout.protocol);
	now = bpf_map_lookup_elem(&state, &key);
	if (!chances || !now)
		return TC_ACT_SHOT;
	count(SEEN);
	if (skb->len - sizeof(struct ethhdr) > chances->largest) {
		count(SWALLOWED);
		return TC_ACT_SHOT;
	}
	decide(now, chances, skb->len, &plan);
	goes = !plan.lose;
	if (plan.lose)
		count(LOST);
	if (plan.corrupt)
		corrupt(skb, &layout, &plan);
	if (plan.truncate)
		truncate(skb, &layout, &plan);
	if (plan.into < SLOTS)
		goes = !hold(skb, now, plan.into, plan.due);
	else if (plan.hold)
		count(NO_ROOM);
	if (plan.duplicate && !bpf_clone_redirect(skb, output, 0))
		count(DUPLICATED);
	if (plan.from < SLOTS) {
		if (goes)
			bpf_clone_redirect(skb, output, 0);
		goes = let_out(skb, now, plan.from);
	}
	return goes ? bpf_redirect(output, 0) : TC_ACT_SHOT;
}

/* User space runs this now and then, on a packet of no meaning: answers 1 as long as there is more. */
SEC("tcx/ingress")
int penstock_overdue(struct __sk_buff *skb)
{
	__u64 now = bpf_ktime_get_ns();
	__u32 key = 0, from = SLOTS;
	struct state *held = bpf_map_lookup_elem(&state, &key);

	if (!held)
		return 0;
	bpf_spin_lock(&held->lock);
	for (int i = 0; i < SLOTS; i++) {
		if (from == SLOTS && held->due[i] != FREE && held->due[i] != TAKEN &&
		    held->overdue[i] <= now) {
			from = i;
			held->due[i] = TAKEN;
		}
	}
	bpf_spin_unlock(&held->lock);
	if (from == SLOTS)
		return 0;
	if (let_out(skb, held, from))
		bpf_clone_redirect(skb, output, 0);
	return 1;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
