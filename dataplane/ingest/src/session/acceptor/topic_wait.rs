//! Connections whose topics are being opened.

use std::time::{Duration, Instant};

use penstock_runtime::poller::Interest;
use penstock_wire::handshake::Refusal;

use super::Acceptor;
use super::pending_handshake::{Waiting, tenant_of};
use crate::session::admission::{Admit, REVOKED};

/// Time limit for opening a topic; enough to allocate the largest possible log.
const TOPIC_PATIENCE: Duration = Duration::from_secs(30);

impl<A: Admit> Acceptor<A> {
    /// Lets a connection wait for its topic; nothing is read from it meanwhile. It has a permit, so
    /// there are no more of these than streams.
    pub(super) fn wait_for_topic(&mut self, key: usize, waiting: Waiting) {
        let Some(pending) = &mut self.handshakes[key] else {
            return;
        };
        if !std::mem::replace(&mut pending.has_waited, true) {
            // Its age no longer counts.
            pending.number = self.next_number;
            self.next_number += 1;
            pending.deadline = Instant::now() + TOPIC_PATIENCE;
            self.waiting.push((key, pending.number));
            self.pending.release(&tenant_of(pending.peer), 1);
            let (socket, nothing) = (&pending.socket, Interest::NOTHING);
            if self.poller.modify(socket, key, nothing).is_err() {
                return self.close(key);
            }
        }
        pending.waiting = Some(waiting);
    }

    /// Tries again for connections whose topics were being opened.
    pub(super) fn ask_again(&mut self) {
        if !self.admit.has_news() {
            return;
        }
        for (key, number) in self.waiting.clone() {
            let pending = self.handshakes[key].as_mut();
            let pending = pending.filter(|pending| pending.number == number);
            if let Some(waiting) = pending.and_then(|pending| pending.waiting.take()) {
                self.ask(key, waiting);
            }
        }
        self.forget_waiting();
    }

    /// Ends connections that waited too long or whose permit was revoked.
    pub(super) fn expire_waiting(&mut self, now: Instant) {
        for (key, number) in self.waiting.clone() {
            let pending = self.handshakes[key].as_ref();
            let pending = pending.filter(|pending| pending.number == number);
            let Some(pending) = pending else {
                continue;
            };
            let waiting = pending.waiting.as_ref();
            let text = if now >= pending.deadline {
                "the broker could not open the topic in time; try again later"
            } else if waiting.is_some_and(|waiting| waiting.permit.is_revoked()) {
                REVOKED
            } else {
                continue;
            };
            self.reject(key, Some(Refusal::Resources), text, text);
        }
        self.forget_waiting();
    }

    fn forget_waiting(&mut self) {
        let handshakes = &self.handshakes;
        self.waiting.retain(|&(key, number)| {
            let pending = handshakes[key].as_ref();
            pending.is_some_and(|pending| pending.number == number)
        });
    }
}
