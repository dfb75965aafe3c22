// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * Counts the system calls of one process, by thread and call, with time and result.
 *
 * All is added up here, on the core where it happens: user space reads sums, never events.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define MAX_THREADS 16384
#define MAX_SUMS 16384

/* What a raw tracepoint hands over: sys_enter(registers, number), sys_exit(registers, result). */
struct arguments {
	__u64 registers;
	__s64 value;
};

/* A call that has not returned. */
struct begun {
	__u64 at; /* ns, CLOCK_MONOTONIC */
	__u32 number;
	__u32 unused;
};

struct key {
	__u32 thread;
	__u32 number;
};

struct sum {
	__u64 count;
	__u64 ns;
	__u64 failed; /* of count */
	__u64 result; /* sum of results above 0: bytes, for calls that return how many */
};

/* Set by the loader before the program is loaded. */
const volatile __u32 process;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_THREADS);
	__type(key, __u32);
	__type(value, struct begun);
} begun SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, MAX_SUMS);
	__type(key, struct key);
	__type(value, struct sum);
} sums SEC(".maps");

SEC("raw_tracepoint/sys_enter")
int penstock_enter(struct arguments *arguments)
{
	__u64 id = bpf_get_current_pid_tgid();
	__u32 thread = id;

	if (id >> 32 != process)
		return 0;
	struct begun call = {.at = bpf_ktime_get_ns(), .number = arguments->value};
	struct begun *earlier = bpf_map_lookup_elem(&begun, &thread);
	if (earlier)
		/* In place: an update takes a new entry and a lock. */
		*earlier = call;
	else
		/* When there is no room for more threads, the others are still counted. */
		bpf_map_update_elem(&begun, &thread, &call, BPF_NOEXIST);
	return 0;
}

SEC("raw_tracepoint/sys_exit")
int penstock_exit(struct arguments *arguments)
{
	__u64 id = bpf_get_current_pid_tgid();
	__u32 thread = id;

	if (id >> 32 != process)
		return 0;
	/* Not there: the call began before we did. */
	struct begun *call = bpf_map_lookup_elem(&begun, &thread);
	if (!call || !call->at)
		return 0;
	struct key key = {.thread = thread, .number = call->number};
	struct sum *sum = bpf_map_lookup_elem(&sums, &key);
	if (!sum) {
		struct sum none = {};
		bpf_map_update_elem(&sums, &key, &none, BPF_NOEXIST);
		sum = bpf_map_lookup_elem(&sums, &key);
		if (!sum)
			return 0;
	}
	sum->count++;
	sum->ns += bpf_ktime_get_ns() - call->at;
	if (arguments->value < 0)
		sum->failed++;
	else
		sum->result += arguments->value;
	/* Kept and marked, for taking an entry out and in again costs more than the rest. */
	call->at = 0;
	return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
