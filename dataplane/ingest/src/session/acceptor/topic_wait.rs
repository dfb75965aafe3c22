//! Connections whose topics are being opened.

use std::time::{Duration, Instant};

use penstock_runtime::poller::Interest;
use penstock_wire::handshake::Refusal;

use super::Acceptor;
use super::pending_handshake::{Admissible, HandshakeId, tenant_of};
use crate::session::admission::{Admit, REVOKED};

/// Time limit for opening a topic; enough to allocate the largest possible log.
const TOPIC_OPEN_TIMEOUT: Duration = Duration::from_secs(30);

impl<A: Admit> Acceptor<A> {
    /// Lets a connection wait for its topic; nothing is read from it meanwhile. It has a permit, so
    /// there are no more of these than streams.
    pub(super) fn wait_for_topic(&mut self, key: usize, admissible: Admissible) {
        let Some(pending) = self.handshakes.get_mut(key) else {
            return;
        };
        if !std::mem::replace(&mut pending.has_waited, true) {
            // The new number takes it out of the handshakes by age.
            pending.number = self.next_number;
            self.next_number += 1;
            pending.deadline = Instant::now() + TOPIC_OPEN_TIMEOUT;
            self.awaiting_topic.push(HandshakeId {
                key,
                number: pending.number,
            });
            self.pending.release(&tenant_of(pending.peer), 1);
            let (socket, nothing) = (&pending.socket, Interest::NOTHING);
            if self.poller.modify(socket, key, nothing).is_err() {
                return self.close(key);
            }
        }
        pending.waiting = Some(admissible);
    }

    /// Tries again for connections whose topics were being opened.
    pub(super) fn retry_waiting(&mut self) {
        if !self.admit.topics_changed() {
            return;
        }
        for id in self.awaiting_topic.clone() {
            let pending = self.handshakes.get_mut(id.key);
            let pending = pending.filter(|pending| pending.number == id.number);
            match pending.and_then(|pending| pending.waiting.take()) {
                Some(Admissible::Stream(stream)) => self.open(id.key, stream),
                Some(Admissible::Subscriber(subscriber)) => {
                    self.open_subscriber(id.key, subscriber);
                }
                None => {}
            }
        }
        self.prune_waiting();
    }

    /// Ends connections that waited too long or whose permit was revoked.
    pub(super) fn expire_waiting(&mut self, now: Instant) {
        for id in self.awaiting_topic.clone() {
            let Some(pending) = id.get(&self.handshakes) else {
                continue;
            };
            let waiting = pending.waiting.as_ref();
            let text = if now >= pending.deadline {
                "the broker could not open the topic in time; try again later"
            } else if waiting.is_some_and(|waiting| waiting.permit().is_revoked()) {
                REVOKED
            } else {
                continue;
            };
            self.reject(id.key, Some(Refusal::Resources), text, text);
        }
        self.prune_waiting();
    }

    fn prune_waiting(&mut self) {
        let handshakes = &self.handshakes;
        self.awaiting_topic
            .retain(|id| id.get(handshakes).is_some());
    }
}
