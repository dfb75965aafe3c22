//! Admits a remote subscriber: checks its right to read, takes a permit, then finds the topic's log.

use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use penstock_auth::{PacketKeys, generate};
use penstock_log::Log;
use penstock_wire::handshake::{Offer, Refusal, Welcome};
use tracing::{info, warn};
use zerocopy::IntoBytes;

use super::pending_handshake::{Admissible, AdmissibleSubscriber, PendingHandshake};
use super::{Acceptor, ReadAccess, SubscriberService};
use crate::session::accepted_subscriber::AcceptedSubscriber;
use crate::session::admission::{Admit, Refused};
use crate::session::permits::{StreamPermit, StreamPermits};
use crate::session::stats::Counters;

/// The service for remote subscribers, and its permits.
pub(super) struct Subscribers {
    service: SubscriberService,
    permits: StreamPermits,
}

impl Subscribers {
    pub(super) fn new(service: SubscriberService, percent: u8) -> Self {
        Self {
            permits: StreamPermits::for_subscribers(service.max, percent),
            service,
        }
    }

    pub(super) fn refresh(&self, now: Instant) {
        self.permits.refresh(now);
    }
}

impl<A: Admit> Acceptor<A> {
    /// Serves a new subscriber, refuses it, or makes it wait until its topic is open.
    pub(super) fn admit_subscriber(&mut self, key: usize, topic: String) {
        match self.subscriber_permit(key, &topic) {
            Ok(permit) => self.open_subscriber(key, AdmissibleSubscriber { topic, permit }),
            Err(Refused { refusal, text }) => self.reject(key, Some(refusal), &text, &text),
        }
    }

    /// As for streams, nothing is created or opened before all checks pass.
    fn subscriber_permit(&self, key: usize, topic: &str) -> Result<StreamPermit, Refused> {
        let refuse = |refusal, text: String| Err(Refused { refusal, text });
        let Some(subscribers) = &self.subscribers else {
            let text = "this broker serves no remote subscribers: start it without --remote-subscribers never";
            return refuse(Refusal::Unsupported, text.to_owned());
        };
        let pending = &self.handshakes[key];
        match pending.handshake.grant() {
            Some(grant) if !grant.permits_reading(topic) => {
                return refuse(
                    Refusal::Permission,
                    format!(
                        "key {} may not read topic {topic:?}; add read:{topic} to the key's line in the broker's --auth-keys file",
                        grant.name
                    ),
                );
            }
            None if subscribers.service.access == ReadAccess::Keyed => {
                let text = "this broker has no keys, so nobody may read its topics over the network: start it with --auth-keys, or with --remote-subscribers any";
                return refuse(Refusal::Permission, text.to_owned());
            }
            Some(_) | None => {}
        }
        let tenant = pending.tenant();
        let (permit, evicts) = subscribers.permits.acquire(tenant, Instant::now())?;
        if evicts {
            Counters::count(&self.shared.counters.stream_evictions);
        }
        Ok(permit)
    }

    /// Serves a subscriber that has a permit, unless its topic's log has to be opened first.
    pub(super) fn open_subscriber(&mut self, key: usize, subscriber: AdmissibleSubscriber) {
        let Some(pending) = self.handshakes.get(key) else {
            return;
        };
        match self.admit.find_log(&subscriber.topic, pending.tenant()) {
            Ok(Some(log)) => self.serve(key, subscriber, log),
            Ok(None) => self.wait_for_topic(key, Admissible::Subscriber(subscriber)),
            Err(Refused { refusal, text }) => self.reject(key, Some(refusal), &text, &text),
        }
    }

    /// Answers an admitted subscriber, and passes it to the worker.
    fn serve(&mut self, key: usize, subscriber: AdmissibleSubscriber, log: Arc<Log>) {
        let Some(PendingHandshake {
            socket,
            peer,
            mut handshake,
            ..
        }) = self.take(key)
        else {
            return;
        };
        let has_packet_auth = self.packet_auth || handshake.wants_packet_auth();
        let secret = match has_packet_auth.then(generate).transpose() {
            Ok(secret) => secret,
            Err(error) => {
                warn!(%peer, %error, "no random numbers; the connection is dropped");
                return;
            }
        };
        let offer = Offer {
            session: log.identity(),
            max_payload: log.geometry().max_payload(),
            committed: log.info().batches,
            datagrams: None,
        };
        let frames = secret.as_deref().copied().unwrap_or_default();
        let welcome = handshake.seal(Welcome::accept(offer).as_bytes().to_vec(), frames);
        // A new socket has room for these few bytes; otherwise the connection is dropped.
        if !matches!((&socket).write(&welcome), Ok(n) if n == welcome.len()) {
            Counters::count(&self.shared.counters.handshake_closed);
            return;
        }
        Counters::count(&self.shared.counters.subscribers_opened);
        if self.shared.lines.allows() {
            let key = handshake.grant().map(|grant| grant.name.as_str());
            info!(%peer, topic = subscriber.topic, key, "subscriber");
        }
        let subscribers = self.subscribers.as_ref().expect("it was there to admit it");
        let service = &subscribers.service;
        let grant = handshake.grant();
        let may_register = grant.map_or(service.anyone_may_register, |grant| {
            grant.permits_registering(&subscriber.topic)
        });
        let accepted = AcceptedSubscriber {
            may_register,
            socket,
            peer,
            topic: subscriber.topic,
            log,
            keys: secret.map(|secret| Arc::new(PacketKeys::new(&secret))),
            permit: subscriber.permit,
        };
        if let Err(error) = service.queue.push(accepted) {
            warn!(%peer, %error, "cannot queue a subscriber");
        }
    }
}
